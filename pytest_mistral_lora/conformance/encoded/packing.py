"""One line of an encoded-rows file beside mistral-common's: padding, packed conversations, and each row in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import pairwise

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded import EncodingFault
from pytest_mistral_lora.conformance.encoded.isolation import (
    PLAIN_ROPE,
    PositionScaling,
    Stretch,
    isolation_faults,
    number_faults,
)
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, Ids, LinePadding, find_padding
from pytest_mistral_lora.conformance.encoded.row_faults import EncodedRowComparison
from pytest_mistral_lora.conformance.finding import Finding


@dataclass(frozen=True, slots=True)
class ConversationMatch:
    """A listed conversation and its stretch of a packed sequence.

    Attributes:
        listed: Its number in the line's conversations; None for a stretch that is none of them.
        stretch: Its tokens; None if the sequence does not have it.
    """

    listed: int | None
    stretch: Stretch | None


def split_conversations(ids: Ids, expected: Sequence[Ids], positions: Ids | None, oracle: Oracle) -> list[Stretch]:
    """Return the stretches of a packed sequence: one for each conversation if the sequence is sound.

    A sequence with faults is cut at each BOS, or at each position 0 if these are as many as the conversations and the
    BOS tokens are not.

    Args:
        ids: The packed ids, without padding.
        expected: mistral-common's ids of each conversation, in order.
        positions: Position ids, or None.
        oracle: Mistral's own tokenization.
    """
    ends = [0]
    for one in expected:
        if ids[ends[-1] : ends[-1] + len(one)] != one:
            break
        ends.append(ends[-1] + len(one))
    if len(ends) == len(expected) + 1 and ends[-1] == len(ids):
        return list(pairwise(ends))
    bos = [n for n, token in enumerate(ids) if token == oracle.bos_id and (n == 0 or ids[n - 1] != oracle.bos_id)]
    resets = [n for n, value in enumerate(positions or ()) if value == 0]
    starts = resets if len(bos) != len(expected) == len(resets) else bos
    return list(pairwise(sorted({0, *starts, len(ids)})))


def match_conversations(ids: Ids, stretches: Sequence[Stretch], expected: Sequence[Ids]) -> list[ConversationMatch]:
    """Match stretches and conversations: equal ones first, in order and out of it, then the most similar ones."""
    found = [ids[start:end] for start, end in stretches]
    # equal ones in order first, so that a lost conversation does not shift all that follow
    pairs: dict[int, int] = {}
    for block in SequenceMatcher(None, list(expected), found, autojunk=False).get_matching_blocks():
        pairs.update({block.a + n: block.b + n for n in range(block.size)})
    for listed, wanted in enumerate(expected):
        taken = set(pairs.values())
        same = [n for n in range(len(found)) if n not in taken and found[n] == wanted]
        if listed not in pairs and same:
            pairs[listed] = same[0]
    free = [n for n in range(len(found)) if n not in pairs.values()]
    for listed, wanted in enumerate(expected):
        if listed not in pairs and free:
            # a conversation with a fault still begins, or else ends, like itself
            shared = {n: _shared(wanted, found[n], 1) + _shared(wanted, found[n], -1) for n in free}
            pairs[listed] = max(free, key=lambda n: (shared[n], -n))
            free.remove(pairs[listed])
    return [
        *(ConversationMatch(listed, stretches[n]) for listed, n in sorted(pairs.items())),
        *(ConversationMatch(listed, None) for listed in range(len(expected)) if listed not in pairs),
        *(ConversationMatch(None, stretches[n]) for n in free),
    ]


def _shared(one: Ids, two: Ids, step: int) -> int:
    """Return how many tokens two stretches share at their beginning, or with a step of -1 at their end."""
    first = 0 if step > 0 else -1
    most = min(len(one), len(two))
    return next((n for n in range(most) if one[first + step * n] != two[first + step * n]), most)


def order_faults(matches: Sequence[ConversationMatch], count: int) -> Iterator[EncodingFault]:
    """Yield the conversations that a packed sequence lost or has too many of, and a wrong order."""
    lost = [match.listed for match in matches if match.stretch is None]
    extra = [match.stretch for match in matches if match.listed is None and match.stretch is not None]
    if lost:
        yield EncodingFault("ML515", f"conversations {lost} of {count} are not there")
    if extra:
        start, end = extra[0]
        yield EncodingFault("ML515", f"tokens {start} to {end} are none of its conversations")
    starts = [match.stretch[0] for match in matches if match.listed is not None and match.stretch is not None]
    if starts != sorted(starts):
        yield EncodingFault("ML516", "the conversations stand in another order than they are listed")


@dataclass(frozen=True)
class EncodedLineComparison:
    """A line with mistral-common's encoding of each of its conversations.

    Attributes:
        line: The line.
        expected: mistral-common's encoding of each conversation.
        oracle: Mistral's own tokenization.
        scaling: The model's use of positions.
    """

    line: EncodedLine
    expected: Sequence[EncodedRow]
    oracle: Oracle
    scaling: PositionScaling = PLAIN_ROPE

    @cached_property
    def padding(self) -> LinePadding:
        """The line's tokens, apart by padding or not."""
        whole = tuple(token for encoded in self.expected for token in encoded.input_ids)
        return find_padding(self.line, whole, self.oracle)

    @property
    def comparable(self) -> bool:
        """Whether there is one label for each id."""
        return len(self.line.labels) == len(self.line.input_ids)

    @cached_property
    def ids(self) -> Ids:
        """The ids without padding."""
        return tuple(self.line.input_ids[n] for n in self.padding.real)

    @cached_property
    def labels(self) -> Ids:
        """The labels without padding's; as many as ids if the line is `comparable`."""
        return tuple(self.line.labels[n] for n in self.padding.real if n < len(self.line.labels))

    def findings(self) -> Iterator[Finding]:
        """Yield the findings of the line: padding first, then packing, then each conversation's ids and labels."""
        yield from self._place_faults(self.padding.faults(self.line))
        positions, mask = (
            None if given is None else tuple(given[n] for n in self.padding.real)
            for given in (self.line.position_ids, self.line.attention_mask)
        )
        if not self.comparable:
            found = f"{len(self.line.labels)} labels for {len(self.line.input_ids)} tokens"
            yield from self._place_faults([EncodingFault("ML540", found, "one label for each token")])
            if not self.line.packed:
                yield from self._compare(0, (0, len(self.ids)), ()).id_findings()
        elif self.line.packed:
            yield from self._packed_findings(positions, mask)
        else:
            yield from self._place_faults(number_faults([(0, len(self.ids))], mask or ()))
            if positions and positions[0] and self.scaling.matters(positions):
                found = f"position {positions[0]} at token 0; the model scales by the position ({self.scaling.key})"
                yield from self._place_faults([EncodingFault("ML512", found, "0")])
            # only jumps matter in a single conversation: rotary positions are relative, so any start will do
            for n, (before, after) in enumerate(pairwise(positions or ()), start=1):
                if after != before + 1:
                    fault = EncodingFault("ML512", f"position {after} at token {n}", str(before + 1))
                    yield from self._place_faults([fault])
                    break
            yield from self._compare(0, (0, len(self.ids)), self.labels).findings()

    def _packed_findings(self, positions: Ids | None, mask: Ids | None) -> Iterator[Finding]:
        wanted = [encoded.input_ids for encoded in self.expected]
        stretches = split_conversations(self.ids, wanted, positions, self.oracle)
        matches = match_conversations(self.ids, stretches, wanted)
        yield from self._place_faults(order_faults(matches, len(wanted)))
        yield from self._place_faults(isolation_faults(stretches, positions, mask, self.scaling))
        labels = list(self.labels)
        for start, _ in stretches[1:]:
            if self.ids[start] == self.oracle.bos_id and labels[start] != IGNORE_INDEX:
                found = f"the BOS at token {start} is trained on: the EOS before it learns to predict it"
                yield from self._place_faults([EncodingFault("ML514", found, "-100")])
                labels[start] = IGNORE_INDEX  # else the conversation would be reported for it as well
        for match in matches:
            if match.listed is not None and match.stretch is not None:
                yield from self._compare(match.listed, match.stretch, labels).findings()

    def _compare(self, number: int, stretch: Stretch, labels: Sequence[int]) -> EncodedRowComparison:
        row, tokens = self.line.rows[number], slice(*stretch)
        place = f"{self.line.place}, conversations[{number}]" if self.line.packed else self.line.place
        return EncodedRowComparison(row, self.expected[number], self.ids[tokens], labels[tokens], self.oracle, place)

    def _place_faults(self, faults: Iterable[EncodingFault]) -> Iterator[Finding]:
        for fault in faults:
            yield Finding(fault.rule, fault.found, self.line.place, fault.expected, row=self.line.rows[0].to_jsonl())
