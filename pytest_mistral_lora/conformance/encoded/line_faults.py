"""What is wrong with one line of an encoded-rows file: padding, packing, and each conversation's ids and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.fault_classes import Fault
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.encoded.packed import isolation_faults, match, order_faults, split
from pytest_mistral_lora.conformance.encoded.padding import Padding, padding_of
from pytest_mistral_lora.conformance.encoded.verdicts import Judged
from pytest_mistral_lora.conformance.findings import Finding


@dataclass(frozen=True)
class LineJudge:
    """A line with what mistral-common makes of its conversations.

    Attributes:
        line: The line.
        expected: mistral-common's encoding of each conversation.
        oracle: Mistral's own tokenization.
    """

    line: EncodedLine
    expected: Sequence[EncodedRow]
    oracle: Oracle

    @cached_property
    def padding(self) -> Padding:
        """Which tokens are padding."""
        whole = tuple(token for encoded in self.expected for token in encoded.input_ids)
        return padding_of(self.line, whole, self.oracle)

    @property
    def comparable(self) -> bool:
        """Whether there is one label for each id."""
        return len(self.line.labels) == len(self.line.input_ids)

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The ids without padding."""
        return tuple(self.line.input_ids[n] for n in self.padding.real)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The labels without padding's; as many as ids if the line is `comparable`."""
        return tuple(self.line.labels[n] for n in self.padding.real if n < len(self.line.labels))

    @cached_property
    def _positions(self) -> tuple[int, ...] | None:
        given = self.line.position_ids
        return None if given is None else tuple(given[n] for n in self.padding.real)

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong: padding first, then what packing did, then each conversation's ids and labels."""
        yield from self._as_findings(self.padding.faults(self.line))
        if not self.comparable:
            yield from self._without_labels()
        elif self.line.packed:
            yield from self._packed()
        else:
            if self._positions is not None:
                yield from self._as_findings(self._running_on(self._positions))
            yield from self._judged(0, 0, len(self.ids), self.labels).findings()

    def _without_labels(self) -> Iterator[Finding]:
        found = f"{len(self.line.labels)} labels for {len(self.line.input_ids)} tokens"
        yield from self._as_findings([Fault("ML540", found, "one label for each token")])
        if not self.line.packed:
            yield from self._judged(0, 0, len(self.ids), ()).id_findings()

    def _running_on(self, positions: Sequence[int]) -> Iterator[Fault]:
        """Yield a fault if the positions of a single conversation jump; where they start is of no effect."""
        for index in range(1, len(positions)):
            if positions[index] != positions[index - 1] + 1:
                expected = str(positions[index - 1] + 1)
                yield Fault("ML512", f"position {positions[index]} at token {index}", expected)
                return

    def _packed(self) -> Iterator[Finding]:
        wanted = [encoded.input_ids for encoded in self.expected]
        stretches = split(self.ids, wanted, self._positions, self.oracle)
        matches = match(self.ids, stretches, wanted)
        yield from self._as_findings(order_faults(matches, len(wanted)))
        yield from self._as_findings(isolation_faults(stretches, self._positions, self.line.attention_mask))
        labels = list(self.labels)
        for start, _ in stretches[1:]:
            if self.ids[start] == self.oracle.bos_id and labels[start] != IGNORE_INDEX:
                found = f"the BOS at token {start} is trained on: the EOS before it learns to predict it"
                yield from self._as_findings([Fault("ML514", found, "-100")])
                labels[start] = IGNORE_INDEX
        for one in matches:
            if one.wanted is not None and one.start < one.end:
                yield from self._judged(one.wanted, one.start, one.end, labels).findings()

    def _judged(self, number: int, start: int, end: int, labels: Sequence[int]) -> Judged:
        row = self.line.rows[number]
        place = f"{self.line.place}, conversations[{number}]" if self.line.packed else self.line.place
        return Judged(row, self.expected[number], self.ids[start:end], labels[start:end], self.oracle, place)

    def _as_findings(self, faults: Iterator[Fault] | list[Fault]) -> Iterator[Finding]:
        for fault in faults:
            yield Finding(fault.rule, fault.found, self.line.place, fault.expected, row=self.line.rows[0].to_jsonl())
