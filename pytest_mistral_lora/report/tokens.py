"""Tokens in words and in a terminal: turns, roles, labels, ids, and two encodings side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from pytest_mistral_lora.chat.diff import ShownToken
from pytest_mistral_lora.chat.pieces import plain_text, visible
from pytest_mistral_lora.chat.token_rows import Column, TokenRow
from pytest_mistral_lora.errors import counted, one_line
from pytest_mistral_lora.escaping import own_stream, safe_text

Line = list[tuple[str, str]]
"""Parts of a line, each with its colour and weight as rich names them, or an empty text."""

MOST = 500
"""Characters of a title or a note; a longer one is cut."""

PIPE_WIDTH = 100
"""The width of output that does not go to a terminal, so that it is the same everywhere."""

_LEAST_WIDTH = 40
_COLOURS = {None: "", "system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
_LABELS = {"": "", "-100": "not trained on", "train": "trained on", "?": "no label"}
_AROUND = 3
"""The number of equal tokens to show on each side of a difference."""
_LONGEST = 24
_INDENT = " " * 7


def glyphs(piece: str) -> str:
    """Return a piece of a vocabulary as its text, with visible spaces and newlines."""
    return visible(plain_text(piece)) or "∅"


def label_words(label: str) -> str:
    """Return the label of a token in words."""
    return _LABELS.get(label) or label.replace("train ", "trained on as id ")


def facts(row: TokenRow) -> list[str]:
    """Return the numbers of tokens of each encoding of a row, in words."""
    lines = []
    for name, tokens, trained in row.counts():
        supervised = "labels not known" if trained is None else f"{trained:,} trained on"
        lines.append(f"{one_line(name, MOST)}: {counted(tokens, 'token')}, {supervised}")
    return lines


def differences(row: TokenRow) -> str:
    """Return the number of tokens that differ, and the place of the first, in words; empty if all are equal."""
    if row.first_wrong is None:
        return ""
    first = next((token.position for token in row.columns[row.first_wrong].tokens if token is not None), None)
    return f"{counted(row.wrong, 'difference')}, the first at {'the end' if first is None else f'token {first}'}"


def owner(columns: Sequence[Column]) -> str:
    """Return the owner of some tokens, and whether they are trained on, in words."""
    first = columns[0]
    if first.turn is None:
        is_start = len(columns) == 1 and any(token is not None and token.position == 0 for token in first.tokens)
        is_trained = any(token is not None and token.trained for token in first.tokens)
        # without turns, the labels tell what the model is to write
        name = "answer" if is_trained else "beginning" if is_start else "prompt"
    else:
        name = f"turn {first.turn}: {first.role}"
    label = next((token.label for token in first.tokens if token is not None), "")
    return ", ".join(filter(None, (name, label_words(label))))


def ends_line(column: Column) -> bool:
    """Return whether a line of the text ends with a column."""
    return any(token is not None and "\n" in plain_text(token.piece) for token in column.tokens)


def print_tokens(row: TokenRow, *, ids: bool = True) -> None:
    """Print a row of tokens to standard output; in colour if it is a terminal and NO_COLOR is not set.

    Args:
        row: The row, of one encoding or of two.
        ids: Whether the id of each token is printed below its text.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=own_stream(sys.stdout), highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # thousands of rows may go into a file, and rich takes ten times as long as the encoder
        lines = ("".join(text for text, _ in line).rstrip() for line in token_lines(row, PIPE_WIDTH, ids=ids))
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return
    for line in token_lines(row, max(console.width, _LEAST_WIDTH), ids=ids):
        text = Text.assemble(*((safe_text(part), style) for part, style in line))
        text.rstrip()
        console.print(text, end="\n")


def token_lines(row: TokenRow, width: int, *, ids: bool = True) -> Iterator[Line]:
    """Yield the lines of a row of tokens.

    The text of a row is printed with visible white space, and without characters that a terminal would obey.

    Args:
        row: The row, of one encoding or of two.
        width: Columns of the terminal.
        ids: Whether the id of each token is printed below its text.
    """
    yield [(one_line(row.title, MOST), "bold")]
    yield from ([(f"  {words}", "dim")] for words in facts(row))
    if len(row.sides) > 1:
        yield [(f"  {differences(row) or 'no difference'}", "bold red" if row.wrong else "green")]
        yield from _side_by_side(row, width)
        return
    for start, columns in row.parts():
        yield [(f"{start:>5}  ", "dim"), (owner(columns), f"bold {_COLOURS.get(columns[0].role, '')}".strip())]
        for group in _wrapped(columns, width - len(_INDENT), ids):
            above: Line = [(_INDENT, "")]
            for column, (text, _), wide in group:
                above += [(text, _style(column)), (" " * (wide - cell_len(text) + 1), "")]
            yield above
            if ids:
                yield [(_INDENT, ""), (" ".join(number.ljust(wide) for _, (_, number), wide in group), "dim")]


