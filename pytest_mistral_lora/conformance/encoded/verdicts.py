"""The verdict on one row: the classes of what is wrong with its ids and labels, as findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.difference import show_difference
from pytest_mistral_lora.conformance.encoded.fault_classes import Fault
from pytest_mistral_lora.conformance.encoded.id_faults import id_faults
from pytest_mistral_lora.conformance.encoded.label_faults import label_faults
from pytest_mistral_lora.conformance.findings import Finding


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
