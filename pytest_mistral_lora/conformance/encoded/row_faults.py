"""The classes of one row: its ids and labels as a trainer made them, beside mistral-common's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.alignment import Alignment
from pytest_mistral_lora.conformance.encoded import EncodingFault
from pytest_mistral_lora.conformance.encoded.label_faults import label_faults
from pytest_mistral_lora.conformance.encoded.lines import Ids
from pytest_mistral_lora.conformance.encoded.marked_text import decode_text, is_same_conversation, split_at_markers
from pytest_mistral_lora.conformance.encoded.text_faults import TextComparison
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import MistralLoraError, and_more


def id_faults(row: Row, expected: Ids, ids: Sequence[int], oracle: Oracle) -> list[EncodingFault]:
    """Return the classes of the difference between ids and mistral-common's; nothing if they are equal.

    Args:
        row: The chat row.
        expected: mistral-common's ids of the row.
        ids: The trainer's, without padding.
        oracle: Mistral's own tokenization.
    """
    ids = tuple(ids)
    if ids == expected:
        return []
    outside = [token for token in ids if not 0 <= token < oracle.vocab_size]
    if outside:
        found = f"id {str(outside[0])[:24]}{and_more(1, len(outside))}"
        fault = EncodingFault("ML520", found, f"ids from 0 to {oracle.vocab_size - 1}")
        return [_other_tokenizer(row, ids, oracle) or fault]
    cut = _cut_fault(expected, ids, oracle)
    if cut:
        return [cut]
    if ids and ids[0] not in oracle.control_tokens and decode_text(ids[:20], oracle).lstrip().startswith("<s>"):
        return [EncodingFault("ML524", "<s> is there as text, not as control token")]
    count = next((n for n, token in enumerate(ids) if token != oracle.bos_id), len(ids))
    bos = []
    with_bos = ids
    if count != 1:
        found = f"BOS is there {count} times" if count else "BOS is missing"
        bos = [EncodingFault("ML521", found, "BOS once, in front")]
        with_bos = (oracle.bos_id, *ids[count:])
    cut = _cut_fault(expected, with_bos, oracle)
    if cut or with_bos == expected:
        return [*bos, cut] if cut else bos
    # A row with far too many ids has its class within the first of them; decoding and comparing them all is slow.
    rest = _content_faults(row, expected, with_bos[: 4 * len(expected) + 1000], oracle)
    # Ids of another vocabulary look like other texts or turns.
    looks_like_another = {fault.rule for fault in rest} & {"ML533", "ML534", "ML535"}
    other = _other_tokenizer(row, ids, oracle) if looks_like_another else None
    return [other] if other else [*bos, *rest]


def _cut_fault(expected: Ids, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids that are a beginning or an end of the expected ones, else None."""
    lost = len(expected) - len(ids)
    if lost <= 0:
        return None
    if ids == expected[: len(ids)]:
        if lost == 1:
            return EncodingFault("ML522", "the EOS at the end is missing")
        return EncodingFault("ML531", f"cut at the end: the last {lost} of {len(expected)} tokens are missing")
    if ids == expected[lost:] and lost > 1:
        return EncodingFault("ML531", f"cut at the start: the first {lost} of {len(expected)} tokens are missing")
    in_text = len(ids) > 1 and ids[1] not in oracle.control_tokens
    if in_text and ids[0] == oracle.bos_id and ids[1:] == expected[lost + 1 :]:
        return EncodingFault("ML531", f"cut after BOS: {lost} of {len(expected)} tokens are missing")
    ends = len(ids) > 1 and ids[-1] == oracle.eos_id and ids[:-1] == expected[: len(ids) - 1]
    # trailing spaces that a template drops before EOS are no cut
    if ends and decode_text(expected[len(ids) - 1 : -1], oracle).strip():
        found = f"cut at the end, and EOS put there: {lost + 1} of {len(expected)} tokens are missing"
        return EncodingFault("ML531", found)
    return None


