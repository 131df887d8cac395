"""The named deviations that are known of a kind of server, from a TOML file beside it: with the versions of each.

    [prompts]
    control-literal = ">=8672"

A deviation itself, what it changes, is in `chat.templates.deviations` (of prompts) and `conformance.answer.deviations`.
Those of a server that changes messages before it renders them are here: no template has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from pytest_mistral_lora.chat.reading import read_toml
from pytest_mistral_lora.chat.rows import Row, is_text_chunk
from pytest_mistral_lora.errors import EntryPointError
from pytest_mistral_lora.places import Place

DeviationsOf = Literal["prompts", "answers"]
"""The sections of a file: what deviates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDeviation:
    """One way in which a server changes the messages of a request before it renders the chat template.

    Attributes:
        id: Its name.
        title: What the server does, in one sentence.
        why: What mistral-common does.
        tokenizer: The tokenizer that the example is for, as `Deviation.tokenizer`.
        example: The smallest row that shows it.
        change: Returns the row as the server reads it; the row itself if it reads it as it is.
    """

    id: str
    title: str
    why: str
    tokenizer: str
    example: Mapping[str, Any]
    change: Callable[[Row], Row]


def _results_joined(row: Row) -> Row:
    def joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content")
        if message.get("role") != "tool" or not isinstance(content, list) or not all(map(is_text_chunk, content)):
            return message
        return {**message, "content": "\n".join(chunk["text"] for chunk in content)}

    messages = tuple(map(joined, row.messages))
    return row if messages == row.messages else replace(row, messages=messages)


_WEATHER = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
READ_DEVIATIONS = (
    ReadDeviation(
        id="result-chunks-joined",
        title="The text chunks of a tool result become one text, with a line break between them.",
        why="mistral-common puts a blank line between them up to v13, and nothing in v15.",
        tokenizer="derived-v13",
        example={
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {}}}
                    ],
                },
                {
                    "role": "tool",
                    "tool_call_id": "abcdefghi",
                    "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                },
                {"role": "assistant", "content": "d"},
            ],
            "tools": [{"type": "function", "function": _WEATHER}],
        },
        change=_results_joined,
    ),
)
"""Each named deviation of a server that is not one of its template."""


@cache
def deviations_in(file: Path) -> Mapping[str, Mapping[str, SpecifierSet]]:
    """Return the versions of each named deviation of a file, by section and name.

    Raises:
        EntryPointError: If it cannot be read, is no TOML, or has an unknown section or versions that pip does not know.
    """
    sections = read_toml(file, EntryPointError)
    found: dict[str, dict[str, SpecifierSet]] = {}
    for section, versions in sections.items():
        if section not in get_args(DeviationsOf) or not isinstance(versions, dict):
            expected = " or ".join(f"[{name}]" for name in get_args(DeviationsOf))
            raise EntryPointError(f"unknown section {section!r}", place=str(file), expected=expected)
        found[section] = {name: _specifier(file, section, name, text) for name, text in versions.items()}
    return found


def _specifier(file: Path, section: str, name: str, versions: object) -> SpecifierSet:
    try:
        return SpecifierSet(versions if isinstance(versions, str) else repr(versions))
    except InvalidSpecifier:
        place = Place.of(file).within(section, name)
        raise EntryPointError(repr(versions), place=place, expected="versions as pip writes them: '>=0.32'") from None
