"""What a row says that can be encoded, and yet is hardly meant."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.findings import Finding

_DAMAGED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
"""U+FFFD, and control characters other than tab, newline, carriage return and U+0085."""


def text_findings(row: Row, layout: EncodedRow) -> Iterator[Finding]:
    """Yield what a row says and hardly means.

    Args:
        row: The row.
        layout: Its encoding, whose spans say who owns a token.
    """
    yield from _joined(row)
    yield from _empty(row, layout)
    yield from _damaged(row)
    yield from _calls(row)


def _joined(row: Row) -> Iterator[Finding]:
    groups = [(group, "assistant") for group in row.assistant_groups() if len(group) > 1]
    pairs = itertools.pairwise(enumerate(row.messages))
    groups += [([n, n + 1], "user") for (n, a), (_, b) in pairs if a["role"] == b["role"] == "user"]
    for group, role in groups:
        found = f"messages[{group[0]}] to [{group[-1]}] are joined into one {role} turn"
        yield Finding("ML614", found, row.place)


def _empty(row: Row, layout: EncodedRow) -> Iterator[Finding]:
    turns: dict[int | None, set[str]] = {}
    for span in layout.spans:
        if span.supervised:
            turns.setdefault(span.turn, set()).add(span.kind)
    for turn, kinds in turns.items():
        if kinds == {"eos"}:
            yield Finding("ML616", f"turn {turn}, the assistant's, has nothing but </s>", row.place)


def _damaged(row: Row) -> Iterator[Finding]:
    characters = {one for text in _strings(row.to_json()) for one in _DAMAGED.findall(text)}
    if characters:
        yield Finding("ML617", f"the row has {', '.join(f'U+{ord(one):04X}' for one in sorted(characters))}", row.place)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _calls(row: Row) -> Iterator[Finding]:
    known = {tool["function"]["name"] for tool in row.tools or ()}
    for index, message in enumerate(row.messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            place = f"{row.place}, messages[{index}].tool_calls[{number}].function"
            name = call["function"]["name"]
            if name not in known:
                expected = f"one of {', '.join(sorted(known))}" if known else "a tool of the row"
                yield Finding("ML618", f"calls {name!r}, which the row does not offer", f"{place}.name", expected)
            kind = _not_an_object(call["function"].get("arguments"))
            if kind:
                yield Finding("ML619", f"are {kind}", f"{place}.arguments", "an object, or its JSON as a string")


def _not_an_object(arguments: Any) -> str:
    """Return what the arguments of a call are, if they are no object."""
    if arguments is None or arguments == "" or isinstance(arguments, Mapping):
        return ""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return "a text that is not JSON"
    if isinstance(value, str):
        return "JSON that was encoded twice"
    return "" if isinstance(value, Mapping) else "JSON, but not an object"
