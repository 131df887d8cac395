"""The next step, a command to paste, for data that cannot be read as it is."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.container import ARRAY, PARQUET, VALUES, Container
from pytest_mistral_lora.chat.foreign_fields import CALL, CONTENT, FLAGS, OTHER_ROLES, THOUGHTS
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place, file_of

_ENCODED = "encoded.jsonl"
_UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc"}


def import_step(path: str) -> str:
    """Return the sentence with the command that converts a file."""
    # never overwrite the source
    to = "converted.jsonl" if Path(path).name == "rows.jsonl" else "rows.jsonl"
    return f"Convert it: mistral-lora import {shlex.quote(path) if path else 'FILE'} --to {to}"


def import_command(origin: Place, *options: str) -> str:
    """Return the command that converts the file of a row.

    Args:
        origin: The place of the row; empty for a row made in code.
        options: Options of the command.
    """
    path = file_of(origin)
    return " ".join([import_step(path).removeprefix("Convert it: "), *options])


_MEANT = {
    **dict.fromkeys(("agent", "ai", "bot", "chatbot", "llm", "machine", "reply", "response"), "assistant"),
    **dict.fromkeys(("client", "customer", "person", "prompt", "prompter", "question"), "user"),
}
"""Names of roles that no format has, and the role that a user means by each."""


def role_step(role: Any, origin: Place, roles: Collection[str]) -> str:
    """Return the sentence on a wrong role: its conversion if another format has it, or the role that is meant.

    Args:
        role: The role.
        origin: The place of the row.
        roles: The right roles.

    Returns:
        The sentence; empty if no role is similar.
    """
    if not isinstance(role, str):
        return ""
    if role not in OTHER_ROLES:
        meant = _MEANT.get(role.strip().lower()) or next(iter(difflib.get_close_matches(role.lower(), roles, n=1)), "")
        return f"Did you mean {meant!r}?" if meant else ""
    ours = "assistant" if OTHER_ROLES[role] == CALL else OTHER_ROLES[role]
    return f"To make it {ours!r}: {import_command(origin)}"


def field_step(name: Any, origin: Place, known: Collection[str]) -> str:
    """Return the sentence on the conversion of a field of a message, or on leaving it out.

    Args:
        name: The field.
        origin: The place of the row.
        known: The fields that a message of its role may have; a name like one of them is misspelt, and not left out.
    """
    fields = {
        tuple(FLAGS): "`weight`",
        THOUGHTS: "a thinking chunk",
        (*CONTENT, "refusal"): "`content`",
        (CALL,): "`tool_calls`",
    }
    ours = next((to for names, to in fields.items() if name in names and to != f"`{name}`"), "")
    if ours:
        return f"To turn it into {ours}: {import_command(origin)}"
    if name == "weight":
        return "Only answers have a weight: leave it out."
    if not isinstance(name, str) or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8):
        return ""
    kind = "names" if name == "name" else "message-keys"
    return f"To leave it out: {import_command(origin, '--lossy', kind)}"


def media_step(origin: Place) -> str:
    """Return the sentence on images, audio and video."""
    return f"This suite trains text. To leave it out: {import_command(origin, '--lossy media')}"


def json_step(fault: str) -> str:
    """Return the sentence on a line that is not JSON, or has a refused number; empty if the fault is clear enough."""
    if "not a JSON number" in fault or "too large a number" in fault:
        return "Write null, or leave the key out."
    return "Write each row with json.dumps, on a line of its own." if fault.startswith("not valid JSON") else ""


def utf8_step(path: Path) -> str:
    """Return the sentence on a file that is not in UTF-8."""
    source, saved = shlex.quote(str(path)), shlex.quote(f"utf8-{path.name}")
    return f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {source} > {saved}"


AGAIN = "Fetch or write the file again."


def unpack_step(compression: str, path: Path) -> str:
    """Return the sentence that decompresses a file, or decodes it."""
    if not compression:
        return "Save it as UTF-8."
    return f"Unpack it: {_UNPACK[compression]} {shlex.quote(str(path))} > {shlex.quote(path.stem)}"


def container_step(container: Container, path: Path) -> str:
    """Return the sentence on chat rows in another container than JSON Lines in UTF-8."""
    return unpack_step(container.compression, path) if container.is_packed else import_step(str(path))


def unreadable(error: Exception, path: Path) -> InputError:
    """Return the error for a file that cannot be read to its end."""
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"not valid {error.encoding}: {error.reason}", place=str(path), next_step=utf8_step(path))
    # an error that a library raises itself has no errno
    if isinstance(error, OSError) and error.errno:
        return InputError(f"cannot be read: {error.strerror}", place=str(path))
    return InputError(f"the compressed data is damaged: {error}", place=str(path), next_step=AGAIN)


def encoded_step(container: Container | None, path: Path) -> str:
    """Return the sentence on encoded rows that are not JSON Lines in UTF-8.

    `mistral-lora import` converts chat rows only.

    Args:
        container: How the file holds them; None for a folder, as trainers prepare them.
        path: The file or folder.
    """
    quoted, reader = shlex.quote(str(path)), "load_from_disk"
    if container is not None:
        if container.compression:
            return f"Unpack it: {_UNPACK[container.compression]} {quoted} > {_ENCODED}"
        if container.encoding:
            return f"Save it as UTF-8: iconv -f {container.encoding} -t utf-8 {quoted} > {_ENCODED}"
        if container.name in (ARRAY, VALUES):
            each = ".[]" if container.name == ARRAY else "."
            return f"Write one object a line: jq -c '{each}' {quoted} > {_ENCODED}"
        if container.name != PARQUET and "Arrow" not in container.name:
            return "Write it as JSON Lines in UTF-8."
        reader = "Dataset.from_parquet" if container.name == PARQUET else "Dataset.from_file"
    code = f'import datasets; datasets.{reader}({json.dumps(str(path))}).to_json("{_ENCODED}")'
    return f"Write one object a line: python -c {shlex.quote(code)}"


ROW_SUFFIXES = (".jsonl", ".ndjson")
"""Suffixes of files with one row a line."""
DATA_SUFFIXES = (*ROW_SUFFIXES, ".json", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".bz2", ".xz")
"""Suffixes of files that hold records."""
