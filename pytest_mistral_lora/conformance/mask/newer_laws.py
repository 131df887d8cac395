"""Laws of the fields that only newer tokenizers encode: ids of calls, results as chunks, settings and thinking."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, merged_chunks
from pytest_mistral_lora.conformance.mask.row_laws import as_decoded, assistant_turns, encoded_groups

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def ids_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Other ids of tool calls give the same encoding."""
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
    there = [oracle.decode(ids) for ids in turns.values()]
    results = (message["content"] for message in row.messages if message["role"] == "tool")
    merged = (merged_chunks([content], version=oracle.version) for content in results)
    texts = [as_decoded("".join(chunk["text"] for chunk in chunks), oracle) for chunks in merged]
    # the longest first: a text may be the end of another
    for text in sorted(filter(None, texts), key=len, reverse=True):
        # up to v11 the id of the call stands before it
        found = next((one for one in there if one.endswith(text)), None)
        if found is None:
            return f"the tool result {text!r} is in no turn of a tool"
        there.remove(found)
    return ""


def settings_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The settings that the model is shown are the row's, once, before the first answer."""
    blocks = list(_between(encoded.input_ids, "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]", oracle))
    asked: dict[str, Any] = {}
    if row.reasoning_effort is not None:
        asked["reasoning_effort"] = row.reasoning_effort
    schema = ((row.response_format or {}).get("json_schema") or {}).get("schema")
    if schema is not None and oracle.features.schemas:
        asked["json_schema"] = schema
    if not asked:
        return ""
    if len(blocks) != 1:
        return f"{len(blocks)} blocks of settings; the row has one"
    at, text = blocks[0]
    shown = json.loads(text)
    for key, value in asked.items():
        # as text: the order of a schema's keys is the order of the answer's
        if json.dumps(shown.get(key)) != json.dumps(value):
            return f"the settings show {key} {shown.get(key)!r}; the row has {value!r}"
    first = min((span.start for span in encoded.spans if span.role == "assistant"), default=at)
    return "" if at <= first else f"the settings stand at token {at}, behind the first answer"


def thinking_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each thought of the assistant begins with its marker, and ends with one unless it is left open."""
    markers = {token: name for token, name in oracle.control_tokens.items() if name in ("[THINK]", "[/THINK]")}
    turns = assistant_turns(encoded)
    # a turn too many or too few is reported by ML109
    for group, (turn, spans) in zip(encoded_groups(row, oracle), turns.items(), strict=False):
        chunks = merged_chunks((row.messages[n].get("content") for n in group), version=oracle.version)
        expected: list[str] = []
        for chunk in chunks:
            if chunk["type"] == "thinking":
                expected += ["[THINK]"] if chunk.get("closed") is False else ["[THINK]", "[/THINK]"]
        ids = (token for span in spans for token in encoded.input_ids[span.start : span.end])
        found = [markers[token] for token in ids if token in markers]
        if found != expected:
            return f"turn {turn} has the markers {' '.join(found) or 'none'}; its thoughts have {' '.join(expected)}"
    return ""


def _between(ids: tuple[int, ...], opening: str, closing: str, oracle: Oracle) -> Iterator[tuple[int, str]]:
    """Yield place and text of each block between two control tokens."""
    tokens = {name: token for token, name in oracle.control_tokens.items()}
    at = None
    for index, token in enumerate(ids):
        if token == tokens.get(opening):
            at = index
        elif token == tokens.get(closing) and at is not None:
            yield at, oracle.decode(ids[at + 1 : index])
            at = None
