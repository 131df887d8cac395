"""Laws of one encoded row: who owns and supervises each token, and which text the tokens decode to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, count
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from pytest_mistral_lora.chat.chunks.registry import chunk_types, type_of
from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle.versions import Fact, names_with
from pytest_mistral_lora.chat.rows import Row, assistant_text, merged_chunks
from pytest_mistral_lora.conformance.finding import RULES

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


Rows = Literal["any", "tools", "weights", "parallel"]


@dataclass(frozen=True, slots=True)
class RowLaw:
    """A law of an encoded row.

    Attributes:
        rule: Id of its rule.
        violation: Returns how a row and its encoding break the law; empty if they do not.
        rows: The rows that the law applies to: `any`, or those with tools, with parallel tool calls, or with weights.
        fact: The fact of the tokenizer versions that the law applies to; None for every version.
        needs: Fields of `RowFeatures`, one of which the tokenizer must have; empty for every tokenizer.
        is_of_labels: Whether it judges labels, by the objective of a row.
        name: The name of its findings within the rule, such as `ML107.labels`; empty if the rule has no names.
    """

    rule: str
    violation: Callable[[Row, EncodedRow, Oracle], str]
    rows: Rows = "any"
    fact: Fact | None = None
    needs: tuple[str, ...] = ()
    is_of_labels: bool = False
    name: str = ""

    @property
    def case(self) -> str:
        """The name of its check."""
        return RULES[self.rule].case

    def unfit(self, oracle: Oracle) -> str:
        """Return why the law does not apply to a tokenizer; empty if it does."""
        if self.fact is not None and not self.fact(oracle.facts):
            versions = names_with(self.fact, from_then_on="{} and later")
            return f"tokenizer {oracle.version}: this law holds for {versions}"
        if self.needs and not any(getattr(oracle.features, name) for name in self.needs):
            return f"tokenizer {oracle.version}: this law is about {' and '.join(self.needs)}, which it does not have"
        return ""


def encoded_groups(row: Row, oracle: Oracle) -> list[list[int]]:
    """Return the groups of assistant messages that become turns; v2 leaves out calls before the last user message."""
    groups = row.assistant_groups()
    if oracle.facts.keeps_calls:
        return groups
    last_user = max((n for n, message in enumerate(row.messages) if message["role"] == "user"), default=-1)
    return [group for group in groups if group[0] > last_user or not row.messages[group[0]].get("tool_calls")]


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
        # slices first, token by token for a report: this law sees every row of a dataset
        masked = (IGNORE_INDEX,) * (min(span.end, len(ids)) - span.start)
        if labels[span.start : span.end] != (ids[span.start : span.end] if span.supervised else masked):
            for index in range(span.start, min(span.end, len(ids))):
                want = ids[index] if span.supervised else IGNORE_INDEX
                if labels[index] != want:
                    return f"label {labels[index]} at token {index}; its span has {want}"
    return "" if position == len(ids) else f"spans end at {position} of {len(ids)} tokens"


def owner_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """No token outside an assistant turn is supervised; by the objective `everything`, each but the first is."""
    if row.objective.turns == "everything":
        inputs, thoughts = oracle.block_ids, _thought_tokens(row, encoded, oracle)
        for span in encoded.spans:
            for at in range(span.start, span.end):
                is_left_out = at == 0 or encoded.input_ids[at] in inputs or at in thoughts
                if not span.is_answer and span.supervised == is_left_out:
                    return f"token {at} of the {span.role or 'beginning'} is {'' if is_left_out else 'not '}supervised"
        return ""
    for span in encoded.spans:
        if span.supervised and not span.is_answer:
            return f"tokens {span.start}-{span.end} of the {span.role or 'beginning'} are supervised"
    return ""


def whole_turn_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Turns of weight 1 are supervised as a whole, and turns of weight 0 are not; the row's objective weighs them."""
    of_messages = row.trained_weights()
    weights = [of_messages[group[0]] for group in encoded_groups(row, oracle)]
    turns = encoded.answer_spans
    if len(turns) != len(weights):
        return f"{len(turns)} assistant turns encoded of {len(weights)}"
    left_out = _thought_tokens(row, encoded, oracle) | _call_tokens(row, encoded, oracle)
    for weight, (turn, spans) in zip(weights, turns.items(), strict=True):
        for span in spans:
            # whole spans first: this law sees every row of a dataset
            if left_out and not left_out.isdisjoint(range(span.start, span.end)):
                if span.supervised or not left_out.issuperset(range(span.start, span.end)):
                    return f"tokens {span.start}-{span.end} of turn {turn} are supervised, against {row.objective}"
            elif span.supervised != bool(weight):
                return f"turn {turn} has weight {weight}, but is {'not all' if weight else 'in part'} supervised"
    return ""


