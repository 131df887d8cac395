"""The pictures of a record, which other programs keep beside its messages, as chunks of the messages.

Some have `{"type": "image"}` in the messages, or nothing, and the pictures under `images`; others have `<image>` in a
text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.chunks.image import IMAGE
from pytest_mistral_lora.chat.fields import error_at
from pytest_mistral_lora.chat.foreign_fields import PICTURES
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.formats.drafts import RecordReading
from pytest_mistral_lora.formats.report import Change, changed, lost

PLACEHOLDER = "<image>"
_CODE = re.compile(r"^```.*?(?:^```|\Z)|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def with_pictures(
    messages: list[dict[str, Any]], fields: Mapping[str, Any], reading: RecordReading
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages with the pictures that stand beside them, the other fields, and the changes.

    Args:
        messages: The messages, whose chunks have our names.
        fields: The fields of the record.
        reading: How the record is read; if the loss of media is allowed, pictures are left out.

    Raises:
        RowError: If the messages have another number of placeholders than the record has pictures.
    """
    keys = reading.keys
    if "media" in reading.lossy:
        return _without_pictures(messages, fields)
    names = {*PICTURES} | {keys[name] for name in PICTURES if name in keys}
    key = next((name for name in fields if name in names and fields[name] not in ("", [])), "")
    rest = {name: value for name, value in fields.items() if name not in names}
    if not key:
        return messages, rest, []
    value = fields[key]
    pictures = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    in_code = sum(_placeholders_in_code(message) for message in messages)
    split = [
        {**message, "content": _split(message.get("content"))} if _asks(message) else message for message in messages
    ]
    chunks = [chunk for message in split for chunk in _pictures_of(message)]
    empty = [chunk for chunk in chunks if not chunk.get("image_url")]
    if not empty and len(chunks) == len(pictures):
        # they stand in the messages, too
        return messages, rest, [changed("pictures", key)]
    if not chunks and not in_code:
        # in front of the first text of the user, where the trainers that read such records put them
        first = next((at for at, message in enumerate(split) if _asks(message)), None)
        if first is not None:
            empty = [{"type": IMAGE.name} for _ in pictures]
            content = split[first]["content"]
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            split[first] = {**split[first], "content": [*empty, *texts]}
    if len(empty) != len(pictures):
        found = f"{counted(len(pictures), 'picture')} for {counted(len(empty), 'placeholder')} in the messages"
        found += f", and {in_code} in code" if in_code else ""
        raise error_at(reading.place / key, found, "a placeholder for each picture, and a picture for each placeholder")
    for chunk, picture in zip(empty, pictures, strict=True):
        given = picture if isinstance(picture, Mapping) else {"image_url": picture}
        chunk |= IMAGE.from_foreign(given, None)
    return split, rest, [changed("pictures", key)]


def _without_pictures(
    messages: list[dict[str, Any]], fields: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages without chunks of pictures, the fields, and a loss for each; a key is lost later."""
    kept, changes = [], []
    for message in messages:
        pictures = [*_pictures_of(message)]
        changes += [lost("media", picture["type"]) for picture in pictures]
        content = message.get("content")
        kept.append({**message, "content": [c for c in content or () if c not in pictures]} if pictures else message)
    return kept, dict(fields), changes


def _asks(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "user"


def _split(content: Any) -> Any:
    """Return a content with a chunk in place of each placeholder in its texts, but for those in code."""
    chunks = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    parts: list[Any] = []
    for chunk in chunks:
        if isinstance(chunk, Mapping) and chunk.get("type") == "text" and isinstance(chunk.get("text"), str):
            parts += _split_text(chunk["text"])
        else:
            parts.append(dict(chunk) if isinstance(chunk, Mapping) else chunk)
    return parts if any(isinstance(part, Mapping) and part.get("type") == IMAGE.name for part in parts) else content


def _split_text(text: str) -> Iterator[dict[str, Any]]:
    at = start = 0
    code = [match.span() for match in _CODE.finditer(text)]
    while (at := text.find(PLACEHOLDER, at)) >= 0:
        if not any(first <= at < end for first, end in code):
            if text[start:at]:
                yield {"type": "text", "text": text[start:at]}
            yield {"type": IMAGE.name}
            start = at + len(PLACEHOLDER)
        at += len(PLACEHOLDER)
    if text[start:]:
        yield {"type": "text", "text": text[start:]}


def _placeholders_in_code(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    chunks = [{"text": content}] if isinstance(content, str) else content or ()
    texts = (chunk.get("text") for chunk in chunks if isinstance(chunk, Mapping))
    return sum(code.count(PLACEHOLDER) for text in texts if isinstance(text, str) for code in _CODE.findall(text))


def _pictures_of(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    content = message.get("content")
    for chunk in content if isinstance(content, list) else ():
        if isinstance(chunk, dict) and chunk.get("type") == IMAGE.name:
            yield chunk
