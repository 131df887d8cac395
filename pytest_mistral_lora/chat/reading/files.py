"""Files that a user names: opened safely, read within bounds, and parsed strictly as JSON or JSON Lines."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pytest_mistral_lora.chat.container import LINES, Container, container_of
from pytest_mistral_lora.chat.fields import is_utf8
from pytest_mistral_lora.chat.reading import limits
from pytest_mistral_lora.chat.remedies import container_step, encoded_step, import_step, json_step, utf8_step
from pytest_mistral_lora.errors import InputError, RowError, did_you_mean, in_brackets, one_line
from pytest_mistral_lora.places import NOWHERE, Place

JSON_LIMIT = 16 << 20
"""Largest JSON file that is read, in bytes: real configurations and manifests have a few thousand."""
PATTERN_SECONDS = 5.0
"""The time limit for the patterns of a foreign file, in seconds."""


_LARGE = 1 << 20


class _RefusedError(ValueError):
    """JSON that parses, but has no single meaning."""


def loads_strict(text: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN, infinities and numbers too large (RFC 8259 leaves all of them open).

    Raises:
        ValueError: If the text is not JSON, or is refused; the message is fit for a user.
    """
    try:
        if text.startswith("\ufeff"):
            return json.loads(text)  # its error names the byte order mark
        # the hook for integers takes most of the time of a row of ids, and matters for a very long one alone
        return (STRICT if _has_long_number(text) else _WITH_SHORT_NUMBERS).decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {fault_of(error)} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error


def _has_long_number(text: str) -> bool:
    # so many digits have a part of 16 at a multiple of 300: the pattern alone takes a tenth of the time of a row of ids
    is_likely = any(text[at : at + 16].isdigit() for at in range(0, len(text), 300))
    return is_likely and _LONG_NUMBER.search(text) is not None


