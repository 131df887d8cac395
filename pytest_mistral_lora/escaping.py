r"""Foreign text in our output: one function spells out what a terminal, a reader or a CI system would obey.

Names of files, texts of rows, answers of servers and errors of other programs may hold anything. Values stay unchanged
inside the program; they are spelled out where they leave it: `SafeStream` stands before both streams of the command
line, the plugin passes each line to `safe_text`, and JSON and XML have spellings of their own, which read back as the
same text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, cast

# Emoji, and the letters from Arabic to Myanmar: in them the joiners (U+200C, U+200D) are a part of the spelling
_JOINED = "\u0600-\u109f\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
# Every control character but tab and newline (Cc), every format character (Cf), the two separators of lines and
# paragraphs (Zl, Zp), and halves of a surrogate pair (Cs), which UTF-8 cannot write. A test compares the ranges with
# Python's own table; to build them from that table would take 0.1 s in each process.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
    f"|(?<![{_JOINED}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}])"
)
# GitHub obeys a line that begins with `::`, whatever white space is before it, and one that has `##[` anywhere; Azure
# `##vso[`, and TeamCity `##teamcity[`
_COMMAND = re.compile(r"^\s*::|##(?:vso|teamcity)?\[", re.IGNORECASE | re.MULTILINE)
_LONGEST_COMMAND = len("##teamcity[")
# a redrawn progress bar: tqdm returns to the beginning of the line, and moves between lines
_REDRAWN = re.compile(r"\r|(?:\n|\x1b\[A)+\Z")


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return a text in which characters that a terminal would obey, or a reader could not see, are spelled out.

    Args:
        text: The text.
        lines: Whether its newlines and tabs stay. A name or a place is one line: there they are spelled out, too.
    """
    if text.isprintable():
        return text
    text = _HIDDEN.sub(_spelled, text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def _spelled(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def in_block(text: str) -> str:
    """Return a printable text whose later lines are indented, so that none looks like a separate line."""
    return re.sub(r"\n(?!  |\n|$)", "\n  ", printable(text))


def safe_text(text: str) -> str:
    """Return the result of `printable`, in which no line is a command for a CI system."""
    return _COMMAND.sub(lambda found: found[0][:-1] + f"\\x{ord(found[0][-1]):x}", printable(text))


def safe_json(data: Any, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """Return data as JSON in which text stays readable, and no terminal obeys it.

    Args:
        data: The data; a value that JSON has no type for, such as a path, is written as its text.
        indent: Columns of a level; None for one line.
        allow_nan: Whether NaN and infinity are written, which strict parsers of JSON refuse.

    Raises:
        ValueError: If a number is NaN or infinite, and that is not allowed.
    """
    text = json.dumps(data, ensure_ascii=False, indent=indent, default=str, allow_nan=allow_nan)
    # JSON has these characters only in strings, where an escape means the same text
    escaped = _HIDDEN.sub(lambda found: json.dumps(found[0])[1:-1], text)
    return _COMMAND.sub(lambda found: found[0][:-1] + f"\\u{ord(found[0][-1]):04x}", escaped)


def in_markdown(text: str) -> str:
    """Return a text of ours as one line in which Markdown and HTML find no mark-up.

    It is not for foreign text, in which GitHub finds mentions, references and links after each escape: see `code_span`.
    """
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&@:$-])", r"\\\1", printable(" ".join(text.split())))


def code_span(text: str, *, in_table: bool = False) -> str:
    r"""Return a foreign text as a code span of Markdown: one line, in which GitHub looks for nothing.

    Outside code, GitHub makes mentions, references, links and emoji of a text once it is rendered, so an escape such
    as `\\@name` still notifies.

    Args:
        text: The text; only its white space is changed, and a long run of backticks is cut.
        in_table: Whether the span stands in a cell of a table, which a pipe would end.

    Returns:
        The span; empty for a text without characters, of which Markdown has no span.
    """
    text = _backticks_cut(printable(" ".join(text.split())))
    if not text:
        return ""
    if in_table:
        # a word joiner keeps a backslash apart from our own, since parsers differ on two before a pipe
        text = text.replace("\\|", "\\\u2060|").replace("|", "\\|")
    fence = "`" * (_longest_backticks(text) + 1)
    # Markdown removes one space on each side, without which a backtick at an end would belong to the fence
    return f"{fence} {text} {fence}" if text[0] == "`" or text[-1] == "`" else f"{fence}{text}{fence}"


def code_block(text: str) -> str:
    """Return a foreign text as a block of code of Markdown; its lines stay, and a long run of backticks is cut."""
    text = _backticks_cut(printable(text))
    fence = "`" * (_longest_backticks(text) + 3)
    return f"{fence}text\n{text}\n{fence}"


# GitHub's parser, cmark-gfm, takes no fence of more than 80 backticks around a span, and compares only 255 of a block's
_MOST_BACKTICKS = 40


def _backticks_cut(text: str) -> str:
    runs = f"`{{{_MOST_BACKTICKS + 1},}}"
    return re.sub(runs, lambda found: f"{found[0][:_MOST_BACKTICKS]}… ({len(found[0])} backticks)", text)


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


class SafeStream:
    """A text stream that writes each text by `safe_text`, even if a command comes in parts.

    On standard error, another library may still redraw a bar from the beginning of its line, if that is a terminal.
    Everything else is passed to the stream.

    Attributes:
        own: The stream itself, for our own control characters and commands: see `own_stream`.
    """

    def __init__(self, stream: TextIO, *, redraws: bool = False) -> None:
        """Make a stream.

        Args:
            stream: The stream to write to.
            redraws: Whether a write may begin with a return to the start of the line, if it is a terminal.
        """
        self.own = stream
        self._redraws = redraws
        # the unfinished line, without the white space at its beginning, cut to the longest command
        self._line = ""

    def write(self, text: str) -> int:
        """Write a text; return the number of its characters."""
        redrawn = _REDRAWN.match(text) if self._redraws and self.own.isatty() else None
        start = redrawn.end() if redrawn else 0
        # `:` and `:error::` written one after the other are a command, too
        shown = safe_text(self._line + text[start:])
        self.own.write(text[:start] + shown[len(self._line) :])
        line = shown.rpartition("\n")[2].lstrip()
        self._line = line if len(line) < _LONGEST_COMMAND else f".{line[-_LONGEST_COMMAND:]}"
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write some texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def own_stream(stream: TextIO) -> TextIO:
    """Return the stream behind a `SafeStream`, for colours, bars and workflow commands that we write ourselves.

    Make each foreign text in them safe before: see `printable`.
    """
    return getattr(stream, "own", stream)


UNMIXED: Mapping[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
"""Arguments of rich's bars: without them, rich wraps both streams, and obeys the colours of each text."""


@contextmanager
def safe_streams() -> Iterator[None]:
    """Put a `SafeStream` before standard output and standard error.

    They stay if the block ends in an error, since the interpreter's traceback may quote anything.
    """
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", SafeStream(own_stream(sys.stdout)))
    sys.stderr = cast("TextIO", SafeStream(own_stream(sys.stderr), redraws=True))
    try:
        yield
    except Exception:
        raise
    except BaseException:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before
