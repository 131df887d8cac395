"""Recognise how data is stored and laid out, by its first bytes and by the keys of a record.

`data` converts these formats; everything else that reads rows names them in its errors.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError

FORMATS = {
    "messages": "chat messages",
    "sharegpt": "ShareGPT",
    "alpaca": "Alpaca",
    "prompt-completion": "prompt and completion",
    "preference": "preference pairs",
}
"""The formats that are converted to rows, each with its title."""

CALL = "function_call"
"""The role of a message whose content is the JSON of tool calls, as in ShareGPT."""
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    # the other assistants of ShareGPT's own pages
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    CALL: CALL,
    "tool_call": CALL,
}
"""Names of roles in other formats, each with ours."""

FLAGS = {"weight": 1, "train": 1, "training": 1, "trainable": 1, "loss": 1, "loss_weight": 1, "mask": 0}
"""Fields of messages that decide about training: 1 if true means that the message is trained on, else 0."""
THINKING = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages that hold the thinking."""
CONTENT = ("content", "value", "text")
"""Fields of messages that hold the content."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of records that hold media: without them, the text would be trained alone."""
MEDIA_PARTS = frozenset((*MEDIA, "image_url", "input_image", "input_audio", "audio_url", "video_url", "file"))
"""Fields of messages, and types of chunks, that hold media."""

LINES = "JSON Lines"
ARRAY = "a JSON array"
VALUES = "JSON objects over several lines"
PARQUET = "Parquet"
ARROW_FILE = "an Arrow file"
ARROW_STREAM = "an Arrow stream"
CSV = "CSV"
TSV = "TSV"
UTF8_BOM = b"\xef\xbb\xbf"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
# UTF-32 before UTF-16: its mark begins with the mark of UTF-16
_ENCODED = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"{\x00": "UTF-16-LE",
    b"[\x00": "UTF-16-LE",
    b"\x00{": "UTF-16-BE",
    b"\x00[": "UTF-16-BE",
}
_TABLES = {b"PAR1": PARQUET, b"ARROW1": ARROW_FILE, b"\xff\xff\xff\xff": ARROW_STREAM}
_UNREADABLE = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "Fetch the data: git lfs pull"),
    b"PK\x03\x04": ("a zip archive", "Unpack it; save a spreadsheet as CSV."),
    b"\x80\x04\x95": ("a Python pickle, which can run code", "Save the data as JSON Lines or Parquet."),
    b"SQLite format 3": ("an SQLite database", "Export its table as CSV."),
    b"FEA1": ("Feather version 1", "Save it as Parquet or Arrow."),
    b"<!DOCTYPE": ("a web page, not the data", "Download the file itself."),
    b"<html": ("a web page, not the data", "Download the file itself."),
}


@dataclass(frozen=True, slots=True)
class Container:
    """How a file holds its records.

    Attributes:
        name: `LINES`, `ARRAY`, `VALUES`, `PARQUET`, `ARROW_FILE`, `ARROW_STREAM`, `CSV` or `TSV`; empty if it is
            not known before the file is decompressed or decoded.
        compression: `gzip`, `zstd`, `bzip2`, `xz`, or empty.
        encoding: `UTF-16` or the like; empty for UTF-8.
    """

    name: str = ""
    compression: str = ""
    encoding: str = ""

    @property
    def title(self) -> str:
        """The container in words, `gzip`, `UTF-16` or `a JSON array`."""
        return self.compression or self.encoding or self.name


def container_of(head: bytes, path: Path) -> Container:
    """Return the container of a file by its first bytes.

    Args:
        head: The first bytes, a few thousand or the whole file.
        path: The file: its suffix shows CSV and TSV, which have no mark of their own.

    Raises:
        InputError: If it is a known format that is never read, such as a zip archive.
    """
    for mark, (title, step) in _UNREADABLE.items():
        if head.startswith(mark):
            raise InputError(f"this is {title}", place=str(path), expected="rows", next_step=step)
    for mark, name in _COMPRESSED.items():
        if head.startswith(mark):
            return Container(compression=name)
    for mark, name in _TABLES.items():
        if head.startswith(mark):
            return Container(name)
    for mark, name in _ENCODED.items():
        if head.startswith(mark):
            return Container(encoding=name)
    return Container(_text_container(head.removeprefix(UTF8_BOM).lstrip(), path))