def fault_of(error: json.JSONDecodeError) -> str:
    """Return a common fault in a user's words."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    # the place is the bracket before Python 3.13, and the comma from then on
    at_comma = before.endswith(",") or after.startswith(",")
    if error.msg != "Extra data" and at_comma and after.removeprefix(",").lstrip()[:1] in ("}", "]"):
        return "a trailing comma"
    if error.msg == "Extra data" and after.startswith(","):
        return "a comma behind the object, which ends with its line,"
    if error.msg == "Extra data" and after.startswith(("{", "[")):
        return "a second value on the line"
    if after.startswith("'") or (before.endswith("{") and after.startswith("'")):
        return "single quotes, as Python prints a dict,"
    if after.startswith(("\u201c", "\u201d", "\u201e")):
        return "typographic quotes, as word processors write them,"
    if "UTF-8 BOM" in error.msg:
        return "a byte order mark in the middle of the file, as joined files have,"
    if after.startswith(("True", "False", "None")):
        return "a constant of Python, not of JSON,"
    return error.msg.removesuffix(" at")  # the place follows


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {key!r} appears twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not a JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _RefusedError(f"{digits} is too large a number")
    return number


def _readable_int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        # int() refuses more than 4,300 digits by default (CVE-2020-10735): the time grows with their square
        raise _RefusedError(f"a number has {len(digits)} characters, which is too many to read") from error


_HOOKS: dict[str, Any] = {
    "object_pairs_hook": _unique_keys,
    "parse_constant": _no_constant,
    "parse_float": _finite_float,
    "parse_int": _readable_int,
}
_LONG_NUMBER = re.compile(r"\d{600}")
STRICT = json.JSONDecoder(**_HOOKS)
"""The decoder of `loads_strict`, for a value with others behind it."""
_WITH_SHORT_NUMBERS = json.JSONDecoder(**{name: hook for name, hook in _HOOKS.items() if name != "parse_int"})


_LONGEST_PATH = 500
"""Characters of a path that a message shows."""


def _shown_path(path: str) -> str:
    return path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}… ({len(path):,} characters)"


def path_of(given: Any, expected: str, *, place: Place = NOWHERE) -> Path:
    """Return the path that an argument of a Python function gives, whether or not anything is there.

    Args:
        given: The argument.
        expected: What the path should name.
        place: The name of the argument; empty if the message needs none.

    Raises:
        InputError: If it is not a text or a path, or no file system has such a path.
    """
    try:
        text = os.fspath(given)
    except TypeError:
        text = given
    if not isinstance(text, str):
        raise InputError(
            f"no path{in_brackets(given)}: {type(given).__name__}", place=place, expected=f"the path of {expected}"
        )
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:  # a null character, half a surrogate pair
        found = f"{_shown_path(text)}: no such file or folder"
        raise InputError(found, place=place, expected=f"the path of {expected}") from error
    except OSError as error:  # a name that is too long
        found = f"{_shown_path(text)}: {error.strerror}"
        raise InputError(found, place=place, expected=f"the path of {expected}") from error
    return Path(text)


def existing_path(given: Any, expected: str, *, folder: bool | None = None) -> Path:
    """Return the path that an argument gives: of a folder, of a file, or of either if `folder` is None.

    Raises:
        InputError: If it is not a path, cannot be read, or is something else than expected.
    """
    path = path_of(given, expected)
    try:
        found = "" if path.exists() else "no such file or folder"
        if not found and not os.access(path, os.R_OK):
            found = "cannot be read: permission denied"
        if not found and not ((path.is_file() and not folder) or (path.is_dir() and folder is not False)):
            if path.is_dir():
                found = "a folder"
            elif path.is_file():
                found = "a file"
            else:
                found = "not a regular file"
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
    if found:
        raise InputError(found, place=str(path), expected=expected)
    return path


def similar_path(path: Path, names: Iterable[str] = ()) -> str:
    """Return ` (did you mean 'PATH'?)` for a missing path, by the names beside its first missing part; may be empty.

    Args:
        path: The missing path.
        names: Other right names, such as those of shipped tokenizers.
    """
    missing, rest = path, list[str]()
    while not missing.parent.is_dir() and missing.parent != missing:
        rest.insert(0, missing.name)
        missing = missing.parent
    try:
        beside = [file.name for file in missing.parent.iterdir()]
    except OSError:  # it may not be listed
        beside = []
    similar = get_close_matches(missing.name.lower(), {name.lower(): name for name in beside if name != missing.name})
    by_lower = {name.lower(): name for name in beside}
    found = [missing.parent.joinpath(by_lower[name], *rest) for name in similar]
    there = next((one for one in found if one.exists()), None)
    return did_you_mean(str(path), names) if there is None else f" (did you mean {str(there)!r}?)"


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """Yield a path for a library that takes only names in UTF-8; for most paths, the path itself.

    For a name with other bytes it is the name of an open descriptor of the file or the folder.
    """
    if is_utf8(str(path)):
        yield path
        return
    named, inside = path.absolute(), list[str]()
    while is_utf8(named.name):
        inside.insert(0, named.name)
        named = named.parent
    descriptor = os.open(named, getattr(os, "O_PATH", os.O_RDONLY))
    try:
        yield Path(f"/dev/fd/{descriptor}", *inside)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: As for `read_bounded` and `parse_json`.
    """
    return parse_json(read_bounded(path), path)


def is_folder(name: str) -> bool:
    """Return whether a text of a file names a folder of this machine; False for a name that no file system has."""
    return os.path.isdir(name)  # noqa: PTH112, Path raises for a name that is too long


