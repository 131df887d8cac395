"""Packed sequences: split back into conversations, and what keeps those apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import pairwise

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, Padding, padding_of
from pytest_mistral_lora.conformance.encoded.parts import Fault
from pytest_mistral_lora.conformance.encoded.verdicts import Judged
from pytest_mistral_lora.conformance.finding import Finding

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """One conversation of a packed sequence and where it was found.

    Attributes:
        wanted: Its number in the line's conversations; None for a stretch that is none of them.
        start: First token of the stretch.
        end: One past its last; equal to `start` where the conversation was not found.
    """

    wanted: int | None
    start: int
    end: int


def split(ids: Ids, expected: Sequence[Ids], positions: Ids | None, oracle: Oracle) -> list[tuple[int, int]]:
    """Return the stretches of a packed sequence, one for each conversation where it can be told.

    Args:
        ids: The packed ids, without padding.
        expected: mistral-common's ids of each conversation, in order.
        positions: Position ids, or None.
        oracle: Mistral's own tokenization.
    """
    exact = _exact(ids, expected)
    if exact is not None:
        return exact
    bos = [n for n, token in enumerate(ids) if token == oracle.bos_id and (n == 0 or ids[n - 1] != oracle.bos_id)]
    resets = [n for n, value in enumerate(positions or ()) if value == 0]
    starts = resets if len(bos) != len(expected) == len(resets) else bos
    edges = sorted({0, *starts, len(ids)})
    return list(pairwise(edges))


def _exact(ids: Ids, expected: Sequence[Ids]) -> list[tuple[int, int]] | None:
    stretches, start = [], 0
    for one in expected:
        if ids[start : start + len(one)] != one:
            return None
        stretches.append((start, start + len(one)))
        start += len(one)
    return stretches if start == len(ids) else None


def match(ids: Ids, stretches: Sequence[tuple[int, int]], expected: Sequence[Ids]) -> list[Match]:
    """Match stretches and conversations: equal ones first, in order and out of it, then those that are left over."""
    found = [ids[start:end] for start, end in stretches]
    pairs: dict[int, int] = {}
    for block in SequenceMatcher(None, list(expected), found, autojunk=False).get_matching_blocks():
        pairs.update({block.a + n: block.b + n for n in range(block.size)})
    _match_elsewhere(expected, found, pairs)
    free = [n for n in range(len(found)) if n not in pairs.values()]
    for wanted in range(len(expected)):
        if wanted not in pairs and free:
            pairs[wanted] = free.pop(_nearest(expected[wanted], [found[n] for n in free]))
    lost = [Match(wanted, 0, 0) for wanted in range(len(expected)) if wanted not in pairs]
    return [
        *(Match(wanted, *stretches[n]) for wanted, n in sorted(pairs.items())),
        *lost,
        *(Match(None, *stretches[n]) for n in free),
    ]


def _match_elsewhere(expected: Sequence[Ids], found: Sequence[Ids], pairs: dict[int, int]) -> None:
    for wanted in range(len(expected)):
        taken = set(pairs.values())
        same = [n for n in range(len(found)) if n not in taken and found[n] == expected[wanted]]
        if wanted not in pairs and same:
            pairs[wanted] = same[0]


def _nearest(wanted: Ids, found: Sequence[Ids]) -> int:
    """Return which of the stretches begins, or else ends, most like a conversation."""
    return max(range(len(found)), key=lambda n: (_shared(wanted, found[n], 1) + _shared(wanted, found[n], -1), -n))


def _shared(one: Ids, two: Ids, step: int) -> int:
    """Return how many tokens two stretches share at their beginning, or with a step of -1 at their end."""
    first = 0 if step > 0 else -1
    most = min(len(one), len(two))
    return next((n for n in range(most) if one[first + step * n] != two[first + step * n]), most)


def order_faults(matches: Sequence[Match], count: int) -> Iterator[Fault]:
    """Yield what is wrong with which conversations a packed sequence holds, and in which order."""
    lost = [m.wanted for m in matches if m.wanted is not None and m.start == m.end]
    extra = [m for m in matches if m.wanted is None]
    if lost:
        yield Fault("ML515", f"conversations {lost} of {count} are not there")
    if extra:
        yield Fault("ML515", f"tokens {extra[0].start} to {extra[0].end} are none of its conversations")
    starts = [m.start for m in matches if m.wanted is not None and m.start < m.end]
    if starts != sorted(starts):
        yield Fault("ML516", "the conversations stand in another order than they are listed")


def isolation_faults(stretches: Sequence[tuple[int, int]], positions: Ids | None, mask: Ids | None) -> Iterator[Fault]:
    """Yield why the conversations of a sequence can see each other.

    Args:
        stretches: Where each conversation is, in real tokens.
        positions: Position ids of the real tokens, or None.
        mask: Attention mask of the whole line, or None; a number for each conversation keeps them apart.
    """
    if len(stretches) > 1 and mask is not None and max(mask, default=0) < 2:
        yield Fault("ML513", "an attention mask of ones is given", "none, so that position_ids keep them apart")
    if positions is None:
        if len(stretches) > 1:
            yield Fault("ML512", "no position_ids", "position_ids that start at 0 for each conversation")
        return
    wanted = [n - start for start, end in stretches for n in range(start, end)]
    wrong = next((n for n, (a, b) in enumerate(zip(positions, wanted, strict=True)) if a != b), None)
    if wrong is not None:
        yield Fault("ML512", f"position {positions[wrong]} at token {wrong}", str(wanted[wrong]))


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
