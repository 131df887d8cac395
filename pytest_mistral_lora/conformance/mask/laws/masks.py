"""Laws of the mask: who is supervised, from which token to which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.mask.laws.turns import assistant_turns, spoken_groups

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


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
    turns = assistant_turns(encoded)
    if len(turns) != len(weights):
        return f"{len(turns)} assistant turns encoded of {len(weights)}"
    for weight, (turn, spans) in zip(weights, turns.items(), strict=True):
        if any(span.supervised != bool(weight) for span in spans):
            return f"turn {turn} has weight {weight}, but is {'not all' if weight else 'in part'} supervised"
    return ""


def eos_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """Every assistant turn ends with EOS, supervised as the turn is."""
    for turn, spans in assistant_turns(encoded).items():
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


def scan_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The labels read off the control tokens are the row's labels."""
    from pytest_mistral_lora.chat.labels import scan_labels

    scanned = scan_labels(encoded.input_ids, oracle)
    if scanned == encoded.labels or scanned is None or encoded.labels is None:
        return ""
    if len(scanned) != len(encoded.labels):
        return f"{len(encoded.labels)} labels for {len(scanned)} tokens"
    at = next(n for n, pair in enumerate(zip(scanned, encoded.labels, strict=True)) if pair[0] != pair[1])
    return f"label {encoded.labels[at]} at token {at}; the control tokens say {scanned[at]}"