def read_toml(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        error: The class of the error.

    Raises:
        InputError: If it cannot be read, or is not TOML in UTF-8.
    """
    try:
        with opened(path) as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as reason:
        raise error(f"not valid TOML: {reason}", place=str(path)) from reason
    except OSError as reason:
        raise error(f"cannot be read: {reason.strerror}", place=str(path)) from reason


def opened(path: Path) -> BufferedReader:
    """Open a user's file for reading: every path that somebody else wrote is opened here.

    A pipe or a device is not opened: a pipe keeps its reader waiting, and some devices act when they are opened.

    Raises:
        InputError: If it is not a regular file, or no file system has such a path.
        OSError: If it cannot be opened.
    """
    try:
        _require_regular(path.stat(), path)
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115, the caller closes it
    except ValueError as error:  # a NUL in the path
        raise InputError(f"cannot be read: {error}", place=str(path)) from error
    try:
        _require_regular(os.fstat(file.fileno()), path)  # the file may have been replaced since then
    except InputError:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _require_regular(status: os.stat_result, path: Path) -> None:
    # a folder is refused by `open`, as "Is a directory"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError("is not a regular file", place=str(path), expected="a file")


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Yield a file, open for reading; a system error on it becomes an error of the file.

    Raises:
        InputError: As for `opened`, or if it cannot be read.
    """
    with _errors_named(path), opened(path) as file:
        yield file


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # also while it is read: from a damaged disk, or a network that is gone
        raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from error


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a JSON file.

    Raises:
        InputError: If the file cannot be read, or has more than `JSON_LIMIT` bytes.
    """
    with open_regular(path) as file:
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise InputError("too large to be one", place=str(path), expected=f"at most {JSON_LIMIT >> 20} MiB of JSON")
    return data


def parse_json(data: bytes, path: Path) -> Any:
    """Parse JSON bytes that were read from a file.

    Raises:
        InputError: If they are not JSON in UTF-8, or `loads_strict` refuses them; `path` is the place.
    """
    try:
        value = loads_strict(data.decode())
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be printed
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}" if isinstance(error, UnicodeError) else str(error)
        raise InputError(reason, place=str(path), expected="JSON in UTF-8") from error
    return value


def scan_jsonl(path: Path, *, encoded: bool = False) -> Iterator[tuple[int, Any] | RowError]:
    """Yield `(line number, value)` for each line, or the error that makes the line unreadable.

    Line numbers count from 1. Blank lines and a UTF-8 byte order mark carry no row and are skipped.

    Raises:
        InputError: If the file cannot be opened.
    """
    for number, line in scan_lines(path, encoded=encoded):
        item = read_line(path, number, line)
        if item is not None:
            yield item


def scan_lines(path: Path, *, encoded: bool = False) -> Iterator[tuple[int, bytes | int]]:
    """Yield `(line number, bytes)` for each line, for `read_line` to parse; its size for a line that is too large.

    Args:
        path: The file.
        encoded: Whether it should hold encoded rows: the next step for a file that is not JSON Lines is then not the
            command that converts chat rows.

    Raises:
        InputError: If the file cannot be opened, or is in another format.
    """
    try:
        file = opened(path)
    except OSError as error:
        step = encoded_step(None, path) if encoded else import_step(str(path))
        step = step if isinstance(error, IsADirectoryError) else ""
        raise InputError(f"cannot be read: {error.strerror}", place=str(path), next_step=step) from error
    with file, _errors_named(path):
        container = container_of(file.peek(), path)
        if container != Container(LINES):
            raise InputError(
                f"this is {container.title}",
                place=str(path),
                expected="JSON Lines in UTF-8: one object a line",
                next_step=(encoded_step if encoded else container_step)(container, path),
            )
        yield from lines_of(file)


def first_values(path: Path, most: int = 20) -> list[Any]:
    """Return the values of the first lines of a JSON Lines file, without unreadable lines.

    Raises:
        InputError: If the file cannot be opened, or is in another format.
    """
    return [item[1] for item in islice(scan_jsonl(path), most) if not isinstance(item, RowError)]


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes | int]]:
    """Yield `(line number, bytes)` for each line of an open file, as `scan_lines` does."""
    number, most = 0, limits.MAX_ROW_BYTES
    while line := file.readline(most + 1):
        number += 1
        if len(line) <= most or line.endswith(b"\n"):
            yield number, line
            continue
        # The rest of a line that is too long is read and thrown away, so that the next line keeps its number.
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = file.readline(_LARGE)
            size += len(line)
        yield number, size


def read_line(path: Path, number: int, line: bytes | int | RowError) -> tuple[int, Any] | RowError | None:
    """Return the number and value of a line of `scan_lines`, or its error, or None if it is blank."""
    if isinstance(line, RowError):
        return line
    place = Place.of(path, number)
    if isinstance(line, int):
        return limits.row_too_large(line, place)
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        return (number, loads_strict(text)) if text.strip() else None
    except UnicodeDecodeError as error:
        found = f"not valid UTF-8 at byte {error.start + 1} of the line"
        return RowError(found, place=place, next_step=utf8_step(path))
    except ValueError as error:
        return RowError(str(error), place=place, next_step=json_step(str(error)))


def answer_in_time(code: str, given: Any) -> Any:
    """Return the JSON that our code prints for a JSON value on its input, in a process that may take 5 seconds.

    A pattern of a foreign file may backtrack for years, and no thread can be stopped in the middle of a match.

    Raises:
        TimeoutError: If it takes longer.
        ValueError: If it fails, with the last line of its error.
    """
    # isolated (-I): neither the environment nor the working folder decides what it imports
    command = [sys.executable, "-I", "-c", code]
    try:
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, timeout=PATTERN_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"takes more than {PATTERN_SECONDS:g} s") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(one_line(error.stderr.strip().rpartition("\n")[2])) from error
    return json.loads(done.stdout)
