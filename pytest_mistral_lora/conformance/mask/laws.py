"""Laws of a row's encoding beside another: that of its prompt, that without weights, and mistral-common's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, merged_chunks
from pytest_mistral_lora.conformance.mask.row_laws import as_decoded
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def weight_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Weights change no id."""
    bare = tuple({key: value for key, value in message.items() if key != "weight"} for message in row.messages)
    return "" if oracle.encode(replace(row, messages=bare)).input_ids == encoded.input_ids else "weights change the ids"


def prompt_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The prompt for the last answer is the beginning of the row."""
    try:
        prompt = oracle.encode_prompt(row)
    except OracleRejection:
        # the row begins with the answer, so it has no prompt
        return ""
    return "" if encoded.input_ids[: len(prompt)] == prompt else "the prompt at inference is not the row's beginning"


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
