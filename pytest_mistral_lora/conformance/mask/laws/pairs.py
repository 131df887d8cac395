"""Laws of two rows: what must not change the encoding, and what may change only a part of it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, merged_chunks, thinks
from pytest_mistral_lora.conformance.mask.laws.turns import assistant_turns
from pytest_mistral_lora.errors import OracleRejection

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_QUESTION = {"role": "user", "content": "And then?"}
_ANSWER = {"role": "assistant", "content": "Then."}


def weight_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Weights change no id."""
    bare = tuple({key: value for key, value in message.items() if key != "weight"} for message in row.messages)
    return "" if oracle.encode(Row(bare, row.tools)).input_ids == encoded.input_ids else "weights change the ids"


def stability_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Encoding again gives the same, and the row is as before."""
    before = copy.deepcopy(row.to_json())
    again = oracle.encode(row)
    if again != encoded:
        return "encoding the row again gives something else"
    return "" if row.to_json() == before else "encoding changes the row"


def prompt_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The prompt for the last answer is the beginning of the row."""
    try:
        prompt = oracle.encode_prompt(row)
    except OracleRejection:
        return ""  # nothing asks for the last answer: there is no prompt
    return "" if encoded.input_ids[: len(prompt)] == prompt else "the prompt at inference is not the row's beginning"


def arguments_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Arguments of a tool call as an object, as its JSON and as that JSON written otherwise give equal ids."""
    for name, form in _FORMS.items():
        if oracle.encode(replace(row, messages=_with_arguments(row, form))).input_ids != encoded.input_ids:
            return f"the ids change when arguments are given as {name}"
    return ""


def strict_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """`strict` in a tool changes no id."""
    for strict in (True, False):
        tools = tuple({**tool, "function": {**tool["function"], "strict": strict}} for tool in row.tools or ())
        if oracle.encode(replace(row, tools=tools or None)).input_ids != encoded.input_ids:
            return f"the ids change when tools say that strict is {strict}"
    return ""


def order_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Results of parallel tool calls in another order give the same encoding."""
    turned: list[Mapping[str, Any]] = []
    for role, run in itertools.groupby(row.messages, key=lambda message: message["role"]):
        group = list(run)
        turned += reversed(group) if role == "tool" else group
    same = oracle.encode(replace(row, messages=tuple(turned))) == encoded
    return "" if same else "the encoding changes when the results of tool calls are given in another order"


def neighbours_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Two neighbouring messages of a user or an assistant are one turn: their texts, with a blank line between."""
    for index, message in enumerate(row.messages):
        if message["role"] in ("user", "assistant") and not message.get("tool_calls"):
            chunks = merged_chunks(["One.", message["content"]], version=oracle.version)
            joined = {**message, "content": chunks if thinks(chunks) else chunks[0]["text"]}
            before, after = row.messages[:index], row.messages[index + 1 :]
            apart = oracle.encode(replace(row, messages=(*before, {**message, "content": "One."}, message, *after)))
            if apart != oracle.encode(replace(row, messages=(*before, joined, *after))):
                return f"messages[{index}] and a neighbour of its role are not encoded as one message with both texts"
    return ""


def longer_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """One more question and answer change no turn of the assistant before them, nor the row before them."""
    calls = any(message.get("tool_calls") for message in row.messages)
    if row.messages[-1].get("tool_calls") or (calls and oracle.version == "v2"):
        return ""  # no question may follow; v2 leaves out the calls before the last question
    longer = oracle.encode(replace(row, messages=(*row.messages, _QUESTION, _ANSWER)))
    if _turns(longer)[: len(_turns(encoded))] != _turns(encoded):
        return "the assistant's turns are not the same once another question and answer follow"
    if not _moves(row, oracle.version):
        size = len(encoded.input_ids)
        if longer.input_ids[:size] != encoded.input_ids or (longer.labels or ())[:size] != encoded.labels:
            return "the row is not the beginning of the same row with another question and answer"
    return ""


def _moves(row: Row, version: str) -> bool:
    """Return whether something stands beside the last question, wherever that is: the system prompt, or tools."""
    if version in ("v2", "v3") and any(message["role"] == "system" for message in row.messages):
        return True
    return bool(row.tools) and version in ("v2", "v3", "v7", "v11")


def _turns(encoded: EncodedRow) -> list[list[tuple[tuple[int, ...], bool]]]:
    return [
        [(encoded.input_ids[span.start : span.end], span.supervised) for span in spans]
        for spans in assistant_turns(encoded).values()
    ]


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _rewritten(**how: Any) -> Callable[[Any], Any]:
    def rewrite(arguments: Any) -> Any:
        value = _as_object(arguments)
        return json.dumps(value, **how) if isinstance(value, Mapping) else arguments

    return rewrite


_FORMS: dict[str, Callable[[Any], Any]] = {
    "an object": _as_object,
    "its JSON": _rewritten(),
    "its JSON without escapes, over several lines": _rewritten(ensure_ascii=False, indent=1),
}


def _with_arguments(row: Row, form: Callable[[Any], Any]) -> tuple[Mapping[str, Any], ...]:
    def calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for call in message["tool_calls"]:
            function = call["function"]
            yield {**call, "function": {**function, "arguments": form(function.get("arguments"))}}

    return tuple(
        {**message, "tool_calls": list(calls(message))} if message.get("tool_calls") else message
        for message in row.messages
    )