def _text_container(head: bytes, path: Path) -> str:
    suffix = next((one for one in reversed(path.suffixes) if one.lower() in (".csv", ".tsv")), "").lower()
    if suffix and head[:1] not in (b"{", b"["):
        return TSV if suffix == ".tsv" else CSV
    line, newline, rest = head.partition(b"\n")
    line = line.strip()
    if line[:1] == b"[":
        # a list that ends with its line, before other lines, is one bad row of many and not the file's own bracket
        return LINES if newline and line.endswith(b"]") and len(line) > 1 and rest.strip() else ARRAY
    # an object that is written over several lines has little on its first
    if newline and rest.lstrip()[:1] == b'"' and len(line) < 80 and line[:1] == b"{" and line[-1:] != b"}":
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            if not line[error.pos :].strip() or line.endswith((b",", b"[", b"{")):
                return VALUES
        except ValueError:
            return LINES
    return LINES


def import_step(path: str) -> str:
    """Return the sentence that names the command which converts a file."""
    # a source is never written over
    to = "converted.jsonl" if Path(path).name == "rows.jsonl" else "rows.jsonl"
    return f"Convert it: mistral-lora import {shlex.quote(path) if path else 'FILE'} --to {to}"


@dataclass(frozen=True, slots=True)
class Recognised:
    """The format of a record.

    Attributes:
        name: A key of `FORMATS`; empty for one that has no turns.
        evidence: The keys that show it, in words.
        keys: Keys of the record, by the name of the field that they hold.
        advice: The next step for a format that has no turns; else empty.
    """

    name: str
    evidence: str
    keys: Mapping[str, str]
    advice: str = ""

    @property
    def title(self) -> str:
        """The format and its evidence, `ShareGPT (conversations with from/value)`."""
        return f"{FORMATS[self.name]} ({self.evidence})" if self.name else self.evidence

    @property
    def is_row(self) -> bool:
        """Whether it is a row as it stands, with nothing to convert."""
        return self.name == "messages" and self.keys["messages"] == "messages"

    def next_step(self, path: str) -> str:
        """Return the sentence with the command for a file of this format; empty path if it has none."""
        return self.advice.replace("FILE", shlex.quote(path) if path else "FILE") or import_step(path)


MESSAGE_LISTS = ("messages", "conversations", "conversation", "interactions")
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
    ("input", "output"),
)
_NO_TURNS = {
    "input_ids": ("encoded rows (input_ids)", "Judge them: mistral-lora audit FILE --tokenizer PATH"),
    "segments": ("Axolotl's input_output (segments)", "Segments have no turns: write messages with roles."),
    "role": ("a message alone (role)", "Put all messages of a conversation in a list under `messages`."),
    "text": ("plain text (text)", "A text has no turns: write messages with roles, and no markers of a template."),
    "instruction": ("an instruction alone (instruction)", "Put its answer beside it, under `output`."),
    "chosen": ("a chosen answer alone (chosen)", "Put `prompt` and `rejected` beside it, or name it `completion`."),
    "prompt": ("a prompt alone (prompt)", "Put its answer beside it, under `completion`."),
    "question": ("a question alone (question)", "Put its answer beside it, under `answer`."),
}


def ids_key(record: Any) -> str:
    """Return the key under which a record has a trainer's ids or labels; empty if it has none."""
    if not isinstance(record, Mapping):
        return ""
    if record.get("input_ids") is not None:
        return "input_ids"
    labels = record.get("labels")
    # classes may be called labels, too: those of tokens have the number of a token without loss
    return "labels" if isinstance(labels, Sequence) and not isinstance(labels, str) and -100 in labels else ""


