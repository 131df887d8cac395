"""Tables for terminals: outcomes of checks, figures of a dataset with a histogram, and differences of two runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.objective import ANSWERS
from pytest_mistral_lora.errors import counted, one_line
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.compare_runs import ABSENT, GROUPS, AnswersDiff, RunsDiff
from pytest_mistral_lora.report.outcomes import Outcome

if TYPE_CHECKING:
    from rich.console import RenderableType

OUTCOMES = {"passed": "passed", "failed": "failed", "known": "known", "skipped": "not checked"}
"""Each outcome of a check, and its name for people. pytest's word for a check that could not run is *skipped*."""

# in a narrower terminal every row of a table breaks; lines that the terminal wraps are easier to read
_LEAST_WIDTH = 60
_MOST_NAMES = 12
_LONGEST_NAME = 40
_LONGEST_VALUE = 60
_BAR = 40


def table_lines(
    titles: Sequence[str], rows: Iterable[Sequence[RenderableType]], width: int, *, wraps: bool = True
) -> list[str]:
    """Return the lines of a table for a terminal, without colours.

    Args:
        titles: The title of each column; an asterisk at its start marks a column of numbers.
        rows: The cells; texts have no mark-up.
        width: Columns of the terminal.
        wraps: Whether long cells are broken into lines; if not, they are cut.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(titles))
    for title in titles:
        side: Any = "right" if title.startswith("*") else "left"
        table.add_column(title.lstrip("*"), justify=side, overflow="fold" if wraps else "ellipsis", no_wrap=not wraps)
    for row in rows:
        table.add_row(*(Text(printable(cell, lines=False)) if isinstance(cell, str) else cell for cell in row))
    file = StringIO()
    Console(file=file, width=max(width, _LEAST_WIDTH), color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def outcome_counts(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], Counter[str]]:
    """Count the outcomes of each target and subject, in order of first appearance."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault((outcome.target, outcome.subject), Counter())[outcome.state] += 1
    return counts


def outcome_table(outcomes: Sequence[Outcome], width: int) -> list[str]:
    """Return the lines of a table with the number of outcomes of each target and subject.

    Args:
        outcomes: The outcome of each check that ran.
        width: Columns of the terminal.
    """
    # few runs have known deviations: for the others the column is noise
    shown = [name for name in OUTCOMES if name != "known" or any(outcome.state == "known" for outcome in outcomes)]
    titles = ("target", "subject", *(f"*{OUTCOMES[name]}" for name in shown))
    rows = (
        (target, subject, *(str(count[name] or "-") for name in shown))
        for (target, subject), count in outcome_counts(outcomes).items()
    )
    return table_lines(titles, rows, width)


