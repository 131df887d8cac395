"""The figures of a dataset as text: a line for summaries, and tables with a histogram of lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.report import table_lines

if TYPE_CHECKING:
    from rich.table import Table

_MOST_NAMES = 12
_LONGEST_NAME = 40
_BAR = 40


def statistics_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of each dataset among the records of checks, by target."""
    chosen = (one for one in records if (one["subject"], one["case"]) == ("dataset", "statistics"))
    return {one["target"]: one["facts"] for one in chosen if one["facts"].get("rows")}


def statistics_line(figures: Mapping[str, Any]) -> str:
    """Return the most important figures in one line."""
    tokens = figures["tokens"]
    text = f"{_counted(figures['rows'], 'row')}, {_counted(tokens['total'], 'token')} "
    text += f"({figures['supervised_share']:.0%} supervised; p50 {tokens['p50']:,}, p95 {tokens['p95']:,}, "
    text += f"longest {figures['longest_row_tokens']:,} at {figures['longest_row']})"
    epoch = figures.get("epoch")
    return text + (f", {_counted(epoch['steps'], 'step')} an epoch" if epoch else "")


def summary_lines(records: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    """Yield the lines of a table of figures for each dataset among the records of checks."""
    for target, figures in statistics_of(records).items():
        yield f"figures of {target}:"
        yield from figure_lines(figures, width)


def figure_lines(figures: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a table of everything but lengths, for a terminal of this width."""
    yield from table_lines(_table(("", ""), named_figures(figures)), width)
    if len(figures["files"]) > 1:
        titles = ("file", "*rows", "*refused", "*dropped", "*tokens", "*supervised")
        yield from table_lines(_table(titles, map(_file, figures["files"])), width)


def length_lines(figures: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the lines of a table of cuts, and of a histogram, for a terminal of this width."""
    from rich.bar import Bar

    table = _table(("*max_length", "*rows cut", "*", "*tokens cut", "*"), ())
    tokens, rows = figures["tokens_of_whole_rows"]["total"], sum(one["rows"] for one in figures["histogram"])
    for one in figures["cuts"]:
        cut = (f"{one['max_length']:,}", f"{one['rows']:,}", _share(one["rows"], rows))
        table.add_row(*cut, f"{one['tokens']:,}", _share(one["tokens"], tokens))
    yield from table_lines(table, width)
    table = _table(("*tokens", "*rows", ""), ())
    most = max((one["rows"] for one in figures["histogram"]), default=0)
    for one in figures["histogram"]:
        table.add_row(f"{one['from']:,}-{one['to']:,}", f"{one['rows']:,}", Bar(most, 0, one["rows"], width=_BAR))
    yield from table_lines(table, width)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; a title that begins with an asterisk is of a column of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(titles))
    for title in titles:
        table.add_column(title.lstrip("*"), justify="right" if title.startswith("*") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def named_figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each figure, and its value in words."""
    sides = [f"{figures['rows_trained_on']:,} trained on", f"{figures['rows_held_out']:,} held out"]
    lost = [f"{figures[f'rows_{name}']:,} {name}" for name in ("refused", "dropped") if figures[f"rows_{name}"]]
    yield (
        "rows",
        f"{figures['rows']:,}"
        + f" ({', '.join([*(sides if figures['rows_held_out'] else ()), *lost])})"
        * (bool(figures["rows_held_out"] or lost)),
    )
    yield "turns", f"{_counted(figures['messages'], 'message')}, {_counted(figures['assistant_turns'], 'answer')}"
    yield "tokens", _spread(figures["tokens"])
    yield "supervised", f"{_spread(figures['supervised_tokens'])}; {figures['supervised_share']:.1%} of all tokens"
    if figures["longest_row"]:
        yield "longest row", f"{_counted(figures['longest_row_tokens'], 'token')}: {figures['longest_row']}"
    yield "roles", _named(figures["roles"])
    prompts, tools = figures["rows_with_system_prompt"], figures["rows_with_tools"]
    yield "rows with", f"a system prompt: {prompts:,}; tools: {tools:,}"
    if figures["tools"]:
        yield "calls", _named(figures["tools"])
    yield "scripts", _named(figures["scripts"])
    repeats = figures["repeats"]
    yield "repeated rows", _repeats(repeats["within_a_side"])
    if figures["rows_held_out"]:
        yield "held out, trained on", _repeats(repeats["across_the_split"])
    epoch = figures.get("epoch")
    if epoch and epoch["steps"]:
        text = f"{_counted(epoch['steps'], 'step')} of {_counted(epoch['batch_size'], 'row')}, "
        text += f"of about {epoch['tokens_per_step']:,} tokens each, packed into "
        text += f"{_counted(epoch['micro_batches_per_step_at_least'], 'micro-batch', 'es')} or more"
        yield "an epoch", text
        run = _counted(epoch["steps_of_the_run"], "step")
        yield "the run", f"{run}: {_counted(epoch['epochs_of_the_run'], 'epoch')}"


def _file(file: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (file[name] for name in ("rows", "refused", "dropped", "tokens", "supervised_tokens"))
    name = f"{Path(file['path']).name}{' (held out)' if file['held_out'] else ''}"
    return (_printable(name), *(f"{number:,}" for number in numbers))


def _spread(values: Mapping[str, Any]) -> str:
    quantiles = ", ".join(f"{name} {values[name]:,}" for name in ("mean", "p50", "p95", "max"))
    return f"{values['total']:,}; {quantiles}"


def _named(counts: Mapping[str, int]) -> str:
    """Return the most frequent names with their counts; names of tools come from the rows, and may be anything."""
    shown = [f"{_printable(name)} {count:,}" for name, count in list(counts.items())[:_MOST_NAMES]]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"and {more:,} more"] if more else [])]) or "none"


def _printable(name: str) -> str:
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _repeats(counts: Mapping[str, int | None]) -> str:
    words = {"same": "as they are", "another_form": "in another form", "near": "nearly"}
    return "; ".join(f"{text}: {counts[name]:,}" for name, text in words.items() if counts[name] is not None)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _counted(number: float, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