def unread_columns(record: Any) -> tuple[str, ...]:
    """Return the keys of a row that another trainer may train on in place of its messages."""
    if not isinstance(record, Mapping):
        return ()
    if key := ids_key(record):
        return (key,)
    if isinstance(record.get("prompt"), str | list) and isinstance(record.get("completion"), str | list):
        return ("prompt", "completion")
    return ("text",) if isinstance(record.get("text"), str) else ()


def recognise(record: Any) -> Recognised | None:
    """Return the format of a record by its structure, or None if it is none that is known."""
    if isinstance(record, Sequence) and not isinstance(record, str):
        keys = _message_keys(record)
        return Recognised("messages", f"a list of messages with {keys}", {"messages": ""}) if keys else None
    if not isinstance(record, Mapping):
        return None
    # a table of many sources pads the keys of the others with null; if no format is left, a null is a fault of its own
    present = {key for key, value in record.items() if value is not None}
    for named in (present, record.keys()):
        for find in (_as_preference, _as_conversation, _as_instruction):
            found = find(record, named)
            if found is not None:
                return found
    for key, (title, advice) in _NO_TURNS.items():
        if key in present and present.isdisjoint(MESSAGE_LISTS):
            return Recognised("", title, {}, advice)
    return None


def _as_preference(record: Mapping[str, Any], present: Collection[str]) -> Recognised | None:
    pairs = (
        ("chosen", "rejected"),
        ("preferred_output", "non_preferred_output"),
        ("chosen_messages", "rejected_messages"),
    )
    for chosen, rejected in pairs:
        if chosen in present and rejected in present:
            keys = {"chosen": chosen, "rejected": rejected}
            asked = next((key for key in ("prompt", "input", *MESSAGE_LISTS[:3], "question") if key in present), "")
            if "instruction" in present:
                keys |= {"prompt": "instruction"} | ({"input": "input"} if "input" in present else {})
            elif asked:
                keys["prompt"] = asked
            return Recognised("preference", f"`{chosen}` and `{rejected}`", keys)
    return None


def _as_conversation(record: Mapping[str, Any], present: Collection[str]) -> Recognised | None:
    for key in MESSAGE_LISTS:
        items = record.get(key)
        if isinstance(items, str):
            try:
                # a column of CSV or Parquet holds text
                items = json.loads(items)
            except (ValueError, RecursionError):
                continue
        if items == []:
            name = "sharegpt" if key.startswith("conversation") else "messages"
            return Recognised(name, f"`{key}`, which is empty", {"messages": key})
        shown = _message_keys(items)
        if shown:
            name = "sharegpt" if shown == "from/value" or key.startswith("conversation") else "messages"
            return Recognised(name, f"`{key}` with {shown}", {"messages": key})
    return None


def _message_keys(items: Any) -> str:
    """Return the keys of a list of messages, `from/value`; empty if it is no such list."""
    if not isinstance(items, Sequence) or isinstance(items, str) or not items or not isinstance(items[0], Mapping):
        return ""
    first = items[0]
    # a message that calls tools may have no content
    pairs = (("from", "value"), ("role", "content"), ("role", "text"), ("role", "value"), ("role", "tool_calls"))
    for role, content in pairs:
        if role in first and content in first:
            return f"{role}/{content}"
    return ""


def _as_instruction(record: Mapping[str, Any], present: Collection[str]) -> Recognised | None:
    # `query` as ms-swift has it, `context` as Dolly
    asked, below, answer = (
        next((key for key in keys if key in present), "")
        for keys in (("instruction", "query"), ("input", "context"), ("output", "response"))
    )
    if asked and answer:
        named = {"instruction": asked, "input": below, "output": answer, "history": "history"}
        keys = {name: key for name, key in named.items() if key in present}
        evidence = "/".join(filter(None, (asked, below, answer)))
        return Recognised("alpaca", f"`{evidence}`", keys)
    for prompt, completion in _PAIRS:
        if prompt in present and completion in present:
            kinds = "messages" if not isinstance(record[prompt], str) else "text"
            evidence = f"`{prompt}` and `{completion}` of {kinds}"
            return Recognised("prompt-completion", evidence, {"prompt": prompt, "completion": completion})
    return None