def _wrapped(columns: Iterable[Column], width: int, ids: bool) -> Iterator[list[tuple[Column, tuple[str, str], int]]]:
    """Yield the columns of each line, with its two cells and their width: a line ends at a newline of the text."""
    line: list[tuple[Column, tuple[str, str], int]] = []
    used = 0
    for column in columns:
        token = column.tokens[0]
        cells = (_cut_glyphs(token), "" if token is None else str(token.id))
        wide = max(map(cell_len, cells if ids else cells[:1]))
        if line and used + wide > width:
            yield line
            line, used = [], 0
        line.append((column, cells, wide))
        used += wide + 1
        if ends_line(column):
            yield line
            line, used = [], 0
    if line:
        yield line


def _side_by_side(row: TokenRow, width: int) -> Iterator[Line]:
    if row.first_wrong is None:
        return
    wrong = [number for number, column in enumerate(row.columns) if column.mark]
    near = {place for number in wrong for place in range(number - _AROUND, number + _AROUND + 1)}
    # a line that reports one omitted token takes as much room as the token
    ends = {-1, len(row.columns)}
    near |= {number for number in range(len(row.columns)) if {number - 1, number + 1} <= near | ends}
    head, *lines = _pair_lines(row, width)
    yield head
    last, skipped = None, 0
    for number, column in enumerate(row.columns):
        if number not in near:
            skipped += 1
            continue
        if skipped:
            yield [(f"    … {skipped} equal tokens", "dim")]
            skipped = 0
        if (column.turn, column.role) != last:
            last = (column.turn, column.role)
            is_start = any(token is not None and token.position == 0 for token in column.tokens)
            unowned = "beginning" if is_start else "no turn"
            name = unowned if column.turn is None else f"turn {column.turn}: {column.role}"
            yield [(f"  {name}", f"bold {_COLOURS.get(column.role, '')}".strip())]
        yield [*lines[number], *([("  ← first difference", "bold red")] if number == row.first_wrong else [])]
    if skipped:
        yield [(f"    … {skipped} equal tokens", "dim")]


def _pair_lines(row: TokenRow, width: int) -> Iterator[Line]:
    """Yield the line of the heads, and a line for each column; a narrow terminal shows only texts and ids."""
    first, second = (one_line(name) for name in row.sides)
    table: list[tuple[str, ...]] = [("", "token", "id", first, "loss", "", "token", "id", second, "loss")]
    for column in row.columns:
        cells: tuple[str, ...] = ()
        for mark, token in zip((column.mark, ""), column.tokens, strict=True):
            numbers = (str(token.position), str(token.id)) if token else ("", "")
            cells += (mark, *numbers, _cut_glyphs(token) if token else "", token.label if token else "")
        table.append(cells)
    widths = [max(cell_len(cells[number]) for cells in table) for number in range(10)]
    chosen = range(10) if sum(widths) + 2 * 10 <= width else (0, 2, 3, 5, 7, 8)
    styles = [("bold", "bold"), *((_style(column), "dim") for column in row.columns)]
    for cells, (style, other) in zip(table, styles, strict=True):
        line: Line = [("  ", "")]
        for number in chosen:
            padding = " " * (widths[number] - cell_len(cells[number]))
            # right-align the numbers of tokens and ids
            text = padding + cells[number] if number % 5 in (1, 2) else cells[number] + padding
            line += [(text, {0: "bold red", 3: style}.get(number % 5, other)), ("  ", "")]
        yield line[:-1]


def _cut_glyphs(token: ShownToken | None) -> str:
    shown = "∅" if token is None else glyphs(token.piece)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _style(column: Column) -> str:
    tokens = [token for token in column.tokens if token is not None]
    parts = ["red" if column.mark else _COLOURS.get(column.role, "")]
    parts += ["bold"] * any(token.control for token in tokens)
    parts += ["underline"] * any(token.trained for token in tokens)
    parts += ["reverse"] * bool(column.mark)
    return " ".join(filter(None, parts))
