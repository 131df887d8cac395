"""The laws of preference pairs and rated answers, and the lengths of their sides."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.preference import AnswerLengths, wanted_are_longer
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import Row, beyond_text, has_more_than_text, text_of
from pytest_mistral_lora.conformance.dataset.lengths import spread
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FileStates, WholeFileSign
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord, ObserverStates
from pytest_mistral_lora.conformance.row_table import DIGEST_BYTES
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place

LEGITIMATE_IF_UNWANTED = frozenset({"ML617", "ML618", "ML619", "ML622", "ML623", "ML643"})
"""Rules of texts that an unwanted answer may break: it may be damaged, call a tool wrongly, or break its schema."""


def empty_side(row: Row) -> Finding | None:
    """Return the finding of a side whose answer has no text and no call; None for any other row."""
    if not row.kind.sides:
        return None
    for message in row.kind.answer_part(row).messages:
        content = message.get("content")
        if message["role"] == "tool" or message.get("tool_calls") or has_more_than_text(content):
            return None
        if text_of(content).strip():
            return None
    return Finding("ML656", f"the {row.side} answer is empty", row.place, "a text or a call")


def pair_findings(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> Iterator[Finding]:
    """Yield the law that both sides of a pair break together; nothing for a record of one row.

    Args:
        rows: The rows of a record.
        encoded: Their encodings.
    """
    if words := likeness_of_sides(rows, encoded):
        found = f"the rejected answer is the chosen one: {words}"
        yield Finding("ML655", found, rows[0].place.row, "two answers that differ")


def likeness_of_sides(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> str:
    """Return in which way both sides of a pair are one answer; empty if they differ, and for a record of one row.

    Args:
        rows: The rows of a record.
        encoded: Their encodings.
    """
    if len(rows) == 1:
        return ""
    if rows[0] == rows[1]:
        return "the same messages"
    if encoded[0].input_ids == encoded[1].input_ids:
        return "other messages with the same tokens"
    if _without_white_space(rows[0]) == _without_white_space(rows[1]):
        return "other white space or ids of calls alone"
    return ""


# between words of a line: indentation may be what a pair of code is about
_GAP = re.compile(r"(?<=\S)\s+")


def _without_white_space(row: Row) -> list[tuple[list[str], Any, Any]]:
    """Return the lines of each message of a side, without white space that means nothing; other chunks; its calls.

    The id of a call is made up, and tells no answer from another.
    """
    found = []
    for message in row.kind.answer_part(row).messages:
        content = message.get("content")
        lines = [_GAP.sub(" ", line.rstrip()) for line in text_of(content).strip().splitlines() if line.strip()]
        found.append((lines, beyond_text(content), [call["function"] for call in message.get("tool_calls") or ()]))
    return found


def record_digests(rows: Sequence[Row], digests: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return a digest of a record, and that of the record which says the opposite.

    Args:
        rows: The rows of the record, each with a side.
        digests: A digest of each.
    """
    sides = [row.side.encode() for row in rows]
    opposite = [row.kind.other_side(row).encode() for row in rows]
    return _joined(sides, digests), _joined(opposite, digests)


def _joined(sides: Sequence[bytes], digests: Sequence[bytes]) -> bytes:
    parts = sorted(zip(sides, digests, strict=True))
    return hashlib.blake2b(b"".join(part for pair in parts for part in pair), digest_size=DIGEST_BYTES).digest()


@dataclass
class SidesOfFile:
    """The lengths of the sides of preference records.

    Attributes:
        tokens: For each side, the number of answers by their tokens.
        longer: For each side, the number of pairs in which it has the longer answer.
        alike: Number of pairs by the tokens that both sides begin with; pairs of equal sides are left out.
    """

    tokens: dict[str, Counter[int]] = field(default_factory=dict)
    longer: Counter[str] = field(default_factory=Counter)
    alike: Counter[int] = field(default_factory=Counter)

    def note(self, record: JudgedRecord) -> None:
        """Add a record, if it has sides."""
        if not record.rows[0].kind.sides:
            return
        lengths = [encoded.supervised_tokens for encoded in record.trained]
        for row, length in zip(record.rows, lengths, strict=True):
            self.tokens.setdefault(row.side, Counter())[length] += 1
        if len(lengths) == 1:
            return
        ids = [encoded.input_ids for encoded in record.trained]
        alike = equal_beginning(ids[0], ids[1])
        # equal sides are equal after any cut
        if alike < max(map(len, ids)):
            self.alike[alike] += 1
        if lengths[0] != lengths[1]:
            self.longer[record.rows[lengths[1] > lengths[0]].side] += 1

    def extend(self, other: SidesOfFile) -> None:
        """Add other records."""
        for side, tokens in other.tokens.items():
            self.tokens.setdefault(side, Counter()).update(tokens)
        self.longer.update(other.longer)
        self.alike.update(other.alike)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding if the lengths of the wanted answers tell them; of few answers, they do not."""
        for sides in (kind.sides for kind in KINDS.values() if kind.sides):
            first, second = (_answer_lengths(self.tokens.get(side, {})) for side in sides)
            pairs = first.answers if sides == PAIR.sides else 0
            if not wanted_are_longer(first, second, self.longer[sides[0]], pairs):
                continue
            shown = [f"{side.mean:,.1f} and {side.median:,}" for side in (first, second)]
            found = f"mean and median are {shown[0]} tokens for {sides[0]} answers, {shown[1]} for {sides[1]} ones"
            if pairs:
                found += f"; the {sides[0]} one is longer in {self.longer[sides[0]]:,} of {counted(pairs, 'pair')}"
            yield Finding("ML659", found, file, "answers of about the same length on both sides")
            return


class _Pairs(WholeFileSign[SidesOfFile]):
    def observe(self, record: JudgedRecord, state: FileStates[SidesOfFile]) -> Iterator[Finding]:
        """Yield the law that both sides of a pair break together, and note the lengths of the sides."""
        yield from pair_findings(record.rows, record.layouts)
        yield from super().observe(record, state)


PAIRS = _Pairs(SidesOfFile)
"""The observer of the sides of preference records."""


def _answer_lengths(lengths: Mapping[int, int]) -> AnswerLengths:
    figures = spread(lengths)
    return AnswerLengths(sum(lengths.values()), figures["mean"], figures["p50"])


def sides_of_files(states: ObserverStates) -> SidesOfFile:
    """Return what a pass has found of the sides of all files."""
    of_files: FileStates[SidesOfFile] = states.of(f"{__name__}:PAIRS")
    found = SidesOfFile()
    for sides in of_files.by_file.values():
        found.extend(sides)
    return found


def side_figures(sides: SidesOfFile) -> dict[str, dict[str, object]]:
    """Return the number of answers of each side and the spread of their tokens; empty without such records."""
    return {
        side: {"rows": tokens.total(), "answer_tokens": spread(tokens)}
        for kind in KINDS.values()
        for side in kind.sides
        if (tokens := sides.tokens.get(side))
    }
