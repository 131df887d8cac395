"""Tokens in a terminal: who speaks, what is trained on, ids below the texts, and two encodings side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from pytest_mistral_lora.chat.token_rows import Column, ShownToken, TokenRow
from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.report.tokens import MOST, differences, ends_line, facts, glyphs, owner

Line = list[tuple[str, str]]
"""Parts of a line, each with its colour and weight as rich names them, or an empty text."""

PIPE_WIDTH = 100
"""Columns of the output that no terminal reads, so that it is the same everywhere."""

_LEAST_WIDTH = 40
_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
_AROUND = 3
"""Equal tokens that are shown on each side of a difference."""
_LONGEST = 24
_INDENT = " " * 7


def print_tokens(row: TokenRow, *, ids: bool = True) -> None:
    """Print a row of tokens to standard output; in colour if that is a terminal and NO_COLOR is not set.

    Args:
        row: The row, of one encoding or of two.
        ids: Whether the id of each token is printed below its text.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # thousands of rows may go into a file, and rich takes ten times as long as the encoder
        lines = ("".join(text for text, _ in line).rstrip() for line in token_lines(row, PIPE_WIDTH, ids=ids))
        console.file.write("".join(f"{line}\n" for line in lines))
        return
    for line in token_lines(row, max(console.width, _LEAST_WIDTH), ids=ids):
        text = Text.assemble(*line)
        text.rstrip()
        console.print(text, end="\n")


def token_lines(row: TokenRow, width: int, *, ids: bool = True) -> Iterator[Line]:
    """Yield the lines of a row of tokens.

    The text of a row is printed with visible white space, and without a character that a terminal would obey.

    Args:
        row: The row, of one encoding or of two.
        width: Columns of the terminal.
        ids: Whether the id of each token is printed below its text.
    """
    yield [(one_line(row.title, MOST), "bold")]
    yield from ([(f"  {words}", "dim")] for words in facts(row))
    if len(row.sides) > 1 or row.wrong:
        yield [(f"  {differences(row) or 'no difference'}", "bold red" if row.wrong else "green")]
    yield from _single(row, width, ids) if len(row.sides) == 1 else _side_by_side(row, width)


def _single(row: TokenRow, width: int, ids: bool) -> Iterator[Line]:
    for start, columns in row.parts():
        yield [(f"{start:>5}  ", "dim"), (owner(columns), f"bold {_colour(columns[0])}".strip())]
        for group in _lines_of(columns, width - len(_INDENT), ids):
            above: Line = [(_INDENT, "")]
            for column, (text, _), wide in group:
                above += [(text, _style(column)), (" " * (wide - cell_len(text) + 1), "")]
            yield above
            if ids:
                yield [(_INDENT, ""), (" ".join(number.ljust(wide) for _, (_, number), wide in group), "dim")]
            for column, _, _ in group:
                if column.expected:
                    yield [(f"{_INDENT}^ {one_line(f'expected {column.expected}', MOST)}", "red")]


def _lines_of(columns: Iterable[Column], width: int, ids: bool) -> Iterator[list[tuple[Column, tuple[str, str], int]]]:
    """Yield the columns of each line, with its two cells and their width: a line ends at a newline of the text."""
    line: list[tuple[Column, tuple[str, str], int]] = []
    used = 0
    for column in columns:
        token = column.tokens[0]
        cells = (_text_of(token), "" if token is None else str(token.id))
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
    table = _Table([_cells(column) for column in row.columns], [one_line(name) for name in row.sides], width)
    yield table.line(None, "bold", "bold")
    last = None
    for number, shown in _near_differences(row.columns):
        if not shown:
            yield [(f"    … {number} equal tokens", "dim")]
            continue
        column = row.columns[number]
        if (column.turn, column.role) != last:
            last = (column.turn, column.role)
            name = "beginning" if column.turn is None else f"turn {column.turn}: {column.role}"
            yield [(f"  {name}", f"bold {_colour(column)}".strip())]
        line = table.line(number, _style(column))
        yield [*line, ("  ← first difference", "bold red")] if number == row.first_wrong else line


class _Table:
    """The columns of two encodings side by side; a narrow terminal has those of texts and ids alone."""

    def __init__(self, rows: Sequence[tuple[str, ...]], names: Sequence[str], width: int) -> None:
        self._rows = rows
        self._heads = ("", "token", "id", names[0], "loss", "", "token", "id", names[1], "loss")
        self._widths = [max(map(cell_len, (head, *(row[n] for row in rows)))) for n, head in enumerate(self._heads)]
        self._chosen: Sequence[int] = range(10)
        if sum(self._widths) + 2 * 10 > width:
            self._chosen = (0, 2, 3, 5, 7, 8)

    def line(self, number: int | None, style: str, other: str = "dim") -> Line:
        """Return the line of a column of tokens, or that of the heads."""
        cells = self._heads if number is None else self._rows[number]
        line: Line = [("  ", "")]
        for one in self._chosen:
            padding = " " * (self._widths[one] - cell_len(cells[one]))
            # the numbers of tokens and ids end in one column
            text = padding + cells[one] if one % 5 in (1, 2) else cells[one] + padding
            line += [(text, {0: "bold red", 3: style}.get(one % 5, other)), ("  ", "")]
        return line[:-1]


def _near_differences(columns: Sequence[Column]) -> Iterator[tuple[int, bool]]:
    """Yield the index of each column to show and True; for a run of equal ones that is left out, its length, False."""
    wrong = [number for number, column in enumerate(columns) if column.mark]
    shown = {near for number in wrong for near in range(number - _AROUND, number + _AROUND + 1)}
    # a line that says that one token is left out takes as much room as the token
    shown |= {number for number in range(len(columns)) if {number - 1, number + 1} <= shown | {-1, len(columns)}}
    skipped = 0
    for number in range(len(columns)):
        if number in shown:
            if skipped:
                yield skipped, False
                skipped = 0
            yield number, True
        else:
            skipped += 1
    if skipped:
        yield skipped, False


def _cells(column: Column) -> tuple[str, ...]:
    cells: list[str] = []
    for number, token in enumerate(column.tokens):
        mark = column.mark if number == 0 else ""
        known = token is not None
        cells += [mark, str(token.position) if token else "", str(token.id) if token else ""]
        cells += [_text_of(token) if known else "", token.label if token else ""]
    return tuple(cells)


def _text_of(token: ShownToken | None) -> str:
    shown = "∅" if token is None else glyphs(token.piece)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _style(column: Column) -> str:
    tokens = [token for token in column.tokens if token is not None]
    parts = [_colour(column) if not column.mark else "red"]
    parts += ["bold"] * any(token.control for token in tokens)
    parts += ["underline"] * any(token.trained for token in tokens)
    parts += ["reverse"] * bool(column.mark)
    return " ".join(filter(None, parts))


def _colour(column: Column) -> str:
    return _COLOURS.get(column.role or "", "")
