"""Laws of the texts: what is encoded is what is said, and text never becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, merged_chunks, parse_row, spoken
from pytest_mistral_lora.conformance.mask.laws.turns import assistant_turns, spoken_groups

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def injection_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """No control id inside a text, and breaking the literals in the texts changes no count of control ids."""
    for span in encoded.spans:
        if span.kind == "text":
            for index in range(span.start, span.end):
                if encoded.input_ids[index] in oracle.control_tokens:
                    return f"control token {oracle.piece(encoded.input_ids[index])} inside a text, at token {index}"
    harmless = oracle.encode(_without_literals(row, oracle))
    if _controls(encoded, oracle) != _controls(harmless, oracle):
        return "control tokens change when the row's texts do not spell them any more"
    return ""


def spoken_text_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each assistant turn decodes to what the assistant says."""
    groups = spoken_groups(row, oracle)
    turns = assistant_turns(encoded)
    if len(turns) != len(groups):
        return f"{len(turns)} assistant turns encoded of {len(groups)}"
    for group, (turn, spans) in zip(groups, turns.items(), strict=True):
        said = spoken((row.messages[n].get("content") for n in group), version=oracle.version)
        decoded = "".join(oracle.decode(encoded.input_ids[s.start : s.end]) for s in spans if s.kind == "text")
        if decoded != _as_decoded(said, oracle):
            return f"turn {turn} decodes to {decoded!r}; the assistant says {said!r}"
    return ""


def tool_call_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each turn with calls has one run of tokens from [TOOL_CALLS] to EOS, and it holds the calls."""
    groups = spoken_groups(row, oracle)
    for group, (turn, spans) in zip(groups, assistant_turns(encoded).items(), strict=False):
        calls = [call for n in group for call in row.messages[n].get("tool_calls") or ()]
        runs = [span for span in spans if span.kind == "tool_call"]
        if len(runs) != bool(calls):
            return f"turn {turn} has {len(calls)} calls in {len(runs)} runs of tokens"
        for run in runs:
            if encoded.input_ids[run.start] != oracle.tool_calls_id:
                return f"the call of turn {turn} starts with {oracle.piece(encoded.input_ids[run.start])!r}"
            if oracle.version in ("v2", "v3", "v7") and not _holds(
                encoded.input_ids[run.start : run.end], calls, oracle
            ):
                return f"the call of turn {turn} is not the row's"
    return ""


def system_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """What the system messages say is in the row, outside the assistant's turns."""
    others = [span for span in encoded.spans if span.role != "assistant" and span.kind == "text"]
    there = [oracle.decode(encoded.input_ids[span.start : span.end]) for span in others]
    for message in row.messages:
        if message["role"] == "system":
            for chunk in merged_chunks([message["content"]], version=oracle.version):
                said = _as_decoded(chunk[chunk["type"]], oracle)
                if not any(said in text for text in there):
                    return f"the system says {said!r}, and that is in no text of the row"
    return ""


def _controls(encoded: EncodedRow, oracle: Oracle) -> list[int]:
    return [token for token in encoded.input_ids if token in oracle.control_tokens]


def _without_literals(row: Row, oracle: Oracle) -> Row:
    """Put a hyphen into every control token that the row's texts spell."""
    literals = re.compile("|".join(re.escape(literal) for literal in oracle.control_tokens.values()))

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            return literals.sub(lambda match: match[0][0] + "-" + match[0][1:], value)
        if isinstance(value, Mapping):
            return {key: broken(item) for key, item in value.items()}
        return [broken(item) for item in value] if isinstance(value, list | tuple) else value

    return parse_row(broken(row.to_json()))


def _as_decoded(text: str, oracle: Oracle) -> str:
    """SentencePiece writes a space as U+2581, so that character cannot be told from a space afterwards."""
    return text.replace("\u2581", " ") if oracle.kind == "spm" else text


def _holds(ids: tuple[int, ...], calls: list[Mapping[str, Any]], oracle: Oracle) -> bool:
    written = json.loads(oracle.decode(ids))
    expected = [(call["function"]["name"], _arguments(call, oracle)) for call in calls]
    return [(call["name"], call["arguments"]) for call in written] == expected


def _arguments(call: Mapping[str, Any], oracle: Oracle) -> Any:
    arguments = call["function"].get("arguments")
    text = json.dumps(arguments, ensure_ascii=False) if not isinstance(arguments, str | None) else arguments or "{}"
    try:
        value = json.loads(text)
    except ValueError:
        return _as_decoded(text, oracle)
    return json.loads(_as_decoded(json.dumps(value, ensure_ascii=False), oracle))
