"""A Modelfile: the commands by which Ollama makes a model of a GGUF file or a folder.

The grammar is that of ollama/ollama, parser/parser.go: a command in any case, white space, and a value, which is the
rest of the line, or lies between quotes or three of them; a line that begins with # is a comment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

_COMMANDS = (
    "from",
    "adapter",
    "template",
    "system",
    "parameter",
    "message",
    "license",
    "draft",
    "renderer",
    "parser",
    "requires",
)
_ROLES = ("system", "user", "assistant")
_SPACES, _BREAKS, _QUOTES = " \t", "\r\n", '"""'


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a Modelfile.

    Attributes:
        name: Its word in lower case.
        value: Its value, without quotes; of `parameter` and `message` without the first word.
        line: The line where it begins, from 1.
        word: The first word of `parameter` and `message`: a name, or a role.
    """

    name: str
    value: str
    line: int
    word: str = ""


@dataclass(frozen=True)
class Modelfile:
    """The commands of a Modelfile, in order.

    Attributes:
        path: The file.
        commands: The commands.
    """

    path: Path
    commands: tuple[Command, ...] = field(default=())

    def last(self, name: str) -> Command | None:
        """Return the last command of a name, which is the one that counts; None if there is none."""
        return next((one for one in reversed(self.commands) if one.name == name), None)

    def parameters(self, name: str) -> list[Command]:
        """Return the settings of a parameter, in order."""
        return [one for one in self.commands if one.name == "parameter" and one.word.lower() == name]

    def place(self, command: Command | None) -> Place:
        """Return the place of a command; that of the file for None."""
        return Place.of(self.path, line=None if command is None else command.line)

    def file(self, command: Command | None) -> Path | None:
        """Return the path that `from` or `adapter` names, if it is on this machine; relative to the file's folder."""
        if command is None or not command.value:
            return None
        try:
            found = self.path.parent / Path(command.value).expanduser()
            return found if found.exists() else None
        except (OSError, RuntimeError, ValueError):
            return None  # a name of a model, or of a user that is not here


def read_modelfile(path: Path, text: str) -> Modelfile:
    """Return the commands of a Modelfile.

    Args:
        path: The file.
        text: Its text.

    Raises:
        InputError: If Ollama refuses the file, with the line.
    """
    found = Modelfile(path, tuple(_commands(path, text.removeprefix("\ufeff"))))
    if found.last("from") is None:
        expected = "FROM and the GGUF file, the folder or the model's name"
        raise InputError("has no FROM", place=str(path), expected=expected)
    return found


def _commands(path: Path, text: str) -> Iterator[Command]:
    at, line = 0, 1

    def error(found: str, expected: str) -> InputError:
        return InputError(found, place=Place.of(path, line=line), expected=expected)

    def word() -> str:
        nonlocal at
        start = at
        while at < len(text) and text[at] not in _SPACES + _BREAKS:
            at += 1
        return text[start:at]

    def skip(letters: str) -> None:
        nonlocal at, line
        while at < len(text) and text[at] in letters:
            line += text[at] == "\n"
            at += 1

    while True:
        skip(_SPACES + _BREAKS)
        if at >= len(text):
            return
        if text[at] == "#":
            at = _end_of_line(text, at)
            continue
        began, name = line, word().lower()
        if name not in _COMMANDS:
            raise error(f"begins with {name[:40]!r}", f"a command: {', '.join(one.upper() for one in _COMMANDS)}")
        first = ""
        if name in ("parameter", "message"):
            skip(_SPACES)
            first = word()
            if not first or (name == "message" and first not in _ROLES):
                expected = "a name and a value" if name == "parameter" else f"a role: {', '.join(_ROLES)}"
                raise error(f"{name.upper()} is followed by {first[:40]!r}", expected)
        skip(_SPACES)
        end = _end_of_value(text, at)
        if end is None:
            raise error(f"the quotes of {name.upper()} are not closed", f'{_QUOTES} or " at its end')
        value = text[at:end]
        if not value.strip():
            raise error(f"{name.upper()} has no value", "a value on its line")
        line += value.count("\n")
        at = end
        yield Command(name, _unquoted(value.strip()), began, first)


def _end_of_line(text: str, at: int) -> int:
    ends = [end for letter in _BREAKS if (end := text.find(letter, at)) >= 0]
    return min(ends, default=len(text))


def _end_of_value(text: str, at: int) -> int | None:
    """Return where a value ends: behind its closing quotes, which end a line; None if they are missing."""
    if text[at : at + 1] != '"':
        return _end_of_line(text, at)
    closing = _QUOTES if text.startswith(_QUOTES, at) else '"'
    end = at + len(closing)
    while (end := text.find(closing, end)) >= 0:
        end += len(closing)
        # quotes within a line are a part of the value
        if not text[end : _end_of_line(text, end)].strip(_SPACES):
            return end
    return None


def _unquoted(value: str) -> str:
    quotes = _QUOTES if value.startswith(_QUOTES) and len(value) >= 2 * len(_QUOTES) else '"'
    is_quoted = value.startswith(quotes) and value.endswith(quotes) and len(value) >= 2 * len(quotes)
    return value[len(quotes) : -len(quotes)] if is_quoted else value
