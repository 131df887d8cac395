"""A line of an encoded-rows file, and each of its rows, compared with mistral-common's encoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, why_without_loss
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, LinePadding, find_padding
from pytest_mistral_lora.conformance.encoded.packing import (
    COUNT_THROUGH,
    MOST_POSITIONS,
    PLAIN_ROPE,
    ConversationMatch,
    PositionScaling,
    Stretch,
    isolation_faults,
    jump_fault,
    match_conversations,
    number_faults,
    order_faults,
    runs_on_apart,
    split_conversations,
)
from pytest_mistral_lora.conformance.encoded.row_faults import id_faults, label_faults, outside_fault
from pytest_mistral_lora.conformance.finding import RULES, Finding, shown_difference
from pytest_mistral_lora.conformance.row_pass import Origin
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place

_OF_OBJECTIVE = frozenset({"ML543", "ML544", "ML547", "ML549", "ML550", "ML551"})
"""Rules on labels whose fixes say what is trained on, which a declared objective says otherwise."""

_NO_TEXT = "\N{REPLACEMENT CHARACTER}"
"""What stands in a row that is read back for an id without a text."""


def _fix_by(objective: Objective) -> str:
    """Return the fix of labels that differ from a declared objective; empty if none is declared."""
    if objective.is_default:
        return ""
    return (
        f"Give a loss to the tokens of the objective `{objective}` alone: {objective.meaning}. Or, if you mean these "
        "labels, declare their objective."
    )


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
        judges_labels: Whether the labels are compared: not if no word expresses the objective.
        origin: Where the row comes from.
    """

    row: Row
    expected: EncodedRow
    ids: Sequence[int]
    labels: Sequence[int]
    oracle: Oracle
    place: Place
    judges_labels: bool = True
    origin: Origin = "written"

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of the differences: ids first, then labels."""
        is_exact = tuple(self.ids) == self.expected.input_ids and tuple(self.labels) == self.expected.labels
        yield from () if is_exact else self.id_findings()
        if not self.judges_labels:
            return
        is_asked_for = self.expected.supervised_tokens or not self.row.kind.is_chat or not self.row.messages
        if not is_asked_for and self.labels.count(IGNORE_INDEX) == len(self.labels):
            # that of the rule alone: in words, a trainer's own setting follows, which does not mend the rows' weights
            found, fix = why_without_loss(self.row), RULES["ML605"].fix_text
            yield Finding("ML605", found, self.place, row=self.row.to_jsonl(), fix=fix)
        if is_exact:
            return
        faults = label_faults(self.expected, self.ids, self.labels, self.oracle, self.row.objective)
        if faults:
            sides = (self.expected.input_ids, self.expected.labels), (self.ids, self.labels)
            yield from self._place_faults(faults, TokenDiff.of(*sides, self.oracle.piece, spans=self.expected.spans))

    def id_findings(self) -> Iterator[Finding]:
        """Yield a finding for each class of the difference in ids."""
        faults = id_faults(self.row, self.expected.input_ids, self.ids, self.oracle)
        if faults:
            sides = (self.expected.input_ids, None), (self.ids, None)
            yield from self._place_faults(faults, TokenDiff.of(*sides, self.oracle.piece, spans=self.expected.spans))

    def _place_faults(self, faults: list[EncodingFault], difference: TokenDiff) -> Iterator[Finding]:
        parts, row = shown_difference(difference, self.place), self.row.to_jsonl()
        if outside_fault(tuple(self.ids), self.oracle) and _NO_TEXT in row:
            parts, row = {}, ""  # read back from ids that have no text
        for fault in faults:
            expected = fault.expected
            if fault.rule == "ML543" and self.row.kind.takes_objective and self.row.objective.is_default:
                expected += ", or, if you mean it, a declaration (--objective everything)"
            fix = fault.fix or (_fix_by(self.row.objective) if fault.rule in _OF_OBJECTIVE else "")
            # ids alone do not say that an answer has a loss
            rule = "ML605" if fault.rule == "ML544" and self.origin == "read back" else fault.rule
            yield Finding(rule, fault.found, self.place, expected, row=row, fix=fix, **parts)


@dataclass(frozen=True)
class EncodedLineComparison:
    """A line with mistral-common's encoding of each of its conversations.

    Attributes:
        line: The line.
        expected: mistral-common's encoding of each conversation.
        oracle: Mistral's own tokenization.
        scaling: The model's use of positions.
        judges_labels: As for `EncodedRowComparison`.
        origin: As for `EncodedRowComparison`.
    """

    line: EncodedLine
    expected: Sequence[EncodedRow]
    oracle: Oracle
    scaling: PositionScaling = PLAIN_ROPE
    judges_labels: bool = True
    origin: Origin = "written"

    @cached_property
    def padding(self) -> LinePadding:
        """The line's tokens, divided into row and padding."""
        whole = tuple(chain.from_iterable(encoded.input_ids for encoded in self.expected))
        return find_padding(self.line, whole, self.oracle)

    @property
    def comparable(self) -> bool:
        """Whether there is one label for each id, and the labels are judged."""
        return self.judges_labels and self._has_labels and self._is_labelled

    @property
    def _is_labelled(self) -> bool:
        return len(self.line.labels) == len(self.line.input_ids)

    @property
    def _has_labels(self) -> bool:
        return self.line.side is None or self.line.side.has_labels

    @cached_property
    def ids(self) -> Ids:
        """The ids without padding."""
        if len(self.padding.real) == len(self.line.input_ids):
            return self.line.input_ids
        return tuple(self.line.input_ids[n] for n in self.padding.real)

    @cached_property
    def labels(self) -> Ids:
        """The labels without those of the padding; as many as ids if the line is `comparable`."""
        if len(self.padding.real) == len(self.line.input_ids) >= len(self.line.labels):
            return self.line.labels
        return tuple(self.line.labels[n] for n in self.padding.real if n < len(self.line.labels))

    def _of_row(self, column: Ids | None) -> Ids | None:
        """Return a column beside the ids without its padding; None if there is none."""
        return None if column is None else tuple(column[n] for n in self.padding.real)

    @property
    def runs_on(self) -> bool:
        """Whether the positions of a packed sequence run on, under a mask that keeps its conversations apart."""
        # without position ids, a model counts through
        positions = self._of_row(self.line.position_ids) or range(len(self.ids))
        return self.line.packed and runs_on_apart(positions, self._of_row(self.line.attention_mask), self.scaling)

    @cached_property
    def _stretches(self) -> list[Stretch]:
        """The stretches of a packed sequence."""
        wanted = [encoded.input_ids for encoded in self.expected]
        return split_conversations(self.ids, wanted, self._of_row(self.line.position_ids), self.oracle)

    @cached_property
    def _matches(self) -> list[ConversationMatch]:
        """The conversations of a packed sequence, each with its stretch."""
        return list(match_conversations(self.ids, self._stretches, [one.input_ids for one in self.expected]))

    def findings(self) -> Iterator[Finding]:
        """Yield the findings of the line: padding first, then packing, then each conversation's ids and labels."""
        yield from self._place_faults(self.padding.faults(self.line))
        positions, mask = self._of_row(self.line.position_ids), self._of_row(self.line.attention_mask)
        yield from self._place_faults(self._mask_faults())
        yield from self._place_faults(self._length_faults())
        if not self._has_labels:
            yield from self._compare(0, (0, len(self.ids)), ()).id_findings()
        elif not self._is_labelled:
            found = f"{len(self.line.labels)} labels for {len(self.line.input_ids)} tokens"
            yield from self._place_faults([EncodingFault("ML540", found, "one label for each token")])
            if not self.line.packed:
                yield from self._compare(0, (0, len(self.ids)), ()).id_findings()
        elif self.line.packed:
            yield from self._packed_findings(positions, mask)
        else:
            yield from self._place_faults(self._number_faults([(0, len(self.ids))]))
            if mask and max(mask) > 1:
                yield from self._place_faults(self._faults_of_one(mask))
            yield from self._place_faults(self._position_faults(positions or ()))
            yield from self._compare(0, (0, len(self.ids)), self.labels).findings()

    def _faults_of_one(self, mask: Ids) -> Iterator[EncodingFault]:
        """Yield the faults of an attention mask with numbers above 1 beside a single conversation."""
        yield from number_faults([(0, len(self.ids))], mask)
        # without a 1 in front, the numbers do not count conversations: a kernel that sums the mask reads a length of it
        if 1 not in (self.line.attention_mask or ()):
            found = f"the row has one conversation, and attention_mask is {mask[0]} at its first token"
            yield EncodingFault("ML517", found, "1 at each token of the row, and 0 at padding")

    def _position_faults(self, positions: Ids) -> Iterator[EncodingFault]:
        """Yield the fault of the positions of a single conversation, if they have one.

        Rotary positions are relative, so any start will do if the model does not scale by the position.
        """
        jump = next((n for n, (before, after) in enumerate(pairwise(positions), start=1) if after != before + 1), 0)
        if jump:
            yield jump_fault(self.ids, positions, jump, str(positions[jump - 1] + 1), self.oracle)
        elif positions and positions[0] < 0:
            yield EncodingFault("ML512", f"position {positions[0]} at token 0", "0", fix=COUNT_THROUGH)
        elif positions and positions[-1] >= MOST_POSITIONS:
            last = f"position {positions[-1]} at token {len(positions) - 1}"
            found = f"{last}: in float32 it is no longer apart from its neighbour"
            yield EncodingFault("ML512", found, f"a position below {MOST_POSITIONS:,}", fix=COUNT_THROUGH)
        elif positions and positions[0] and self.scaling.matters(positions):
            found = f"position {positions[0]} at token 0; the model scales by the position ({self.scaling.key})"
            yield EncodingFault("ML512", found, "0", fix=COUNT_THROUGH)

    def _number_faults(self, stretches: Sequence[Stretch]) -> Iterator[EncodingFault]:
        """Yield the faults of the columns that number the conversations beside an attention mask."""
        for key, numbers in self.line.numbers.items():
            yield from number_faults(stretches, [numbers[n] for n in self.padding.real], key=key, none=-1)

    def _mask_faults(self) -> Iterator[EncodingFault]:
        """Yield a fault for each mask that leaves out tokens which the labels train on."""
        for key, mask in self.line.masks.items():
            trained = zip(self.line.labels, mask, strict=False)
            left = [n for n, (label, is_expected) in enumerate(trained) if label != IGNORE_INDEX and not is_expected]
            if left:
                found = f"{key} is 0 at {counted(len(left), 'token')} with a label, the first at token {left[0]}"
                yield EncodingFault("ML559", found, "1 at each token with a label, or no mask beside the labels")

    def _length_faults(self) -> Iterator[EncodingFault]:
        """Yield a fault for each column of lengths that names other conversations than the position ids."""
        if not self.line.lengths:
            return
        positions, count = self.line.position_ids or (), len(self.line.input_ids)
        real = set(self.padding.real)
        starts = [n for n in self.padding.real if n == 0 or positions[n] != positions[n - 1] + 1] if positions else []
        for key, ends in self.line.lengths.items():
            own = [start for start, end in pairwise(ends) if start < end and start in real]
            if ends[-1] not in (count, len(real)):
                yield EncodingFault("ML561", f"{key} ends at token {ends[-1]} of {count}", str(count))
            elif own != starts:
                other = next((n for n, pair in enumerate(zip(own, starts, strict=False)) if pair[0] != pair[1]), -1)
                sides = [shown[other] if -1 < other < len(shown) else len(shown) for shown in (own, starts)]
                found = f"conversation {other} begins at token {sides[0]} by {key}, and at {sides[1]} by position_ids"
                if other < 0:
                    found = f"{key} names {sides[0]} conversations, and position_ids {sides[1]}"
                yield EncodingFault("ML561", found, "the same conversations")

    def _packed_findings(self, positions: Ids | None, mask: Ids | None) -> Iterator[Finding]:
        stretches, matches = self._stretches, self._matches
        yield from self._place_faults(order_faults(matches, len(self.expected)))
        yield from self._place_faults(isolation_faults(stretches, self.ids, positions, mask, self.scaling, self.oracle))
        yield from self._place_faults(self._number_faults(stretches))
        labels = list(self.labels)
        # the first token of a conversation may have a loss by the objective `everything`
        is_free = not self.judges_labels or self.line.rows[0].objective.turns == "everything"
        for start, _ in () if is_free else stretches[1:]:
            if self.ids[start] == self.oracle.bos_id and labels[start] != IGNORE_INDEX:
                found = f"the BOS at token {start} is trained on: the EOS before it learns to predict it"
                yield from self._place_faults([EncodingFault("ML514", found, "-100")])
                labels[start] = IGNORE_INDEX  # else the conversation would be reported, too
        for match in matches:
            if match.listed is not None and match.stretch is not None:
                yield from self._compare(match.listed, match.stretch, labels).findings()

    def _compare(self, number: int, stretch: Stretch, labels: Sequence[int]) -> EncodedRowComparison:
        row, tokens = self.line.rows[number], slice(*stretch)
        place = self.line.place.within("conversations", number) if self.line.packed else self.line.place
        expected, ids = self.expected[number], self.ids[tokens]
        return EncodedRowComparison(
            row, expected, ids, labels[tokens], self.oracle, place, self.judges_labels, self.origin
        )

    def conversations(self) -> Iterator[EncodedRowComparison]:
        """Yield each conversation that is found among the ids, if the labels are comparable."""
        if not self.comparable:
            return
        if not self.line.packed:
            yield self._compare(0, (0, len(self.ids)), self.labels)
            return
        for match in self._matches:
            if match.listed is not None and match.stretch is not None:
                yield self._compare(match.listed, match.stretch, self.labels)

    @cached_property
    def _shown_row(self) -> str:
        """The first conversation as findings show it."""
        return self.line.rows[0].to_jsonl()

    def _place_faults(self, faults: Iterable[EncodingFault]) -> Iterator[Finding]:
        for fault in faults:
            found, place = fault.found, self.line.place
            yield Finding(fault.rule, found, place, fault.expected, row=self._shown_row, fix=fault.fix)


def row_findings(row: Row, input_ids: Sequence[int], labels: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding for each class of a trainer's faults in a row; empty if the encoding is mistral-common's.

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
    """Yield a finding for each control token that occurs more or less often than the structure needs."""
    controls = oracle.control_tokens
    needed = Counter(token for token in oracle.encode(row).input_ids if token in controls)
    found = Counter(token for token in input_ids if token in controls)
    for token in sorted(needed | found):
        if needed[token] != found[token]:
            times = f"{controls[token]} (id {token}) {found[token]} times"
            yield Finding("ML106", times, row.place, f"{needed[token]} times", row=row.to_jsonl())