def _content_faults(row: Row, expected: Ids, ids: Ids, oracle: Oracle) -> list[EncodingFault]:
    """Return the classes of ids that begin with one BOS and are not a cut row; at least one."""
    rest = tuple(message for message in row.messages if message["role"] != "system")
    if len(rest) < len(row.messages) and _ids_of(replace(row, messages=rest), oracle) == ids:
        return [EncodingFault("ML525", "the system prompt is not there")]
    found, wanted = split_at_markers(ids, oracle), split_at_markers(expected, oracle)
    texts = [text_of(message.get("content")) for message in row.messages if message["role"] != "tool"]
    names = [call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()]
    own = [text for text in (*texts, *names) if text]
    if own and not is_same_conversation(own, "".join(part.spelled for part in found)):
        text = decode_text(ids, oracle).strip()
        excerpt = repr(text[:60] + ("…" if len(text) > 60 else ""))
        return [EncodingFault("ML535", f"it says {excerpt}, and no text of the row")]
    if wanted == found:
        return [EncodingFault("ML532", "the text is right, and its ids are others")]
    first: dict[str, EncodingFault] = {}
    for fault in TextComparison(row, wanted, found).faults():
        first.setdefault(fault.rule, fault)
    return list(first.values()) or [EncodingFault("ML534", "the row is encoded in another way")]


def _ids_of(row: Row, oracle: Oracle) -> Ids | None:
    try:
        return oracle.encode(row).input_ids
    except MistralLoraError:
        return None


def _other_tokenizer(row: Row, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return a fault that names the shipped tokenizer that gives exactly these ids, if one does."""
    for name in SHIPPED:
        other = _shipped_oracle(name)
        if other is not None and other.sha256 != oracle.sha256 and _ids_of(row, other) == ids:
            found = f"these are the ids of {name} ({SHIPPED[name]})"
            return EncodingFault("ML532", found, f"those of {oracle.path.name}")
    return None


@cache
def _shipped_oracle(name: str) -> Oracle | None:
    # an older mistral-common ships fewer tokenizers
    try:
        return Oracle(shipped_tokenizer(name))
    except MistralLoraError:
        return None


@dataclass(frozen=True)
class EncodedRowComparison:
    """A row with mistral-common's encoding and a trainer's.

    Attributes:
        row: The chat row.
        expected: mistral-common's encoding.
        ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids.
        oracle: Mistral's own tokenization.
        place: File and line of the row, for findings.
    """

    row: Row
    expected: EncodedRow
    ids: Sequence[int]
    labels: Sequence[int]
    oracle: Oracle
    place: str

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of the differences: ids first, then labels."""
        if tuple(self.ids) == self.expected.input_ids and tuple(self.labels) == self.expected.labels:
            return
        yield from self.id_findings()
        faults = label_faults(self.expected, self.ids, self.labels, self.oracle)
        if faults:
            sides = (self.expected.input_ids, self.expected.labels), (self.ids, self.labels)
            yield from self._place_faults(faults, Alignment(*sides, self.oracle.piece, spans=self.expected.spans))

    def id_findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of the difference in ids."""
        faults = id_faults(self.row, self.expected.input_ids, self.ids, self.oracle)
        if faults:
            sides = (self.expected.input_ids, None), (self.ids, None)
            yield from self._place_faults(faults, Alignment(*sides, self.oracle.piece, spans=self.expected.spans))

    def _place_faults(self, faults: list[EncodingFault], difference: Alignment) -> Iterator[Finding]:
        parts, row = difference.parts(self.place), self.row.to_jsonl()
        for fault in faults:
            yield Finding(fault.rule, fault.found, self.place, fault.expected, row=row, **parts)


def row_findings(row: Row, input_ids: Sequence[int], labels: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding for each class of a trainer's faults in a row; nothing if the encoding is mistral-common's.

    Args:
        row: The chat row.
        input_ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids; -100 at tokens without loss.
        oracle: Mistral's own tokenization.

    Raises:
        OracleRejection: If mistral-common refuses the row.
    """
    comparison = EncodedRowComparison(row, oracle.encode(row), input_ids, labels, oracle, row.place)
    if len(labels) == len(input_ids):
        yield from comparison.findings()
        return
    found = f"{len(labels)} labels for {len(input_ids)} tokens"
    yield Finding("ML540", found, row.place, "one label for each token", row=row.to_jsonl())
    yield from comparison.id_findings()


def injection_findings(row: Row, input_ids: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield one finding for each control token that is there more or less often than the structure needs."""
    controls = oracle.control_tokens
    needed = Counter(token for token in oracle.encode(row).input_ids if token in controls)
    found = Counter(token for token in input_ids if token in controls)
    for token in sorted(needed | found):
        if needed[token] != found[token]:
            times = f"{controls[token]} (id {token}) {found[token]} times"
            yield Finding("ML106", times, row.place, f"{needed[token]} times", row=row.to_jsonl())