def _thought_tokens(row: Row, encoded: EncodedRow, oracle: Oracle) -> frozenset[int]:
    """Return the tokens of thoughts, if the row's objective leaves them out."""
    if "no-thinking" not in row.objective.without:
        return frozenset()
    ids, found = encoded.input_ids, set[int]()
    opens, closes = (oracle.control_ids.get(literal) for literal in ("[THINK]", "[/THINK]"))
    for start in (at for at, token in enumerate(ids) if token == opens):
        end = next((at for at in range(start + 1, len(ids)) if ids[at] in oracle.control_tokens), len(ids))
        found |= {*range(start, end + (ids[end : end + 1] == (closes,)))}
    return frozenset(found)


def _call_tokens(row: Row, encoded: EncodedRow, oracle: Oracle) -> frozenset[int]:
    """Return the tokens of answers from their first call on, if the row's objective leaves them out."""
    if "no-calls" not in row.objective.without:
        return frozenset()
    found = set[int]()
    for spans in encoded.answer_spans.values():
        start = next((span.start for span in spans if span.kind == "tool_call"), None)
        found |= set() if start is None else {*range(start, spans[-1].end)}
    return frozenset(found)


def eos_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Every assistant turn ends with EOS, supervised like the turn."""
    without_calls = "no-calls" in row.objective.without
    for turn, spans in encoded.answer_spans.items():
        last = spans[-1].end - 1
        if encoded.input_ids[last] != oracle.eos_id:
            return f"turn {turn} ends with {oracle.piece(encoded.input_ids[last])!r} at token {last}, not with EOS"
        # a slice, because ML101 reports missing labels
        label = (encoded.labels or ())[last : last + 1]
        is_left_out = without_calls and any(span.kind == "tool_call" for span in spans)
        # a thought in front may have no loss
        is_turn_trained = any(span.supervised for span in spans) if row.objective.without else spans[0].supervised
        is_trained = is_turn_trained and not is_left_out
        if is_trained != (label == (oracle.eos_id,)):
            return f"EOS of turn {turn} at token {last} has label {label[0] if label else 'none'}"
    return ""


def bos_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """BOS occurs once, at the start, and is not supervised."""
    if encoded.input_ids[:1] != (oracle.bos_id,) or encoded.input_ids.count(oracle.bos_id) != 1:
        places = [index for index, token in enumerate(encoded.input_ids) if token == oracle.bos_id]
        return f"BOS at tokens {places}; it belongs at token 0 only"
    return "BOS is supervised" if encoded.labels is not None and encoded.labels[0] != IGNORE_INDEX else ""


def scan_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The labels read off the control tokens equal the row's labels, if each answer has a loss."""
    if not row.objective.is_default:
        return ""
    scanned = scan_labels(encoded.input_ids, oracle)
    if scanned == encoded.labels or scanned is None or encoded.labels is None:
        return ""
    if len(scanned) != len(encoded.labels):
        return f"{len(encoded.labels)} labels for {len(scanned)} tokens"
    at = equal_beginning(scanned, encoded.labels)
    return f"label {encoded.labels[at]} at token {at}; the control tokens give {scanned[at]}"


def injection_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """No control id inside a text, and breaking the literals in the texts changes no count of control ids."""
    for span in encoded.spans:
        if span.kind == "text":
            for index in range(span.start, span.end):
                if encoded.input_ids[index] in oracle.control_tokens:
                    return f"control token {oracle.piece(encoded.input_ids[index])} inside a text, at token {index}"

    def broken(value: Any) -> Any:
        # a hyphen in every control token that the row's texts spell
        if isinstance(value, str):
            return oracle.control_pattern.sub(lambda match: match[0][0] + "-" + match[0][1:], value)
        if isinstance(value, Mapping):
            return {key: broken(item) for key, item in value.items()}
        return [broken(item) for item in value] if isinstance(value, list | tuple) else value

    harmless = oracle.encode(parse_row(broken(row.to_json())))
    controls, expected = (
        [token for token in encoding.input_ids if token in oracle.control_tokens] for encoding in (encoded, harmless)
    )
    if controls != expected:
        return "control tokens change when the row's texts do not spell them any more"
    return ""


def chunk_markers_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each chunk of the assistant stands between its markers, such as a thought, which may be left open."""
    literals = {literal for kind in chunk_types().values() for literal in kind.literals}
    markers = {token: name for token, name in oracle.control_tokens.items() if name in literals}
    turns = encoded.answer_spans
    # ML109 reports surplus and missing turns
    for group, (turn, spans) in zip(encoded_groups(row, oracle), turns.items(), strict=False):
        chunks = merged_chunks((row.messages[n].get("content") for n in group), oracle.facts)
        expected: list[str] = []
        for chunk in chunks:
            expected += type_of(chunk).markers(chunk)
        ids = (token for span in spans for token in encoded.input_ids[span.start : span.end])
        found = [markers[token] for token in ids if token in markers]
        if found != expected:
            return f"turn {turn} has the markers {' '.join(found) or 'none'}; its chunks have {' '.join(expected)}"
    return ""


def assistant_text_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each assistant turn decodes to the text of its messages."""
    groups = encoded_groups(row, oracle)
    turns = encoded.answer_spans
    if len(turns) != len(groups):
        return f"{len(turns)} assistant turns encoded of {len(groups)}"
    for group, (turn, spans) in zip(groups, turns.items(), strict=True):
        text = assistant_text((row.messages[n].get("content") for n in group), oracle.facts)
        decoded = "".join(oracle.decode(encoded.input_ids[s.start : s.end]) for s in spans if s.kind == "text")
        if decoded != as_decoded(text, oracle):
            return f"turn {turn} decodes to {decoded!r}; the assistant's text is {text!r}"
    return ""


