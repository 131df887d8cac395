"""The lines of a verdict for people: facts, what was not checked, the last line, and its colours."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pytest_mistral_lora.errors import and_more, counted
from pytest_mistral_lora.escaping import own_stream, printable, safe_text
from pytest_mistral_lora.report.outcomes import FoundCause, Outcome


def basis_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each fact about the basis of a check, such as `oracle of`."""
    named = [
        (name, outcome.target, text)
        for outcome in outcomes
        for name, text in outcome.facts.items()
        if name.endswith(" of")
    ]
    return [f"{name} {target}: {text}" for name, target, text in dict.fromkeys(named) if text]


def objective_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the first lines of a verdict: the declared objective, for each target if they differ; none without one."""
    declared = {outcome.target: words for outcome in outcomes if (words := outcome.facts.get("objective"))}
    if len({*declared.values()}) == 1:
        return [f"objective: {words}" for words in list(declared.values())[:1]]
    return [f"objective of {target}: {words}" for target, words in declared.items()]


NOTHING_WAS_JUDGED = "No check could judge anything, so this run does not pass."
"""The sentence for people on a run in which no check could judge anything."""

_MOST_TARGETS = 3
"""Most targets to name beside one reason."""


def unchecked_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each reason, with its targets and its number: one missing base stops dozens of checks."""
    reasons: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        if outcome.not_checked:
            reasons.setdefault(outcome.not_checked, Counter())[outcome.target] += 1
    lines = []
    for reason, targets in reasons.items():
        names = f"{', '.join([*targets][:_MOST_TARGETS])}{and_more(_MOST_TARGETS, len(targets))}"
        lines.append(f"  {names}: {reason} ({targets.total()})")
    return ["not checked:", *lines] if lines else []


LOOK_AT = "look at these:"
"""The title of the list of signs."""


def look_at_lines(signs: Iterable[FoundCause]) -> list[str]:
    """Return a line for each sign, with one row that has it.

    Args:
        signs: The causes that nothing proves.
    """
    lines = [f"  {_look_at(sign)}" for sign in signs]
    return [LOOK_AT, *lines] if lines else []


def _look_at(sign: FoundCause) -> str:
    finding = sign.shown
    # a sign of a file lists its first rows, each with the letters that show it
    example = finding.detail.partition("\n")[0]
    place = example if example.startswith(str(finding.place)) else str(finding.place)
    more = f" ({counted(sign.count, 'finding')})" if sign.count > 1 else ""
    words = f"{finding.rule} {place}: {' '.join(finding.words.split())}{more}"
    return printable(f"{words} - fix: {finding.next_step}", lines=False)


_CONVERSION = "rows of "
"""The beginning of the line on rows that were converted, which is never left out."""
_MOST_BRIEF = 6
"""Lines of a run without an error, beside its verdict, the next command, and two lines on the paths: ten in all."""


