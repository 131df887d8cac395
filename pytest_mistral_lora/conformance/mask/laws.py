"""Laws of two encodings: changes of a row that must not change its encoding, and mistral-common's own; all laws."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, has_thinking, merged_chunks
from pytest_mistral_lora.conformance.mask.newer_laws import (
    ids_violation,
    results_violation,
    settings_violation,
    thinking_violation,
)
from pytest_mistral_lora.conformance.mask.row_laws import (
    RowLaw,
    assistant_text_violation,
    assistant_turns,
    bos_violation,
    encoded_groups,
    eos_violation,
    injection_violation,
    owner_violation,
    partition_violation,
    scan_violation,
    system_violation,
    tool_call_violation,
    whole_turn_violation,
)
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


_QUESTION = {"role": "user", "content": "And then?"}
_ANSWER = {"role": "assistant", "content": "Then."}


def weight_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Weights change no id."""
    bare = tuple({key: value for key, value in message.items() if key != "weight"} for message in row.messages)
    return "" if oracle.encode(replace(row, messages=bare)).input_ids == encoded.input_ids else "weights change the ids"


def stability_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Encoding again gives the same, and the row is as before."""
    # a deep copy: the row's JSON shares its lists and objects with the row, which the encoding may change in place
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
        # the row begins with the answer, so it has no prompt
        return ""
    return "" if encoded.input_ids[: len(prompt)] == prompt else "the prompt at inference is not the row's beginning"


def arguments_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Arguments of a tool call as an object, as its JSON and as that JSON written otherwise give equal ids."""
    for name, form in _FORMS.items():
        messages = copy.deepcopy([dict(message) for message in row.messages])
        for call in (call for message in messages for call in message.get("tool_calls") or ()):
            given = call["function"].get("arguments")
            value = _as_object(given)
            if form is not None:
                value = json.dumps(value, **form) if isinstance(value, Mapping) else given
            call["function"]["arguments"] = value
        if oracle.encode(replace(row, messages=tuple(messages))).input_ids != encoded.input_ids:
            return f"the ids change when arguments are given as {name}"
    return ""


def strict_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """`strict` in a tool changes no id."""
    for strict in (True, False):
        tools = tuple({**tool, "function": {**tool["function"], "strict": strict}} for tool in row.tools or ())
        if oracle.encode(replace(row, tools=tools or None)).input_ids != encoded.input_ids:
            return f"the ids change when tools have strict={strict}"
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
            joined = {**message, "content": chunks if has_thinking(chunks) else chunks[0]["text"]}
            before, after = row.messages[:index], row.messages[index + 1 :]
            apart = oracle.encode(replace(row, messages=(*before, {**message, "content": "One."}, message, *after)))
            if apart != oracle.encode(replace(row, messages=(*before, joined, *after))):
                return f"messages[{index}] and a neighbour of its role are not encoded as one message with both texts"
    return ""


def longer_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """One more question and answer change no turn of the assistant before them, nor the row before them."""
    calls = any(message.get("tool_calls") for message in row.messages)
    # no question may follow a call, and v2 leaves out the calls before the last question
    if row.messages[-1].get("tool_calls") or (calls and oracle.version == "v2"):
        return ""
    longer = oracle.encode(replace(row, messages=(*row.messages, _QUESTION, _ANSWER)))
    if _turns(longer)[: len(_turns(encoded))] != _turns(encoded):
        return "the assistant's turns are not the same once another question and answer follow"
    # in v2 and v3 the system prompt stands beside the last question, from v2 to v11 the tools do: both move with it
    system = any(message["role"] == "system" for message in row.messages)
    prompt_moves = system and oracle.version in ("v2", "v3")
    if not prompt_moves and not (row.tools and oracle.version in ("v2", "v3", "v7", "v11")):
        size = len(encoded.input_ids)
        if longer.input_ids[:size] != encoded.input_ids or (longer.labels or ())[:size] != encoded.labels:
            return "the row is not the beginning of the same row with another question and answer"
    return ""


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


