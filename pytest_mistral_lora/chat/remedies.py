"""The next step for data that cannot be read as it is: a command that can be pasted."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.formats import (
    ARRAY,
    CALL,
    CONTENT,
    FLAGS,
    OTHER_ROLES,
    PARQUET,
    THINKING,
    VALUES,
    Container,
    import_step,
)
from pytest_mistral_lora.errors import InputError

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "input_audio", "audio_url")
"""Fields of messages, and types of chunks, that hold no text."""

_ENCODED = "encoded.jsonl"
_UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc"}


def import_command(origin: str, *options: str) -> str:
    """Return the command that converts the file of a row.

    Args:
        origin: The place of the row, `file:line`; empty for a row made in code.
        options: Options of the command.
    """
    path = origin.rpartition(":")[0]
    return " ".join([import_step(path).removeprefix("Convert it: "), *options])


def role_step(role: Any, origin: str) -> str:
    """Return the sentence on the conversion of a role of another format; empty if it is none that is known."""
    if not isinstance(role, str) or role not in OTHER_ROLES:
        return ""
    ours = "assistant" if OTHER_ROLES[role] == CALL else OTHER_ROLES[role]
    return f"To make it {ours!r}: {import_command(origin)}"


def field_step(name: Any, origin: str, known: Collection[str]) -> str:
    """Return the sentence on the conversion of a field of a message, or on leaving it out.

    Args:
        name: The field.
        origin: The place of the row.
        known: The fields that a message of its role may have; a name like one of them is misspelt, and not left out.
    """
    fields = {
        tuple(FLAGS): "`weight`",
        THINKING: "a thinking chunk",
        (*CONTENT, "refusal"): "`content`",
        (CALL,): "`tool_calls`",
    }
    ours = next((to for names, to in fields.items() if name in names and to != f"`{name}`"), "")
    if ours:
        return f"To turn it into {ours}: {import_command(origin)}"
    if name == "weight":
        return "Only answers have a weight: leave it out."
    if name in MEDIA:
        return media_step(origin)
    if not isinstance(name, str) or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8):
        return ""
    kind = "names" if name == "name" else "message-keys"
    return f"To leave it out: {import_command(origin, '--lossy', kind)}"


def media_step(origin: str) -> str:
    """Return the sentence on images, audio and video."""
    return f"This suite checks and trains text. To leave it out: {import_command(origin, '--lossy media')}"


def json_step(fault: str) -> str:
    """Return the sentence on a line that is no JSON, or JSON of no meaning; empty if the fault is clear enough."""
    if "not a JSON number" in fault or "too large a number" in fault:
        return "Write null, or leave the key out."
    return "Write each row with json.dumps, on a line of its own." if fault.startswith("not valid JSON") else ""


def utf8_step(path: Path) -> str:
    """Return the sentence on a file that is not in UTF-8."""
    return f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > utf8-{path.name}"


AGAIN = "Fetch or write the file again."


def unpack_step(compression: str, path: Path) -> str:
    """Return the sentence that decompresses a file, or decodes it."""
    if not compression:
        return "Save it as UTF-8."
    return f"Unpack it: {_UNPACK[compression]} {shlex.quote(str(path))} > {shlex.quote(path.stem)}"


def unreadable(error: Exception, path: Path) -> InputError:
    """Return the error for a file that cannot be read to its end."""
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"not valid {error.encoding}: {error.reason}", place=str(path), next_step=utf8_step(path))
    # a library's own error has no number of the system
    if isinstance(error, OSError) and error.errno:
        return InputError(f"cannot be read: {error.strerror}", place=str(path))
    return InputError(f"the compressed data is damaged: {error}", place=str(path), next_step=AGAIN)


def encoded_step(container: Container, path: Path) -> str:
    """Return the sentence on encoded rows that are no JSON Lines in UTF-8: `mistral-lora import` converts chat rows."""
    quoted = shlex.quote(str(path))
    if container.compression:
        return f"Unpack it: {_UNPACK[container.compression]} {quoted} > {_ENCODED}"
    if container.encoding:
        return f"Save it as UTF-8: iconv -f {container.encoding} -t utf-8 {quoted} > {_ENCODED}"
    if container.name in (ARRAY, VALUES):
        return f"Write one object a line: jq -c '{'.[]' if container.name == ARRAY else '.'}' {quoted} > {_ENCODED}"
    if container.name == PARQUET or "Arrow" in container.name:
        return _to_json("Dataset.from_parquet" if container.name == PARQUET else "Dataset.from_file", path)
    return "Write it as JSON Lines in UTF-8."


def encoded_folder_step(path: Path) -> str:
    """Return the sentence on a folder of encoded rows, as trainers prepare them."""
    return _to_json("load_from_disk", path)


def _to_json(reader: str, path: Path) -> str:
    code = f'import datasets; datasets.{reader}({json.dumps(str(path))}).to_json("{_ENCODED}")'
    return f"Write one object a line: python -c {shlex.quote(code)}"
