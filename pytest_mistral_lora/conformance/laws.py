"""The laws of an encoded row, each a function that says how a row breaks it, or nothing.

They are checked on generated rows (subject `mask`) and can be checked on any row and encoding.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.labels import scan_labels
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row, parse_row, spoken, weight_of
from pytest_mistral_lora.errors import OracleRejection

Rows = Literal["any", "tools", "weights"]


@dataclass(frozen=True, slots=True)
class Law:
    """A law of an encoded row.

    Attributes:
        rule: Id of its rule.
        name: Its name, the case of its check.
        rows: Which rows it speaks of: any, those with tools, or those with weights.
        violation: Says how a row and its encoding break it; empty if they keep it.
        since: Tokenizer version from which on it can be checked.
    """

    rule: str
    name: str
    violation: Callable[[Row, EncodedRow, Oracle], str]
    rows: Rows = "any"
    since: str = "v1"


def partition_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Spans partition the ids; labels are the token's own id in supervised spans, -100 elsewhere."""
    ids, labels = encoded.input_ids, encoded.labels
    if labels is None or len(labels) != len(ids):
        return f"{len(labels or ())} labels for {len(ids)} tokens"
    position = 0
    for span in encoded.spans:
        if span.start != position or span.end <= span.start:
            return f"span {span.start}-{span.end} does not follow token {position}"
        position = span.end
        for index in range(span.start, min(span.end, len(ids))):
            want = ids[index] if span.supervised else IGNORE_INDEX
            if labels[index] != want:
                return f"label {labels[index]} at token {index}; its span says {want}"
    return "" if position == len(ids) else f"spans end at {position} of {len(ids)} tokens"


def owner_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """No token outside an assistant turn is supervised."""
    for span in encoded.spans:
        if span.supervised and span.role != "assistant":
            return f"tokens {span.start}-{span.end} of the {span.role or 'beginning'} are supervised"
    return ""


def whole_turn_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Every turn of weight 1 is supervised as a whole, and none of weight 0."""
    weights = [weight_of(row.messages[group[0]]) for group in spoken_groups(row, oracle)]
    turns = _assistant_turns(encoded)
    if len(turns) != len(weights):
        return f"{len(turns)} assistant turns encoded of {len(weights)}"
    for weight, (turn, spans) in zip(weights, turns.items(), strict=True):
        if any(span.supervised != bool(weight) for span in spans):
            return f"turn {turn} has weight {weight}, but is {'not all' if weight else 'in part'} supervised"
    return ""


def eos_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Every assistant turn ends with EOS, supervised as the turn is."""
    for turn, spans in _assistant_turns(encoded).items():
        last = spans[-1].end - 1
        if encoded.input_ids[last] != oracle.eos_id:
            return f"turn {turn} ends with {oracle.piece(encoded.input_ids[last])!r} at token {last}, not with EOS"
        label = (encoded.labels or ())[last : last + 1]
        if spans[0].supervised != (label == (oracle.eos_id,)):
            return f"EOS of turn {turn} at token {last} has label {label[0] if label else 'none'}"
    return ""


def bos_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """BOS stands once, first, and is not supervised."""
    places = [index for index, token in enumerate(encoded.input_ids) if token == oracle.bos_id]
    if places != [0]:
        return f"BOS at tokens {places}; it belongs at token 0 only"
    return "BOS is supervised" if encoded.labels is not None and encoded.labels[0] != IGNORE_INDEX else ""


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


def scan_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The labels read off the control tokens are the row's labels."""
    scanned = scan_labels(encoded.input_ids, oracle)
    if scanned == encoded.labels or scanned is None or encoded.labels is None:
        return ""
    at = next(n for n, pair in enumerate(zip(scanned, encoded.labels, strict=True)) if pair[0] != pair[1])
    return f"label {encoded.labels[at]} at token {at}; the control tokens say {scanned[at]}"


def weight_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Weights change no id."""
    bare = tuple({key: value for key, value in message.items() if key != "weight"} for message in row.messages)
    return "" if oracle.encode(Row(bare, row.tools)).input_ids == encoded.input_ids else "weights change the ids"


def spoken_text_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each assistant turn decodes to what the assistant says."""
    groups = spoken_groups(row, oracle)
    turns = _assistant_turns(encoded)
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
    for group, (turn, spans) in zip(groups, _assistant_turns(encoded).items(), strict=False):
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


LAWS = (
    Law("ML101", "labels-are-what-spans-say", partition_violation, "weights"),
    Law("ML102", "only-the-assistant-is-supervised", owner_violation, "tools"),
    Law("ML103", "whole-turns-are-supervised", whole_turn_violation, "weights"),
    Law("ML104", "every-turn-ends-with-eos", eos_violation, "weights"),
    Law("ML105", "bos-once", bos_violation),
    Law("ML106", "text-never-becomes-control", injection_violation),
    Law("ML107", "two-masks-agree", scan_violation, "tools", since="v2"),
    Law("ML108", "weights-change-no-id", weight_violation, "weights"),
    Law("ML109", "supervised-text-is-what-is-said", spoken_text_violation),
    Law("ML110", "tool-calls-are-supervised", tool_call_violation, "tools", since="v2"),
    Law("ML111", "encoding-is-stable", stability_violation, "tools"),
    Law("ML112", "prompt-is-the-beginning", prompt_violation, "tools"),
)
"""Every law, in the order of its rule."""


def spoken_groups(row: Row, oracle: Oracle) -> list[list[int]]:
    """Return the groups of assistant messages that are encoded: v2 leaves out calls before the last user message."""
    groups = row.assistant_groups()
    if oracle.version != "v2":
        return groups
    last_user = max((n for n, message in enumerate(row.messages) if message["role"] == "user"), default=-1)
    return [group for group in groups if group[0] > last_user or not row.messages[group[0]].get("tool_calls")]


def _assistant_turns(encoded: EncodedRow) -> dict[int, list[Any]]:
    turns: dict[int, list[Any]] = {}
    for span in encoded.spans:
        if span.role == "assistant" and span.turn is not None:
            turns.setdefault(span.turn, []).append(span)
    return turns


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