def brief_lines(
    outcomes: Sequence[Outcome], known: Sequence[str], others: Sequence[str], signs: Sequence[str]
) -> list[str]:
    """Return the lines above the verdict of a run without an error: what was judged, and what needs a look.

    If there are too many, the oracles go first, then the figures; lines of targets, known faults and signs are cut.

    Args:
        outcomes: The outcome of each check that ran.
        known: The lines on known faults.
        others: Further lines, which stay.
        signs: The lines of `look_at_lines`.
    """
    from pytest_mistral_lora.report.tables import statistics_line, statistics_of

    figures = [f"figures of {name}: {statistics_line(found)}" for name, found in [*statistics_of(outcomes).items()][:1]]
    reasons = Counter(outcome.not_checked for outcome in outcomes if outcome.not_checked)
    unchecked = []
    if reasons:
        why = f": {next(iter(reasons))}" if len(reasons) == 1 else f", for {len(reasons)} reasons: -v lists them"
        unchecked.append(f"not checked: {counted(reasons.total(), 'check')}{why}")
    # the oracle, and how many rows were judged
    basis = [line for line in basis_lines(outcomes) if not line.startswith(("layers of ", _CONVERSION))][:3]
    others = [*(line for line in basis_lines(outcomes) if line.startswith(_CONVERSION)), *others]
    targets, faults, shown = _target_lines(outcomes), [*known], [*signs]

    def room() -> int:
        return _MOST_BRIEF - sum(map(len, (targets, figures, unchecked, basis, faults, others, shown)))

    while basis and room() < 0:
        basis.pop()
    if len(targets) > 1 and room() < 0:
        targets = _target_lines(outcomes, most=max(0, len(targets) + room() - 1))
    if room() < 0:
        figures = []
    if len(faults) > 1 and room() < 0:
        faults = [f"{faults[0]} (and {len(faults) - 1} more: -v lists them)"]
    if len(shown) > _FEWEST_SIGNS and room() < 0:
        rows = max(1, len(shown) - 1 + room())
        shown = [f"{LOOK_AT[:-1]} ({rows} of {len(signs) - 1}, -v lists all):", *shown[1 : rows + 1]]
    return [*targets, *figures, *unchecked, *basis, *faults, *others, *shown]


_FEWEST_SIGNS = 2
"""The title and one sign."""


def _target_lines(outcomes: Sequence[Outcome], most: int = _MOST_TARGETS) -> list[str]:
    """Return a line for each of the first targets, and one for all the others."""
    targets: dict[str, Counter[str]] = {}
    subjects: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        targets.setdefault(outcome.target, Counter())[outcome.state] += 1
        subjects.setdefault(outcome.target, {})[outcome.subject] = None
    lines = []
    for target, counts in [*targets.items()][:most]:
        lines.append(f"{target}: {_numbers(counts)} ({', '.join(subjects[target])})")
    others = [*targets.values()][most:]
    if others:
        name = f"{counted(len(others), 'other target')}" if lines else counted(len(others), "target")
        lines.append(f"{name}: {_numbers(sum(others, Counter()))} (-v lists them)")
    return lines


def _numbers(counts: Mapping[str, int]) -> str:
    numbers = [f"{counts['passed']} passed"]
    numbers += [f"{counts[name]} {words}" for name, words in _STATES.items() if counts[name]]
    return ", ".join(numbers)


_STATES = {"known": "known", "skipped": "not checked"}


def verdict_line(outcomes: Sequence[Outcome], causes: Sequence[int]) -> str:
    """Return the last line of a run: the numbers of findings and of judged checks.

    Args:
        outcomes: The outcome of each check that ran.
        causes: The number of findings of each cause.
    """
    counts = Counter(outcome.state for outcome in outcomes)
    found = found_words(sum(causes), len(causes))
    return f"{found}; {counts['passed']} checks passed, {counts['failed']} failed, {counts['skipped']} not checked"


def found_words(findings: int, causes: int) -> str:
    """Return the numbers of findings and causes, `3 findings of 1 cause`."""
    return counted(findings, "finding") + (f" of {counted(causes, 'cause')}" if causes else "")


def commands_in(fix: str) -> list[str]:
    """Return the commands that a fix quotes with backticks."""
    return [text for text in re.findall(r"`([^`]+)`", fix) if re.match(r"(mistral-lora|pytest|pip) ", text)]


def line_style(line: str) -> str:
    """Return the colours of one line of a finding's text, by name; empty for plain text."""
    if re.match(r"ML\d{3} ", line):
        return "red bold"
    # the marks of the table of tokens, which is indented like all parts of a finding
    return {"  - ": "red", "  + ": "green", "  > ": "yellow", "  fi": "bold"}.get(line[:4], "")


def write_styled(text: str) -> None:
    """Write the text of a finding to standard output; in colour if it is a terminal and NO_COLOR is not set."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=own_stream(sys.stdout), highlight=False, soft_wrap=True)
    for line in safe_text(text).split("\n"):
        console.print(Text(line, style=line_style(line)), end="\n")
