"""The class of a difference in ids: what the trainer did with the row instead of what mistral-common does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle.mistral_common import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.label_faults import label_faults
from pytest_mistral_lora.conformance.encoded.part_faults import part_faults
from pytest_mistral_lora.conformance.encoded.parts import Fault, decoded, parts_of, squeezed
from pytest_mistral_lora.conformance.finding import Finding, show_difference
from pytest_mistral_lora.errors import MistralLoraError

Ids = tuple[int, ...]


def id_faults(row: Row, expected: Ids, ids: Sequence[int], oracle: Oracle) -> list[Fault]:
    """Return the classes of the difference between ids and mistral-common's; nothing where they are equal.

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
        other = _other_tokenizer(row, ids, oracle)
        what = f"id {str(outside[0])[:24]}" + (f" and {len(outside) - 1} more" if outside[1:] else "")
        return [other or Fault("ML520", what, f"ids from 0 to {oracle.vocab_size - 1}")]
    cut = _cut(expected, ids, oracle)
    return [cut] if cut else _whole_row(row, expected, ids, oracle)


def _whole_row(row: Row, expected: Ids, ids: Ids, oracle: Oracle) -> list[Fault]:
    if ids and ids[0] not in oracle.control_tokens and decoded(ids[:20], oracle).lstrip().startswith("<s>"):
        return [Fault("ML524", "<s> is there as text, not as control token")]
    bos, one = _leading_bos(ids, oracle)
    cut = _cut(expected, one, oracle)
    if cut or one == expected:
        return [*bos, cut] if cut else bos
    # far too many ids have their class within the first of them
    rest = _rest(row, expected, one[: 4 * len(expected) + 1000], oracle)
    rules = {fault.rule for fault in rest}
    other = _other_tokenizer(row, ids, oracle) if rules & {"ML533", "ML534", "ML535"} else None
    return [other] if other else [*bos, *rest]


def _leading_bos(ids: Ids, oracle: Oracle) -> tuple[list[Fault], Ids]:
    """Return what is wrong with BOS, and the ids with one BOS in front."""
    count = next((n for n, token in enumerate(ids) if token != oracle.bos_id), len(ids))
    if count == 1:
        return [], ids
    found = f"BOS is there {count} times" if count else "BOS is missing"
    return [Fault("ML521", found, "BOS once, in front")], (oracle.bos_id, *ids[count:])


def _cut(expected: Ids, ids: Ids, oracle: Oracle) -> Fault | None:
    """Return what is wrong where the ids are a beginning or an end of what is expected."""
    lost = len(expected) - len(ids)
    if lost <= 0:
        return None
    if ids == expected[: len(ids)]:
        if lost == 1:
            return Fault("ML522", "the EOS at the end is missing")
        return Fault("ML531", f"cut at the end: the last {lost} of {len(expected)} tokens are missing")
    if ids == expected[lost:] and lost > 1:
        return Fault("ML531", f"cut at the start: the first {lost} of {len(expected)} tokens are missing")
    in_text = len(ids) > 1 and ids[1] not in oracle.control_tokens
    if in_text and ids[0] == oracle.bos_id and ids[1:] == expected[lost + 1 :]:
        return Fault("ML531", f"cut after BOS: {lost} of {len(expected)} tokens are missing")
    ends = len(ids) > 1 and ids[-1] == oracle.eos_id and ids[:-1] == expected[: len(ids) - 1]
    if ends and decoded(expected[len(ids) - 1 : -1], oracle).strip():
        return Fault("ML531", f"cut at the end, and EOS put there: {lost + 1} of {len(expected)} tokens are missing")
    return None


def _rest(row: Row, expected: Ids, ids: Ids, oracle: Oracle) -> list[Fault]:
    if _without_system(row, oracle) == ids:
        return [Fault("ML525", "the system prompt is not there")]
    if not _shares_a_text(row, ids, oracle):
        return [Fault("ML535", f"it says {_excerpt(decoded(ids, oracle))}, and no text of the row")]
    found = parts_of(ids, oracle)
    wanted = parts_of(expected, oracle)
    if wanted == found:
        return [Fault("ML532", "the text is right, and its ids are others")]
    first: dict[str, Fault] = {}
    for fault in part_faults(row, wanted, found):
        first.setdefault(fault.rule, fault)
    return list(first.values()) or [Fault("ML534", "the row is encoded in another way")]


