"""Repeated rows of a dataset: equal, equal but for their form, or nearly equal; on one or both sides of a split.

Rows that differ only in form have equal digests, and nearly equal rows have equal parts of sketches.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.chat.rows import Row, compact_json, text_of
from pytest_mistral_lora.conformance.bounded_findings import BoundedFindings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord, ObserverStates
from pytest_mistral_lora.conformance.row_table import SKETCH_BYTES, digest_at, equal_groups
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.extras import MissingExtraError, is_installed

_FEW_CHARACTERS = 40
_OF_A_MACHINE = re.compile(r"terminal|\bshell\b|\bbash\b|console|interpreter|\brepl\b", re.IGNORECASE)
_CODE = re.compile(r"[{}()\[\]<>=;$|\\/~_`\n]")


def has_short_answer(row: Row) -> bool:
    """Return whether the last answer of a row is a call or a few words, of which a prompt can have but one.

    There are many ways to write a longer one, or a program, and a terminal answers by what happened before.
    """
    last = next((message for message in reversed(row.messages) if message["role"] == "assistant"), None)
    if last is None or last.get("tool_calls"):
        return last is not None
    answer = text_of(last.get("content")).strip()
    if len(answer) >= _FEW_CHARACTERS or len(answer.split()) >= _FEW_WORDS or _CODE.search(answer):
        return False
    return not any(_OF_A_MACHINE.search(text_of(message.get("content"))) for message in row.messages)


NUMBERS_END, ASKED_END = 4, 32
"""End of the digest of a row's numbers in its sketch, and of the part of its questions; the rest is its answers."""

_RUN = 3
_FEW_WORDS = 8
# scripts without spaces between words, whose letters count as words: Thai, Lao, Burmese, Khmer, kana, Han
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,:/]\d+)*")


def sketches_available() -> bool:
    """Return whether the library for sketches is installed."""
    return is_installed("rensa")


def row_sketch(row: Row) -> bytes:
    """Return a MinHash sketch of 64 bytes, by which `near_rows` finds nearly equal rows.

    System prompts and tools do not count, since many rows share them. Rows with different numbers are different rows,
    and so are rows that differ in a question or answer of fewer than 8 words.
    """
    asked_words: list[str] = []
    answered: list[str] = []
    fixed: list[str] = []
    answering = row.kind.answer_roles
    for message in row.messages:
        if message["role"] == "system":
            continue
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        text = text_of(message.get("content")) + (compact_json(calls) if calls else "")
        folded = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
        (answered if message["role"] in answering else asked_words).extend(_WORD.findall(folded))
        fixed += [message["role"], *_NUMBER.findall(folded)]
    if max(len(asked_words), len(answered)) < _FEW_WORDS:
        fixed.append(row.to_jsonl())  # too short to be near: "Hello" under another system prompt is another row
    numbers = hashlib.blake2b(" ".join(fixed).encode(), digest_size=NUMBERS_END).digest()
    return numbers + _part(asked_words, ASKED_END - NUMBERS_END) + _part(answered, SKETCH_BYTES - ASKED_END)


def _part(words: list[str], size: int) -> bytes:
    """Return bytes; two texts share about the same part of them as of their runs of three words."""
    from rensa import RMinHash

    if len(words) < _FEW_WORDS:
        return hashlib.blake2b(" ".join(words).encode(), digest_size=size).digest()
    sketch = RMinHash(num_perm=size, seed=0)
    sketch.update([" ".join(run) for run in zip(*(words[start:] for start in range(_RUN)), strict=False)])
    # the low byte of each minimum: 1 of 256 is equal by chance (b-bit minwise hashing, Li and König 2010)
    return bytes(minimum & 0xFF for minimum in sketch.digest())


Mask = npt.NDArray[np.bool_]
_NEAR = 0.78
"""Least share of equal bytes in each part of the sketches of near rows; texts with 8 of 10 runs in common reach it in
about half of all cases."""

_PAIRS = 1 << 16
"""Pairs to compare at a time: 4 MiB of each side."""