def tool_call_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Each turn with calls has one run of tokens from [TOOL_CALLS] to EOS, and it holds the calls."""
    groups = encoded_groups(row, oracle)
    # ML109 reports surplus and missing turns
    for group, (turn, spans) in zip(groups, encoded.answer_spans.items(), strict=False):
        calls = [call for n in group for call in row.messages[n].get("tool_calls") or ()]
        runs = [span for span in spans if span.kind == "tool_call"]
        if len(runs) != bool(calls):
            return f"turn {turn} has {len(calls)} calls in {len(runs)} runs of tokens"
        for run in runs:
            if encoded.input_ids[run.start] != oracle.tool_calls_id:
                return f"the call of turn {turn} starts with {oracle.piece(encoded.input_ids[run.start])!r}"
            if oracle.facts.calls_as != "list":
                continue
            written = json.loads(oracle.decode(encoded.input_ids[run.start : run.end]))
            expected = [(call["function"]["name"], _arguments(call, oracle)) for call in calls]
            found = [(call["name"], call["arguments"]) for call in written]
            # as text: NaN, which mistral-common writes unchanged, does not equal itself
            if found != expected and json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):
                return f"the call of turn {turn} is not the row's"
    return ""


def system_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The text of the system messages is in the row, outside the assistant's turns."""
    # in any text but the assistant's: up to v3 the prompt is a part of a user's turn, later a separate turn
    others = [span for span in encoded.spans if span.role != "assistant" and span.kind == "text"]
    other_texts = [oracle.decode(encoded.input_ids[span.start : span.end]) for span in others]
    for message in row.messages:
        if message["role"] == "system":
            for chunk in merged_chunks([message["content"]], oracle.facts):
                prompt = as_decoded(type_of(chunk).text(chunk), oracle)
                if not any(prompt in text for text in other_texts):
                    return f"the system prompt {prompt!r} is in no text of the row"
    return ""


def as_decoded(text: str, oracle: Oracle) -> str:
    """Return a text as it is decoded from its own ids."""
    # SentencePiece writes a space as U+2581, and decodes that character of a text to a space, too
    return text.replace("\u2581", " ") if oracle.kind == "spm" else text


def _arguments(call: Mapping[str, Any], oracle: Oracle) -> Any:
    arguments = call["function"].get("arguments")
    text = json.dumps(arguments, ensure_ascii=False) if not isinstance(arguments, str | None) else arguments or "{}"
    try:
        value = json.loads(text)
    except ValueError:
        return as_decoded(text, oracle)
    return json.loads(as_decoded(json.dumps(value, ensure_ascii=False), oracle))


_OPENS = ("[INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[MODEL_SETTINGS]")
_CLOSES = ("[/INST]", "[/AVAILABLE_TOOLS]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]", "[/MODEL_SETTINGS]")
_MARKERS: WeakKeyDictionary[Oracle, tuple[frozenset[int], ...]] = WeakKeyDictionary()
"""By tokenizer, the ids that open and that close a part that the model does not write, and both with BOS."""


def scan_labels(input_ids: Sequence[int], oracle: Oracle) -> tuple[int, ...] | None:
    """Return a second, independent mask: labels read off the control tokens of mistral-common's ids.

    Every answer is supervised; None for v1, which has no such tokens. Use it on such ids only: their text never holds a
    control id. On ids of a chat template, users can forge a turn.

    Args:
        input_ids: The ids of one row, BOS included.
        oracle: The tokenizer that made them.

    Returns:
        As many labels as ids: `IGNORE_INDEX` if there is no loss, otherwise the id.
    """
    if not oracle.facts.control_tokens:
        return None
    if oracle not in _MARKERS:
        names = oracle.control_tokens.items()
        kinds = [frozenset(token for token, name in names if name in group) for group in (_OPENS, _CLOSES)]
        _MARKERS[oracle] = (*kinds, frozenset({oracle.bos_id}.union(*kinds)))
    opens, closes, marks = _MARKERS[oracle]
    labels: list[int] = []
    inside, start = False, 0
    # search from mark to mark, because most tokens of a dataset are text
    for place in compress(count(), map(marks.__contains__, input_ids)):
        token = input_ids[place]
        labels += [IGNORE_INDEX] * (place - start) if inside else input_ids[start:place]
        inside = inside or token in opens
        labels.append(IGNORE_INDEX if inside or token == oracle.bos_id else token)
        inside = inside and token not in closes
        start = place + 1
    return (*labels, *([IGNORE_INDEX] * (len(input_ids) - start) if inside else input_ids[start:]))
