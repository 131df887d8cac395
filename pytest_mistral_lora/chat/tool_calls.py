"""Read tool calls from the ids that a model generated: the way back from what `Oracle.encode` does with them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_ID = re.compile(r"[a-zA-Z0-9]{9}")
_AS_ONE_LIST = ("v2", "v3", "v7")
"""Versions that write all calls of a turn as one JSON list; the later ones write each call after a marker."""
_WITH_ID = ("v3", "v7", "v11")


class MalformedCallError(ValueError):
    """Ids that do not spell tool calls; says what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as it was generated.

    Attributes:
        name: The tool's name.
        arguments: What its arguments parse to.
        id: Its id; None where the tokenizer version writes none.
    """

    name: str
    arguments: Any
    id: str | None


def read_calls(ids: Sequence[int], oracle: Oracle) -> list[Call]:
    """Return the tool calls that a completion makes.

    Args:
        ids: The completion, with or without its closing EOS; text before the first call is allowed.
        oracle: Mistral's own tokenization of the model.

    Raises:
        MalformedCallError: If there is no call, or one that is not written as the tokenizer version writes calls.
    """
    ids = [token for token in ids if token != oracle.eos_id]
    if oracle.tool_calls_id not in ids:
        raise MalformedCallError("no [TOOL_CALLS]")
    calls = ids[ids.index(oracle.tool_calls_id) :]
    return _of_list(calls, oracle) if oracle.version in _AS_ONE_LIST else list(_one_by_one(calls, oracle))


def call_violation(call: Call, tools: Collection[str], version: str) -> str:
    """Return why a call is not well-formed; empty where it is.

    Args:
        call: The call.
        tools: Names of the tools that the conversation has.
        version: The tokenizer version.
    """
    if call.name not in tools:
        return f"no tool is named {call.name!r}"
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} are {json.dumps(call.arguments, ensure_ascii=False)}, not an object"
    if version in _WITH_ID and not _ID.fullmatch(call.id or ""):
        return f"the id of {call.name} is {call.id!r}, not 9 letters and digits"
    return ""


def _of_list(ids: list[int], oracle: Oracle) -> list[Call]:
    if ids.count(ids[0]) > 1:
        raise MalformedCallError("[TOOL_CALLS] twice in one turn")
    calls = _json(oracle.decode(ids[1:]))
    if not isinstance(calls, list) or not calls:
        raise MalformedCallError("what follows [TOOL_CALLS] is not a list of calls")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise MalformedCallError(f"not a call: {json.dumps(call, ensure_ascii=False)}")
    return [Call(call["name"], call["arguments"], call.get("id")) for call in calls]


def _one_by_one(ids: list[int], oracle: Oracle) -> Iterator[Call]:
    markers = ["[TOOL_CALLS]", *(["[CALL_ID]"] if oracle.version in _WITH_ID else []), "[ARGS]"]
    runs = list(_marked_runs(ids, oracle))
    for first in range(0, len(runs), len(markers)):
        parts = runs[first : first + len(markers)]
        if [marker for marker, _ in parts] != markers:
            found = "".join(marker for marker, _ in parts)
            raise MalformedCallError(f"a call with the markers {found}, not {''.join(markers)}")
        texts = dict(parts)
        yield Call(texts["[TOOL_CALLS]"], _json(texts["[ARGS]"]), texts.get("[CALL_ID]"))


def _marked_runs(ids: list[int], oracle: Oracle) -> Iterator[tuple[str, str]]:
    """Yield each control token with the text that follows it."""
    starts = [index for index, token in enumerate(ids) if token in oracle.control_tokens]
    for start, end in itertools.pairwise([*starts, len(ids)]):
        yield oracle.control_tokens[ids[start]], oracle.decode(ids[start + 1 : end])


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"not valid JSON: {error}") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