_FORMS: dict[str, dict[str, Any] | None] = {
    "an object": None,
    "its JSON": {},
    "its JSON without escapes, over several lines": {"ensure_ascii": False, "indent": 1},
}
"""The options of `json.dumps` by form; None for the object itself."""


def reference_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The ids are those of mistral-common, called as its documentation does."""
    expected = oracle.reference(row)
    if encoded.input_ids == expected:
        return ""
    at = next(
        (n for n, pair in enumerate(zip(encoded.input_ids, expected, strict=False)) if pair[0] != pair[1]),
        min(len(encoded.input_ids), len(expected)),
    )
    return f"{len(encoded.input_ids)} ids; mistral-common gives {len(expected)}, and others from token {at} on"


def refusal_violation(row: Row, oracle: Oracle) -> str:
    """A row is refused exactly if mistral-common refuses it, and for the same reason."""
    # mistral-common leaves the tools out without an error; here the row is refused
    if oracle.version == "v1" and row.tools:
        return ""
    ours = theirs = ""
    try:
        oracle.reference(row)
    except Exception as error:
        # mistral-common's errors, pydantic's, or a bare AssertionError
        theirs = type(error).__name__
    try:
        oracle.encode(row)
    except OracleRejection as error:
        ours = type(error.__cause__).__name__
    if ours == theirs:
        return ""
    return f"{ours or 'nothing'} is raised; mistral-common raises {theirs or 'nothing'}"


def construction_violation(row: Row, oracle: Oracle) -> str:
    """Each token of mistral-common's encoding comes from one of its per-message encoders."""
    try:
        oracle.encode(row)
    except InputError:
        return ""
    except MistralLoraError as error:
        return error.found
    return ""


__all__ = [
    "LAWS",
    "RowLaw",
    "assistant_text_violation",
    "construction_violation",
    "encoded_groups",
    "refusal_violation",
]

LAWS = (
    RowLaw("ML101", "labels-are-what-spans-say", partition_violation, "weights"),
    RowLaw("ML102", "only-the-assistant-is-supervised", owner_violation, "tools"),
    RowLaw("ML103", "whole-turns-are-supervised", whole_turn_violation, "weights"),
    RowLaw("ML104", "every-turn-ends-with-eos", eos_violation, "weights"),
    RowLaw("ML105", "bos-once", bos_violation),
    RowLaw("ML106", "text-never-becomes-control", injection_violation),
    RowLaw("ML107", "two-masks-agree", scan_violation, "tools", since="v2"),
    RowLaw("ML108", "weights-change-no-id", weight_violation, "weights"),
    RowLaw("ML109", "supervised-text-is-what-is-said", assistant_text_violation),
    RowLaw("ML110", "tool-calls-are-supervised", tool_call_violation, "tools", since="v2"),
    RowLaw("ML111", "encoding-is-stable", stability_violation, "tools"),
    RowLaw("ML112", "prompt-is-the-beginning", prompt_violation, "tools"),
    RowLaw("ML113", "arguments-in-any-form", arguments_violation, "tools", since="v2"),
    RowLaw("ML114", "strict-changes-no-id", strict_violation, "tools", since="v2"),
    RowLaw("ML115", "results-in-any-order", order_violation, "parallel", since="v11"),
    RowLaw("ML116", "neighbours-are-one-turn", neighbours_violation, "weights"),
    RowLaw("ML117", "another-turn-keeps-the-labels", longer_violation, "tools"),
    RowLaw("ML118", "system-prompt-is-there", system_violation, "tools"),
    RowLaw("ML119", "ids-are-mistral-commons", reference_violation, "tools"),
    RowLaw("ML122", "call-ids-change-no-id", ids_violation, "parallel", since="v13"),
    RowLaw("ML123", "tool-results-are-there", results_violation, "parallel", since="v7"),
    RowLaw("ML124", "settings-are-the-rows", settings_violation, "tools", since="v15", needs=("efforts", "schemas")),
    RowLaw("ML125", "thoughts-have-their-markers", thinking_violation, "tools", since="v13", needs=("thinking",)),
)
"""Every law, in the order of its rule."""
