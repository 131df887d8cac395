"""The laws of preference pairs and rated answers, and the lengths of their sides."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.preference import AnswerLengths, longer_side
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import Row, beyond_text, has_more_than_text, text_of
from pytest_mistral_lora.conformance.dataset.tally import DIGEST_BYTES, DatasetTally, spread
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place

KEPT_TOKENS = 1024
"""Tokens of a side that TRL's `DPOConfig` (1.16) keeps by default, from its start."""

CHOSEN_LONGER, REJECTED_LONGER = "chosen_longer", "rejected_longer"
"""Counts of the pairs of a file whose one answer has more tokens than the other."""

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
    """Yield the laws that both sides of a pair break together; nothing for a record of one row.

    Args:
        rows: The rows of a record.
        encoded: Their encodings.
    """
    if len(rows) == 1:
        return
    place = rows[0].place.row
    chosen, rejected = (side.input_ids for side in encoded)
    alike = equal_beginning(chosen, rejected)
    words = ""
    if rows[0] == rows[1]:
        words = "the same messages"
    elif alike == max(len(chosen), len(rejected)):
        words = "other messages with the same tokens"
    elif _without_white_space(rows[0]) == _without_white_space(rows[1]):
        words = "other white space or ids of calls alone"
    if words:
        yield Finding("ML655", f"the rejected answer is the chosen one: {words}", place, "two answers that differ")
    elif alike >= KEPT_TOKENS:
        found = f"both sides begin with the same {alike:,} tokens: the first {KEPT_TOKENS:,} do not tell them apart"
        yield Finding("ML657", found, place, f"answers that differ earlier, or a max_length above {alike:,}")


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


def add_sides(tally: DatasetTally, file: int, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
    """Add the lengths of the answers of a record to a tally.

    Args:
        tally: The tally.
        file: Index of the file.
        rows: The rows of the record, each with a side.
        encoded: Their encodings.
    """
    for row, side in zip(rows, encoded, strict=True):
        tally.answer_tokens.setdefault((file, row.side), Counter())[side.supervised_tokens] += 1
    if len(rows) > 1:
        alike = equal_beginning(encoded[0].input_ids, encoded[1].input_ids)
        # equal sides are equal after any cut
        if alike < max(len(side.input_ids) for side in encoded):
            tally.alike[alike] += 1
        chosen, rejected = (side.supervised_tokens for side in encoded)
        tally.counts[file, CHOSEN_LONGER] += chosen > rejected
        tally.counts[file, REJECTED_LONGER] += rejected > chosen


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


def length_finding(lengths: Mapping[str, Counter[int]], longer: Mapping[str, int], place: Place) -> Finding | None:
    """Return the finding of sides whose lengths tell them apart; None if they do not, or of few answers.

    Args:
        lengths: The answers of a file by their tokens, of each side.
        longer: The number of pairs with a longer answer of each side.
        place: The file.
    """
    for sides in (kind.sides for kind in KINDS.values() if kind.sides):
        first, second = (_answer_lengths(lengths.get(side, {})) for side in sides)
        index = longer_side(first, second)
        if index is None:
            continue
        shown = [f"{side.mean:,.1f} and {side.median:,}" for side in (first, second)]
        found = f"mean and median are {shown[0]} tokens for {sides[0]} answers, {shown[1]} for {sides[1]} ones"
        if sides[index] in longer:
            found += f"; the {sides[index]} one is longer in {longer[sides[index]]:,} of "
            found += counted(first.answers, "pair")
        return Finding("ML659", found, place, "answers of about the same length on both sides")
    return None


def _answer_lengths(lengths: Mapping[int, int]) -> AnswerLengths:
    figures = spread(lengths)
    return AnswerLengths(sum(lengths.values()), figures["mean"], figures["p50"])


def side_figures(tally: DatasetTally) -> dict[str, dict[str, object]]:
    """Return the number of answers of each side and the spread of their tokens; empty without such records."""
    found: dict[str, dict[str, object]] = {}
    for side in (side for kind in KINDS.values() for side in kind.sides):
        counts: Counter[int] = Counter()
        for (_, name), tokens in tally.answer_tokens.items():
            if name == side:
                counts.update(tokens)
        if counts:
            found[side] = {"rows": counts.total(), "answer_tokens": spread(counts)}
    return found
