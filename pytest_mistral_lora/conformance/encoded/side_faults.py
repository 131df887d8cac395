"""The laws of preference records alone, of an answer and of a pair, and the lengths of their answers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

from pytest_mistral_lora.chat.diff import decode_text, equal_beginning, split_at_markers
from pytest_mistral_lora.chat.kinds.records import kind_of_side
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.encoded.sides import Side
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import counted

_SHOWN_IDS = 20
_ANSWERS = ("wanted answer", "unwanted answer")
"""The names of the sides, in the order of their lengths."""


@dataclass
class SideLengths:
    """The lengths of the answers of preference records.

    Attributes:
        sides: Number of answers so far.
        pairs: Number of pairs so far.
        lengths: The tokens of each answer: of the wanted ones, and of the unwanted ones.
    """

    sides: int = 0
    pairs: int = 0
    lengths: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))

    def extend(self, other: SideLengths) -> None:
        """Add the answers of other records."""
        self.sides += other.sides
        self.pairs += other.pairs
        for lengths, more in zip(self.lengths, other.lengths, strict=True):
            lengths.extend(more)

    @property
    def words(self) -> str:
        """The number of pairs, and the mean lengths of both sides, for a summary; empty without preference records."""
        if not self.sides:
            return ""
        lengths = [
            f"{counted(len(lengths), name)} of {fmean(lengths):.1f} tokens in the mean"
            for name, lengths in zip(_ANSWERS, self.lengths, strict=True)
            if lengths
        ]
        return ", ".join([*([counted(self.pairs, "pair")] if self.pairs else ()), *lengths])


@dataclass
class SideJudge:
    """Judges the answers of preference records, and notes their lengths.

    Attributes:
        oracle: Mistral's own tokenization.
        noted: Where the lengths are noted.
    """

    oracle: Oracle
    noted: SideLengths

    def is_empty(self, side: Side) -> bool:
        """Return whether an answer has no text and no call."""
        text = self._without_eos(side.answer)
        return not any(token in self.oracle.markers for token in text) and not self._decoded(text).strip()

    def take(self, line: EncodedLine, side: Side) -> Iterator[Finding]:
        """Yield the findings of an answer, and with the second answer of a pair those of the pair."""
        row = line.rows[0].to_jsonl() if line.rows else ""
        self.noted.sides += 1
        answer = self._without_eos(side.answer)
        if self.is_empty(side):
            found = "the answer is nothing but EOS"
            if answer:
                found = f"the answer is nothing but white space: {self._decoded(answer)!r}"
            elif not side.answer:
                found = "the answer has no token"
            yield Finding("ML567", found, line.place, "a text or a call, closed by EOS", row=row)
        if line.chosen is None or line.chosen.side is None:
            if not side.is_of_pair:
                number = kind_of_side(side.row_side).sides.index(side.row_side)
                self.noted.lengths[number].append(len(answer))
            return
        self.noted.pairs += 1
        first = line.chosen.side
        # whole conversations begin with their prompt
        shared = 0 if side.has_labels else equal_beginning(first.answer, side.answer)
        for lengths, whole in zip(self.noted.lengths, (first.answer, side.answer), strict=True):
            lengths.append(len(self._without_eos(whole[shared:])))
        place = line.place.row
        if first.prompt != side.prompt:
            at = equal_beginning(first.prompt, side.prompt)
            shown = [self._shown(prompt, at) for prompt in (first.prompt, side.prompt)]
            found = f"token {at} of the prompt: {shown[0]} before the chosen answer, {shown[1]} before the rejected one"
            yield Finding("ML565", found, place, "one prompt", row=row)
        if self.is_empty(first) or self.is_empty(side) or not self._are_alike(first.answer, side.answer):
            return
        text = repr(self._decoded(answer[:_SHOWN_IDS]).strip()) + ("…" if len(answer) > _SHOWN_IDS else "")
        if first.answer == side.answer and answer == side.answer:
            found = f"both answers are cut, and nothing is left of their difference: {text}"
            yield Finding("ML568", found, place, "answers that differ after the cut", row=row)
        else:
            yield Finding("ML655", f"both answers are {text}", place, "answers that differ", row=row)

    def _without_eos(self, answer: Ids) -> Ids:
        end = len(answer)
        while end and answer[end - 1] == self.oracle.eos_id:
            end -= 1
        return answer[:end]

    def _are_alike(self, answer: Ids, other: Ids) -> bool:
        """Return whether two answers have the same markers, and the same words between them."""
        sides = []
        for ids in (answer, other):
            known = tuple(token for token in self._without_eos(ids) if 0 <= token < self.oracle.vocab_size)
            if len(known) != len(self._without_eos(ids)):
                return answer == other  # ML520 reports the others
            sides.append([(part.marker, part.text.split()) for part in split_at_markers(known, self.oracle)])
        return sides[0] == sides[1]

    def _decoded(self, ids: Ids) -> str:
        return decode_text([token for token in ids if 0 <= token < self.oracle.vocab_size], self.oracle)

    def _shown(self, prompt: Ids, at: int) -> str:
        """Return a token of a prompt for a finding, or that the prompt ends before it."""
        if at == len(prompt):
            return "none"
        token = prompt[at]
        return f"{token} {self.oracle.piece(token)!r}" if 0 <= token < self.oracle.vocab_size else str(token)