def near_rows(sketches: bytearray, asking: Mask, candidates: Mask) -> dict[int, tuple[int, float]]:
    """Return for each asking row the first candidate before or after it that is near, and the share in common.

    Each row is compared with at most three rows for each of its bands, so sorting takes the most time, for any rows.

    Args:
        sketches: The sketches of all rows, in order.
        asking: Whether to look for a partner of each row; a candidate only finds rows before it.
        candidates: Whether each row may be a partner.
    """
    table = np.frombuffer(sketches, np.uint8).reshape(-1, SKETCH_BYTES)
    chosen = np.flatnonzero(asking | candidates)
    found: dict[int, tuple[int, float]] = {}
    for start in range(NUMBERS_END, ASKED_END, 4):
        # of two rows with 8 of 10 runs in common, 97 % have one of the seven bands in common (LSH)
        # columns before rows: a copy of the whole table would double its memory
        bands = table[:, [*range(NUMBERS_END), *range(start, start + 4)]][chosen]
        keys = np.ascontiguousarray(bands).view(np.uint64)[:, 0]
        order = np.argsort(keys, kind="stable")
        rows, keys, places = chosen[order], keys[order], np.arange(len(order))
        begin = np.maximum.accumulate(np.where(np.r_[True, keys[1:] != keys[:-1]], places, 0))
        last = np.maximum.accumulate(np.where(candidates[rows], places, -1))
        # the first candidate from each place on; there is no candidate behind the last row
        following = np.r_[np.minimum.accumulate(np.where(candidates[rows], places, len(rows))[::-1])[::-1], len(rows)]
        for partner in (following[begin], np.r_[-1, last[:-1]], following[1:]):
            inside = asking[rows] & (partner >= begin) & (partner < len(rows))
            row, other = places[inside], partner[inside]
            same = keys[row] == keys[other]
            row, other = rows[row[same]], rows[other[same]]
            right = (other < row) | ~candidates[row]
            _verify(table, row[right & (row != other)], other[right & (row != other)], found)
    return found


def _verify(table: Any, rows: Any, others: Any, found: dict[int, tuple[int, float]]) -> None:
    """Add the pairs that are near in both parts of their sketches; of several partners of a row, the first."""
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        equal = table[rows[part]] == table[others[part]]
        shares = np.minimum(equal[:, NUMBERS_END:ASKED_END].mean(axis=1), equal[:, ASKED_END:].mean(axis=1))
        for index in np.flatnonzero(shares >= _NEAR):
            row, other = int(rows[part][index]), int(others[part][index])
            if row not in found or other < found[row][0]:
                found[row] = (other, float(shares[index]))


@dataclass
class Repeats:
    """The numbers of repeated rows, once they were reported.

    Attributes:
        within: Rows that repeat another of their side of the split, by how alike they are.
        across: Held-out rows that repeat a trained one, by how alike they are.
        compares_near: Whether rows have sketches, by which nearly equal rows are found.
        no_near_rows: Why held-out rows were not compared with nearly equal rows; empty if they were.
    """

    within: Counter[str] = field(default_factory=Counter)
    across: Counter[str] = field(default_factory=Counter)
    compares_near: bool = False
    no_near_rows: str = ""

    def extend(self, other: Repeats) -> None:
        """Add nothing: rows repeat each other in the whole table alone."""

    def counts(self) -> dict[str, Any]:
        """Return the number of repeated rows within a side and across the split; null if not counted."""
        return {
            side: {
                "same": counted["same"],
                "another_form": counted["another_form"],
                "near": counted["near"] if self.compares_near else None,
            }
            for side, counted in (("within_a_side", self.within), ("across_the_split", self.across))
        }


class RepeatedRows:
    """The rules on rows that repeat each other: they read the table of rows, and keep nothing of a record."""

    case = "no-duplicates"
    fires_on_sample = False

    def start(self) -> Repeats:
        """Return the state of no row."""
        return Repeats()

    def observe(self, record: JudgedRecord, state: Repeats) -> Iterator[Finding]:
        """Yield nothing: the table has what tells the record from others."""
        return iter(())

    def report(self, state: Repeats, files: JudgedFiles) -> Iterator[Finding]:
        """Yield the first findings of each rule, and the number of the others; count all in the state."""
        state.compares_near = bool(files.table.sketches)
        if any(files.table.held_out) and not files.table.sketches:
            state.no_near_rows = str(MissingExtraError("rensa"))
        search = _Search(files, state)
        # rows before prompts: the prompt of a row that is trained on is not reported again
        search.note_equal_rows()
        search.note_near_rows()
        search.note_repeated_prompts()
        search.note_opposites()
        yield from search.found.of(*search.found.rules)


REPEATS = RepeatedRows()
"""The observer of repeated rows."""


def repeats_of(states: ObserverStates) -> Repeats:
    """Return the repeated rows of a pass."""
    found: Repeats = states.of(f"{__name__}:REPEATS")
    return found


