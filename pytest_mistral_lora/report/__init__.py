"""Reports: the checks of a session, and the comparison of two runs, for terminals, pages and other programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.compare_runs import ABSENT, GROUPS, AnswersDiff, ChangedField, RunsDiff
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.goldens import library_versions
from pytest_mistral_lora.records.tensors import TensorsDiff

if TYPE_CHECKING:
    from rich.table import Table


SCHEMA_VERSION = 1
"""Version of the report's form; it grows if a key changes its meaning or goes."""

OUTCOMES = {"passed": "passed", "failed": "failed", "known": "known", "skipped": "not checked"}
"""Each outcome of a check, and its name for people. pytest's word for a check that could not run is *skipped*."""

_WORST_FIRST = ("failed", "known", "skipped", "passed")
# a narrower terminal than this breaks every row of a table; letting the terminal wrap long lines reads better
_LEAST_WIDTH = 60


def report_data(
    records: Sequence[dict[str, Any]],
    exit_status: int,
    *,
    causes: Sequence[Mapping[str, Any]],
    deselected: int,
    not_run: int,
) -> dict[str, Any]:
    """Return the report as plain JSON data.

    Args:
        records: One record for each check that ran.
        exit_status: pytest's exit code.
        causes: The findings by cause: the simplest finding of each, with its check, its number and the others' names.
        deselected: Number of checks left out by `-k`, `-m` or `--lf`.
        not_run: Number of checks that were chosen and did not run, because of `-x` or an interruption.
    """
    counts = Counter(record["outcome"] for record in records)
    return {
        "schema_version": SCHEMA_VERSION,
        "pytest_mistral_lora": __version__,
        # two reports can only be compared if they name the versions under which their ids were computed
        "libraries": library_versions(),
        "exit_status": exit_status,
        "counts": {
            "passed": counts["passed"],
            "failed": counts["failed"],
            "known": counts["known"],
            "not_checked": counts["skipped"],
            "deselected": deselected,
            "not_run": not_run,
        },
        "causes": list(causes),
        "checks": sorted(records, key=lambda record: record["nodeid"]),
    }


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report atomically.

    Args:
        path: A file; HTML if its name ends in `.html`, otherwise JSON.
        data: The result of `report_data`.
    """
    if path.suffix == ".html":
        write_text(path, html_page(data))
    else:
        write_json(path, data)


def html_page(data: Mapping[str, Any]) -> str:
    """Return the result of `report_data` as one HTML page that loads nothing else."""
    from jinja2 import Environment, StrictUndefined

    from pytest_mistral_lora.report.statistics import named_figures, statistics_of

    source = files("pytest_mistral_lora.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    # autoescape, because the text of a row may be HTML
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    checks = sorted(data["checks"], key=lambda record: _WORST_FIRST.index(record["outcome"]))
    shown = [record for record in checks if record["outcome"] != "passed" or record["findings"]]
    template = environment.from_string(source)
    figures = {name: (one, [*named_figures(one)]) for name, one in statistics_of(data["checks"]).items()}
    known = {"outcomes": OUTCOMES, "table": _outcome_counts(data["checks"]), "shown": shown, "figures": figures}
    return template.render(data=data, **known)


def outcome_table(records: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Return the lines of a table with the number of outcomes of each target and subject.

    Args:
        records: One record for each check that ran.
        width: Columns of the terminal.
    """
    from rich import box
    from rich.table import Table

    # few runs have known deviations: for all others the column is noise
    shown = [name for name in OUTCOMES if name != "known" or any(one["outcome"] == "known" for one in records)]
    table = Table("target", "subject", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        table.add_column(OUTCOMES[name], justify="right")
    for (target, subject), count in _outcome_counts(records).items():
        table.add_row(target, subject, *(str(count[name] or "-") for name in shown))
    return table_lines(table, width)


def basis_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each fact that names what something was held to or made of, such as `oracle of`."""
    named = [
        (name, one["target"], text) for one in records for name, text in one["facts"].items() if name.endswith(" of")
    ]
    return [f"{name} {target}: {text}" for name, target, text in dict.fromkeys(named) if text]


def nothing_was_judged(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether checks ran, and none of them could judge anything: such a run must not be taken for a pass."""
    return bool(records) and all(record["outcome"] == "skipped" for record in records)


def unchecked_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each reason and target: one missing base stops dozens of checks."""
    reasons = Counter((one["target"], one["not_checked"]) for one in records if one["not_checked"])
    lines = [f"  {target}: {reason} ({count})" for (target, reason), count in reasons.items()]
    return ["not checked:", *lines] if lines else []


def verdict_line(records: Sequence[Mapping[str, Any]], causes: Sequence[int]) -> str:
    """Return the last line of a run: how much was found, and how much was judged.

    Args:
        records: One record for each check that ran.
        causes: The number of findings of each cause.
    """
    counts = Counter(record["outcome"] for record in records)
    findings = sum(causes)
    found = f"{findings} finding{'' if findings == 1 else 's'}"
    found += f" of {len(causes)} cause{'' if len(causes) == 1 else 's'}" if causes else ""
    return f"{found}; {counts['passed']} checks passed, {counts['failed']} failed, {counts['skipped']} not checked"


def line_style(line: str) -> str:
    """Return the colours of one line of a finding's text, by name; empty for plain text."""
    if re.match(r"ML\d{3} ", line):
        return "red bold"
    # the marks of the table of tokens, which is indented like everything that belongs to a finding
    return {"  - ": "red", "  + ": "green", "  > ": "yellow", "  fi": "bold"}.get(line[:4], "")


def write_styled(text: str) -> None:
    """Write the text of a finding to standard output; in colour if that is a terminal and NO_COLOR is not set."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in text.split("\n"):
        console.print(Text(line, style=line_style(line)), end="\n")


def table_lines(table: Table, width: int) -> list[str]:
    """Return the lines of a table for a terminal of this width, without colours."""
    from rich.console import Console

    file = StringIO()
    Console(file=file, width=max(width, _LEAST_WIDTH), color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def _outcome_counts(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """Count the outcomes of each target and subject, in the order in which these first appear."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for record in records:
        counts.setdefault((record["target"], record["subject"]), Counter())[record["outcome"]] += 1
    return counts


_LONGEST = 60
"""Longest value that is printed, in characters; a longer one is cut."""


def diff_data(found: RunsDiff) -> dict[str, Any]:
    """Return a comparison as plain JSON data; a part that was not compared is null, with the reason beside it."""
    tensors, answers = found.tensors, found.answers
    reasons = {name: part for name, part in (("tensors", tensors), ("answers", answers)) if isinstance(part, str)}
    tensors_data = None
    if not isinstance(tensors, str):
        tensors_data = {
            "compared": tensors.compared,
            "different": tensors.different,
            "kinds": [kind.to_json() for kind in tensors.kinds],
            "reshaped": [{"tensor": name, "a": a, "b": b} for name, a, b in tensors.reshaped],
            "only_a": tensors.only_a,
            "only_b": tensors.only_b,
        }
    return {
        "a": str(found.a),
        "b": str(found.b),
        "equal": found.equal,
        "facts": [fact.to_json() for fact in found.facts],
        "tensors": tensors_data,
        "answers": None if isinstance(answers, str) else asdict(answers),
        "not_compared": reasons,
    }


def diff_lines(found: RunsDiff, width: int) -> Iterator[str]:
    """Yield the lines of a comparison for a terminal of this width."""
    yield f"a: {found.a}"
    yield f"b: {found.b}"
    yield f"facts: {len(found.facts)} differ"
    yield from _fact_lines(found.facts)
    yield from _tensor_lines(found.tensors, width)
    yield from _answer_lines(found.answers)


def _fact_lines(facts: tuple[ChangedField, ...]) -> Iterator[str]:
    for group in GROUPS:
        chosen = [fact for fact in facts if fact.group == group]
        # a file whose hash differs mostly has another size, too: one line for it is enough
        hashed = {fact.path.removesuffix(".sha256") for fact in chosen if fact.path.endswith(".sha256")}
        shown = [fact for fact in chosen if fact.path.removesuffix(".size") not in hashed]
        yield from [group] if shown else []
        yield from (f"  {fact.path}: {_short_value(fact.a)} → {_short_value(fact.b)}" for fact in shown)


def _short_value(value: Any) -> str:
    if value is ABSENT:
        return "not recorded"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _tensor_lines(tensors: TensorsDiff | str, width: int) -> list[str]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if isinstance(tensors, str):
        return [f"tensors: not compared: {tensors}"]
    lines = [f"tensors: {tensors.different} of {tensors.compared} differ"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for name in ("tensors", "differ", "max abs", "relative", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in tensors.kinds:
        figures = (f"{kind.max_abs:.3g}", f"{kind.relative:.3g}", f"{kind.cosine:.6f}")
        table.add_row(Text(kind.name), str(kind.tensors), str(kind.different), *figures)
    lines += table_lines(table, width) if tensors.different else []
    lines += [f"  {name}: shape {list(a)} in a, {list(b)} in b" for name, a, b in tensors.reshaped]
    lines += [f"  {name}: only in a" for name in tensors.only_a]
    return lines + [f"  {name}: only in b" for name in tensors.only_b]


def _answer_lines(answers: AnswersDiff | str) -> list[str]:
    if isinstance(answers, str):
        return [f"answers: not compared: {answers}"]
    lines = [f"answers: {len(answers.different)} of {answers.compared} differ"]
    for one in answers.different:
        difference = {
            "question": "the two conversations differ",
            "prompt": "the same conversation has other prompt ids",
            "answer": f"from token {one.token} on",
        }[one.differs]
        lines += [f"  {one.case}: {difference}", f"    a: {one.a!r}", f"    b: {one.b!r}"]
    lines += [f"  {case}: only in a" for case in answers.only_a]
    return lines + [f"  {case}: only in b" for case in answers.only_b]
