"""Laws of two encodings: changes of a row that must keep its encoding; mistral-common's own; settings."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, has_more_than_text, merged_chunks
from pytest_mistral_lora.conformance.mask.row_laws import as_decoded
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
    """Encoding twice gives the same result, and does not change the row."""
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
    """Arguments of a tool call have equal ids as an object, as its JSON, and as that JSON in another form."""
    for name, form in _FORMS.items():
        messages = copy.deepcopy([dict(message) for message in row.messages])
        for call in (call for message in messages for call in message.get("tool_calls") or ()):
            given = value = call["function"].get("arguments")
            if isinstance(given, str):
                with suppress(ValueError):
                    value = json.loads(given)
            if isinstance(value, Mapping):
                call["function"]["arguments"] = value if form is None else json.dumps(value, **form)
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
            chunks = merged_chunks(["One.", message["content"]], oracle.facts)
            joined = {**message, "content": chunks if has_more_than_text(chunks) else chunks[0]["text"]}
            before, after = row.messages[:index], row.messages[index + 1 :]
            apart = oracle.encode(replace(row, messages=(*before, {**message, "content": "One."}, message, *after)))
            if apart != oracle.encode(replace(row, messages=(*before, joined, *after))):
                return f"messages[{index}] and a neighbour of its role are not encoded as one message with both texts"
    return ""


def longer_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Another question and answer do not change earlier turns of the assistant, nor the row before them."""
    calls = any(message.get("tool_calls") for message in row.messages)
    # no question may follow a call
    if row.messages[-1].get("tool_calls") or (calls and not oracle.facts.keeps_calls):
        return ""
    longer = oracle.encode(replace(row, messages=(*row.messages, _QUESTION, _ANSWER)))
    if _turns(longer)[: len(_turns(encoded))] != _turns(encoded):
        return "the assistant's turns are not the same once another question and answer follow"
    # text beside the last question moves with the question
    system = any(message["role"] == "system" for message in row.messages)
    prompt_moves = system and oracle.facts.system_in == "last-user-turn"
    tools_move = row.tools and oracle.facts.tools_in == "last-user-turn"
    if not prompt_moves and not tools_move:
        size = len(encoded.input_ids)
        if longer.input_ids[:size] != encoded.input_ids or (longer.labels or ())[:size] != encoded.labels:
            return "the row is not the beginning of the same row with another question and answer"
    return ""


def _turns(encoded: EncodedRow) -> list[list[tuple[tuple[int, ...], bool]]]:
    return [
        [(encoded.input_ids[span.start : span.end], span.supervised) for span in spans]
        for spans in encoded.answer_spans.values()
    ]


_FORMS: dict[str, dict[str, Any] | None] = {
    "an object": None,
    "its JSON": {},
    "its JSON without escapes, over several lines": {"ensure_ascii": False, "indent": 1},
}
"""The options of `json.dumps` by form; None for the object itself."""


def ids_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Different ids of tool calls give the same encoding."""
    given = [call["id"] for message in row.messages for call in message.get("tool_calls") or ()]
    other = {call_id: f"call_{number:05}" for number, call_id in enumerate(dict.fromkeys(given))}

    def renamed(message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] == "tool":
            return {**message, "tool_call_id": other.get(message["tool_call_id"], message["tool_call_id"])}
        calls = message.get("tool_calls")
        return {**message, "tool_calls": [{**call, "id": other[call["id"]]} for call in calls]} if calls else message

    same = oracle.encode(replace(row, messages=tuple(map(renamed, row.messages)))) == encoded
    return "" if same else "the encoding changes when the tool calls have other ids"


def results_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The whole text of each tool result is in the turn of a tool."""
    turns: dict[int | None, list[int]] = {}
    for span in encoded.spans:
        if span.role == "tool" and span.kind == "text":
            turns.setdefault(span.turn, []).extend(encoded.input_ids[span.start : span.end])
    tool_texts = [oracle.decode(ids) for ids in turns.values()]
    results = (message["content"] for message in row.messages if message["role"] == "tool")
    merged = (merged_chunks([content], oracle.facts) for content in results)
    texts = [as_decoded("".join(chunk["text"] for chunk in chunks), oracle) for chunks in merged]
    # the longest first: a text may be the end of another
    for text in sorted(filter(None, texts), key=len, reverse=True):
        # the id of the call may stand before it
        found = next((tool_text for tool_text in tool_texts if tool_text.endswith(text)), None)
        if found is None:
            return f"the tool result {text!r} is in no turn of a tool"
        tool_texts.remove(found)
    return ""


def settings_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The model sees the row's settings once, before the first answer."""
    tokens, opened = {name: token for token, name in oracle.control_tokens.items()}, -1
    blocks: list[tuple[int, str]] = []  # place and text
    for index, token in enumerate(encoded.input_ids):
        if token == tokens.get("[MODEL_SETTINGS]"):
            opened = index
        elif token == tokens.get("[/MODEL_SETTINGS]") and opened >= 0:
            blocks.append((opened, oracle.decode(encoded.input_ids[opened + 1 : index])))
            opened = -1
    settings: dict[str, Any] = {}
    if row.reasoning_effort is not None:
        settings["reasoning_effort"] = row.reasoning_effort
    schema = ((row.response_format or {}).get("json_schema") or {}).get("schema")
    if schema is not None and oracle.features.schemas:
        settings["json_schema"] = schema
    if not settings:
        return ""
    if len(blocks) != 1:
        return f"{len(blocks)} blocks of settings; the row has one"
    at, text = blocks[0]
    shown = json.loads(text)
    for key, value in settings.items():
        # as text: the order of a schema's keys is the order of the answer's
        if json.dumps(shown.get(key)) != json.dumps(value):
            return f"the settings show {key} {shown.get(key)!r}; the row has {value!r}"
    first = min((span.start for span in encoded.spans if span.role == "assistant"), default=at)
    return "" if at <= first else f"the settings stand at token {at}, behind the first answer"


def reference_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The ids equal those of mistral-common, called as in its documentation."""
    expected = oracle.reference(row)
    if encoded.input_ids == expected:
        return ""
    at = equal_beginning(encoded.input_ids, expected)
    return f"{len(encoded.input_ids)} ids; mistral-common gives {len(expected)}, and others from token {at} on"


def refusal_violation(row: Row, oracle: Oracle) -> str:
    """A row is refused exactly if mistral-common refuses it, and for the same reason."""
    # mistral-common silently leaves the tools out; here the row is refused
    if oracle.facts.tools_in is None and row.tools:
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
