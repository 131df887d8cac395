"""Conversations that never change: the hash of their ids moves where a library or a template renders otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.hashing import framed_ids, framed_row, sha256_parts

PROBE = "probe-1"
"""Name of the set. Other conversations would be another set, under another name."""

_CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": _CITY}}
PROBES = {
    PROBE: (
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]},
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "2 + 3 = ?"},
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "And in German?\n\n"},
                {"role": "assistant", "content": "fünf"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "  spaces\tand 漢字, é and e\u0301, 👩‍👩‍👧  "},
                {"role": "assistant", "content": "def f(x):\n    return x\n"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "How is the weather in Oslo?"},
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "name": "weather", "tool_call_id": "a1B2c3D4e", "content": '{"celsius": -3}'},
                {"role": "assistant", "content": "It is -3 °C."},
            ],
            "tools": [_TOOL],
        },
    )
}
"""Conversations by the name of their set."""


def probe_sha256(encode: Callable[[Row], EncodedRow], name: str = PROBE) -> str:
    """Return the SHA-256 of the ids of a set's conversations; one that the backend refuses counts as refused."""
    return sha256_parts(_parts(encode, name))


def _parts(encode: Callable[[Row], EncodedRow], name: str) -> Iterator[bytes]:
    for row in _rows(name):
        yield framed_row(row)
        try:
            yield framed_ids(encode(row).input_ids)
        except MistralLoraError:
            yield framed_ids(())


@cache
def _rows(name: str) -> tuple[Row, ...]:
    return tuple(parse_row(data, place=f"{name}, row {number}") for number, data in enumerate(PROBES[name]))