def statistics_of(outcomes: Sequence[Outcome]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of each dataset among the outcomes of checks, by target."""
    chosen = (outcome for outcome in outcomes if (outcome.subject, outcome.case) == ("dataset", "statistics"))
    return {outcome.target: outcome.facts for outcome in chosen if outcome.facts.get("rows")}


def statistics_line(figures: Mapping[str, Any]) -> str:
    """Return the most important figures in one line."""
    tokens = figures["tokens"]
    text = f"{counted(figures['rows'], 'row')}, {counted(tokens['total'], 'token')} "
    text += f"({figures['supervised_share']:.0%} supervised; p50 {tokens['p50']:,}, p95 {tokens['p95']:,}, "
    text += f"longest {figures['longest_row_tokens']:,} at {figures['longest_row']})"
    epoch = figures.get("epoch")
    return text + (f", {counted(epoch['steps'], 'step')} an epoch" if epoch else "")


def figure_lines(figures: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a table of everything but lengths, for a terminal of this width."""
    yield from table_lines(("", ""), named_figures(figures), width)
    if len(figures["files"]) > 1:
        rows = []
        for file in figures["files"]:
            name = _short(f"{Path(file['path']).name}{' (held out)' if file['held_out'] else ''}")
            counts = (file[key] for key in ("rows", "refused", "dropped", "tokens", "supervised_tokens"))
            rows.append((name, *(f"{number:,}" for number in counts)))
        titles = ("file", "*rows", "*refused", "*dropped", "*tokens", "*supervised")
        yield from table_lines(titles, rows, width)


def length_lines(figures: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a table of cuts, and of a histogram, for a terminal of this width."""
    from rich.bar import Bar

    tokens, histogram = figures["tokens_of_whole_rows"]["total"], figures["histogram"]
    rows = sum(bucket["rows"] for bucket in histogram)
    cuts = []
    for cut in figures["cuts"]:
        shares = [
            f"{part / whole:.1%}" if whole else "-" for part, whole in ((cut["rows"], rows), (cut["tokens"], tokens))
        ]
        equal = [f"{cut['pairs_made_equal']:,}"] if "pairs_made_equal" in cut else []
        cuts.append((f"{cut['max_length']:,}", f"{cut['rows']:,}", shares[0], f"{cut['tokens']:,}", shares[1], *equal))
    titles = ["*max_length", "*rows cut", "*", "*tokens cut", "*"]
    if any("pairs_made_equal" in cut for cut in figures["cuts"]):
        titles.append("*pairs made equal")
    yield from table_lines(titles, cuts, width)
    most = max((bucket["rows"] for bucket in histogram), default=0)
    bars = (
        (f"{bucket['from']:,}-{bucket['to']:,}", f"{bucket['rows']:,}", Bar(most, 0, bucket["rows"], width=_BAR))
        for bucket in histogram
    )
    yield from table_lines(("*tokens", "*rows", ""), bars, width)


def named_figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each figure, and its value in words."""
    sides = [f"{figures['rows_trained_on']:,} trained on", f"{figures['rows_held_out']:,} held out"]
    lost = [f"{figures[f'rows_{name}']:,} {name}" for name in ("refused", "dropped") if figures[f"rows_{name}"]]
    parts = [*(sides if figures["rows_held_out"] else ()), *lost]
    yield "rows", f"{figures['rows']:,}" + (f" ({', '.join(parts)})" if parts else "")
    of_kinds = [kind for kind in KINDS.values() if figures.get(kind.count)]
    if figures["messages"] or not of_kinds:
        yield "turns", f"{counted(figures['messages'], 'message')}, {counted(figures['assistant_turns'], 'answer')}"
    yield from ((kind.name, f"{counted(figures[kind.count], 'row')}, each {kind.row_title}") for kind in of_kinds)
    yield "tokens", _spread(figures["tokens"])
    yield "supervised", f"{_spread(figures['supervised_tokens'])}; {figures['supervised_share']:.1%} of all tokens"
    if objectives := _objectives(figures["files"]):
        yield "objective", objectives
    # only preference pairs and rated answers have sides
    for side, of_side in figures.get("sides", {}).items():
        yield side, f"{counted(of_side['rows'], 'answer')}; tokens {_spread(of_side['answer_tokens'])}"
    if figures["longest_row"]:
        yield "longest row", f"{counted(figures['longest_row_tokens'], 'token')}: {figures['longest_row']}"
    yield "roles", _frequent(figures["roles"])
    prompts, tools = figures["rows_with_system_prompt"], figures["rows_with_tools"]
    of_chunks = ((kind.name, figures.get(kind.count, 0)) for kind in chunk_types().values() if kind.count)
    others = "".join(f"; {name}: {rows:,}" for name, rows in of_chunks if rows)
    yield "rows with", f"a system prompt: {prompts:,}; tools: {tools:,}{others}"
    if figures["tools"]:
        yield "calls", _frequent(figures["tools"])
    yield "scripts", _frequent(figures["scripts"])
    repeats = figures["repeats"]
    yield "repeated rows", _repeats(repeats["within_a_side"])
    if figures["rows_held_out"]:
        yield "held out, trained on", _repeats(repeats["across_the_split"])
    # a report of an earlier version has none
    if texts := figures.get("texts"):
        yield "signs", "; ".join(f"{name.replace('_', ' ')}: {_with_first(of)}" for name, of in texts.items())
    epoch = figures.get("epoch")
    if epoch and epoch["steps"]:
        text = f"{counted(epoch['steps'], 'step')} of {counted(epoch['batch_size'], 'row')}, "
        text += f"of about {epoch['tokens_per_step']:,} tokens each, packed into "
        text += f"{counted(epoch['micro_batches_per_step_at_least'], 'micro-batch', 'es')} or more"
        yield "an epoch", text
        run = counted(epoch["steps_of_the_run"], "step")
        yield "the run", f"{run}: {counted(epoch['epochs_of_the_run'], 'epoch')}"


def _objectives(files: Iterable[Mapping[str, Any]]) -> str:
    """Return the declared objectives, with their files if these differ; empty if none is declared."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(file.get("objective", str(ANSWERS)), []).append(_short(Path(file["path"]).name))
    if {*found} == {str(ANSWERS)}:
        return ""
    return "; ".join(f"{words} ({', '.join(names)})" if len(found) > 1 else words for words, names in found.items())


def _spread(values: Mapping[str, Any]) -> str:
    quantiles = ", ".join(f"{name} {values[name]:,}" for name in ("mean", "p50", "p95", "max"))
    return f"{values['total']:,}; {quantiles}"


def _frequent(counts: Mapping[str, int]) -> str:
    """Return the most frequent names with their counts; names of tools come from the rows, and may be anything."""
    shown = [f"{_short(name)} {count:,}" for name, count in list(counts.items())[:_MOST_NAMES]]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"and {more:,} more"] if more else [])]) or "none"


def _short(name: str) -> str:
    text = printable(name, lines=False)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _with_first(evidence: Mapping[str, Any]) -> str:
    """Return the number of rows that show a sign, and the name of the file and the line of the first."""
    return f"{evidence['rows']:,}, first {_short(Path(evidence['examples'][0]).name)}"


def _repeats(counts: Mapping[str, int | None]) -> str:
    words = {"same": "as they are", "another_form": "in another form", "near": "nearly"}
    return "; ".join(f"{text}: {counts[name]:,}" for name, text in words.items() if counts[name] is not None)


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
    yield from (f"a: {found.a}", f"b: {found.b}", f"facts: {len(found.facts)} differ")
    for group in GROUPS:
        chosen = [fact for fact in found.facts if fact.group == group]
        # a file with another hash mostly has another size, too: one line for it is enough
        hashed = {fact.path.removesuffix(".sha256") for fact in chosen if fact.path.endswith(".sha256")}
        shown = [fact for fact in chosen if fact.path.removesuffix(".size") not in hashed]
        yield from [group] if shown else []
        yield from (f"  {fact.path}: {_short_value(fact.a)} → {_short_value(fact.b)}" for fact in shown)
    tensors = found.tensors
    if isinstance(tensors, str):
        yield f"tensors: not compared: {tensors}"
    else:
        yield f"tensors: {tensors.different} of {tensors.compared} differ"
        rows = []
        for kind in tensors.kinds:
            figures = (f"{kind.max_abs:.3g}", f"{kind.relative:.3g}", f"{kind.cosine:.6f}")
            rows.append((kind.name, str(kind.tensors), str(kind.different), *figures))
        if tensors.different:
            titles = ("kind", "*tensors", "*differ", "*max abs", "*relative", "*cosine")
            yield from table_lines(titles, rows, width, wraps=False)
        yield from (f"  {name}: shape {list(a)} in a, {list(b)} in b" for name, a, b in tensors.reshaped)
        yield from (f"  {name}: only in a" for name in tensors.only_a)
        yield from (f"  {name}: only in b" for name in tensors.only_b)
    yield from _answer_lines(found.answers)


def _short_value(value: Any) -> str:
    if value is ABSENT:
        return "not recorded"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # a value of a foreign manifest must not reach the terminal as another line, or as a command
    return one_line(text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…")


def _answer_lines(answers: AnswersDiff | str) -> list[str]:
    if isinstance(answers, str):
        return [f"answers: not compared: {answers}"]
    lines = [f"answers: {len(answers.different)} of {answers.compared} differ"]
    for answer in answers.different:
        difference = {
            "question": "the two conversations differ",
            "prompt": "the same conversation has other prompt ids",
            "answer": f"from token {answer.token} on",
        }[answer.differs]
        lines += [f"  {answer.case}: {difference}", f"    a: {answer.a!r}", f"    b: {answer.b!r}"]
    lines += [f"  {case}: only in a" for case in answers.only_a]
    return lines + [f"  {case}: only in b" for case in answers.only_b]