class _Search:
    """The search for repeated rows: equal, equal but for their form, or nearly equal; on one side or on both.

    Each `note_` method adds findings, and leaves out the rows that earlier methods found.

    Attributes:
        found: The findings, in the order of their discovery.
    """

    def __init__(self, files: JudgedFiles, state: Repeats) -> None:
        """Take the table, in order, and the state in which repeats are counted."""
        self.found: BoundedFindings = BoundedFindings()
        self._table = files.table
        self._place = files.place_of_row
        self._leaked: set[int] = set()
        # rows that equal an earlier row of their side, perhaps except for their form
        self._again = bytearray(len(files.table))
        self._within = state.within
        self._across = state.across

    def note_equal_rows(self) -> None:
        """Note equal rows on one side or on both, then rows that differ only in their form.

        The form is spaces, case, punctuation and Unicode form. Rows of one side that differ only in form are just
        counted.
        """
        for kind, digests, rule, text in (
            ("same", self._table.rows, "ML610", "the row is also trained on"),
            ("another_form", self._table.likenesses, "ML632", "the row is also trained on, in another form"),
        ):
            for group in equal_groups(digests, range(len(self._table))):
                trained, held_rows = self._sides(group)
                for side in (trained, held_rows):
                    for row in side[1:]:
                        # each repetition on a side counts once
                        self._within[kind] += not self._again[row]
                        self._again[row] = 1
                    if kind == "same" and len(side) > 1:
                        self._add("ML608", side[1], f"the row is there {len(side)} times", side[0])
                self._leak(kind, rule, text, {row: trained[0] for row in held_rows if trained})

    def note_near_rows(self) -> None:
        """Note held-out rows with a nearly equal trained row; not an error, since a single word may be the point."""
        if not self._table.sketches:
            return
        is_held_out = np.frombuffer(self._table.held_out, np.bool_)
        new = ~np.frombuffer(self._again, np.bool_)
        sides = (new & ~is_held_out, new & is_held_out)
        for side in sides:
            self._within["near"] += len(near_rows(self._table.sketches, side, side))
        if self._leaked:
            new[list(self._leaked)] = False
        near = near_rows(self._table.sketches, new & is_held_out, sides[0])
        for row, (other, share) in sorted(near.items()):
            text = f"nearly the same row is trained on, about {share:.0%} of its runs of three words"
            self._leak("near", "ML633", text, {row: other})

    def note_repeated_prompts(self) -> None:
        """Note prompts that rows of one side answer differently, and held-out prompts that are trained on."""
        owners, held_out = self._table.owners, self._table.held_out
        # the last prompt of a row identifies it: the prompt before the last turn that is trained on
        last = len(owners) - 1
        is_last = bytearray(index == last or owners[index + 1] != owner for index, owner in enumerate(owners))
        # only the last prompt of a held-out row counts: conversations often begin alike
        # arrays of a byte and of 8 bytes a prompt: lists of millions of numbers would take several times as much
        candidates = array("Q", (index for index, row in enumerate(owners) if is_last[index] or not held_out[row]))
        for group in equal_groups(self._table.prompts, candidates):
            trained, held_rows = self._sides([owners[index] for index in group])
            for row in held_rows if trained else ():
                if row not in self._leaked:
                    self._add("ML611", row, "the prompt is also trained on", trained[0])
            for side in self._sides([owners[index] for index in group if is_last[index]]):
                side = [row for row in side if self._table.short[row]]
                digests = [digest_at(self._table.rows, row) for row in side]
                other = next((row for row, digest in zip(side, digests, strict=True) if digest != digests[0]), None)
                # a prompt that each row answers in another way asks for many answers
                if other is not None and len({*digests}) <= max(2, len(side) // 2):
                    count = counted(len(side), "row")
                    self._add("ML609", other, f"the prompt of an earlier row, with another answer ({count})", side[0])

    def note_opposites(self) -> None:
        """Note records that say the opposite of an earlier one: the same answers to one prompt, on the other side."""
        first: dict[bytes, int] = {}
        for at, row in enumerate(self._table.sided):
            other = first.get(digest_at(self._table.opposites, at))
            if other is not None:
                self._add("ML658", row, "the same answers on the other side", other)
            first.setdefault(digest_at(self._table.rows, row), row)

    def _sides(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Split rows into trained and held-out rows."""
        held_out = self._table.held_out
        return [row for row in rows if not held_out[row]], [row for row in rows if held_out[row]]

    def _leak(self, kind: str, rule: str, found: str, others: Mapping[int, int]) -> None:
        """Note held-out rows that are also trained on, each once, with the first equal row."""
        for row, other in others.items():
            if row not in self._leaked:
                self._leaked.add(row)
                self._across[kind] += 1
                self._add(rule, row, found, other)

    def _add(self, rule: str, row: int, found: str, other: int) -> None:
        """Add a finding about two rows; its text is made only if it is kept."""
        self.found.add_made(rule, lambda: Finding(rule, found, self._place(row), others=(self._place(other),)))