def _without_system(row: Row, oracle: Oracle) -> Ids | None:
    """Return the ids of the row without its system prompt; None where there is none, or without it no row."""
    rest = tuple(message for message in row.messages if message["role"] != "system")
    if len(rest) == len(row.messages):
        return None
    return _encode(Row(rest, row.tools), oracle)


def _encode(row: Row, oracle: Oracle) -> Ids | None:
    try:
        return oracle.encode(row).input_ids
    except MistralLoraError:
        return None


def _shares_a_text(row: Row, ids: Ids, oracle: Oracle) -> bool:
    """Return whether any text of the users or the assistants is there; a row without texts always shares one."""
    spelled = squeezed("".join(part.spelled for part in parts_of(ids, oracle)))
    texts = [squeezed(text_of(message.get("content"))) for message in row.messages if message["role"] != "tool"]
    names = [call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()]
    said = [text for text in (*texts, *names) if text]
    return not said or any(text in spelled for text in said)


def _other_tokenizer(row: Row, ids: Ids, oracle: Oracle) -> Fault | None:
    """Return a fault that names the shipped tokenizer that gives exactly these ids, if one does."""
    for name in SHIPPED:
        other = _shipped(name)
        if other is not None and other.sha256 != oracle.sha256 and _encode(row, other) == ids:
            return Fault("ML532", f"these are the ids of {name} ({SHIPPED[name]})", f"those of {oracle.path.name}")
    return None


@cache
def _shipped(name: str) -> Oracle | None:
    try:
        return Oracle(shipped_tokenizer(name))
    except MistralLoraError:
        return None


def _excerpt(text: str) -> str:
    return repr(text.strip()[:60] + ("…" if len(text.strip()) > 60 else ""))


@dataclass(frozen=True)
class Judged:
    """A row with what mistral-common makes of it and what a trainer made.

    Attributes:
        row: The chat row.
        expected: mistral-common's encoding.
        ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids.
        oracle: Mistral's own tokenization.
        place: Where it stands, for findings.
    """

    row: Row
    expected: EncodedRow
    ids: Sequence[int]
    labels: Sequence[int]
    oracle: Oracle
    place: str

    @cached_property
    def sound(self) -> bool:
        """Whether ids and labels are exactly mistral-common's."""
        return tuple(self.ids) == self.expected.input_ids and tuple(self.labels) == self.expected.labels

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of what is wrong: ids first, then labels."""
        if not self.sound:
            yield from self.id_findings()
            yield from self._label_findings()

    def id_findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of what is wrong with the ids."""
        sides = (self.expected.input_ids, None), (self.ids, None)
        faults = id_faults(self.row, self.expected.input_ids, self.ids, self.oracle)
        yield from self._as_findings(faults, show_difference(*sides, self.oracle.piece) if faults else "")

    def _label_findings(self) -> Iterator[Finding]:
        sides = (self.expected.input_ids, self.expected.labels), (self.ids, self.labels)
        faults = label_faults(self.expected, self.ids, self.labels, self.oracle)
        yield from self._as_findings(faults, show_difference(*sides, self.oracle.piece) if faults else "")

    def _as_findings(self, faults: Iterable[Fault], detail: str) -> Iterator[Finding]:
        for fault in faults:
            yield Finding(fault.rule, fault.found, self.place, fault.expected, detail, self.row.to_jsonl())


def row_findings(row: Row, input_ids: Sequence[int], labels: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding for each class of what a trainer made wrong of a row; nothing where all is well.

    Args:
        row: The chat row.
        input_ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids; -100 where there is no loss.
        oracle: Mistral's own tokenization.

    Raises:
        OracleRejection: If mistral-common refuses the row.
    """
    judged = Judged(row, oracle.encode(row), input_ids, labels, oracle, row.place)
    if len(labels) == len(input_ids):
        yield from judged.findings()
        return
    found = f"{len(labels)} labels for {len(input_ids)} tokens"
    yield Finding("ML540", found, row.place, "one label for each token", row=row.to_jsonl())
    yield from judged.id_findings()
