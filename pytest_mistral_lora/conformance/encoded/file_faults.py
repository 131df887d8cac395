"""Faults of a whole file: lost or repeated supervised texts, and rows that differ from their source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import IN_ORDER
from pytest_mistral_lora.chat.kinds.records import as_side
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.row_files import scan_records
from pytest_mistral_lora.chat.rows import Row, compact_json, sorted_keys, weight_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, TakenLine
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import RowError, RowsError
from pytest_mistral_lora.places import Place

MOST = 100_000
"""Most texts to keep at a time; further lost texts are counted, not named."""
SHOWN_TEXTS = 20
"""Most texts in a finding."""
SHOWN = 20
"""Most numbers of missing rows in a finding."""


@dataclass
class _OpenText:
    """A text whose two sides differ at this point.

    Attributes:
        balance: Times that an assistant has it, less the times that it is trained on.
        place: The first line that has it.
        ids: Its first hundred ids.
        rule: The rule that this line breaks, and so may lose it; empty if it breaks none.
    """

    balance: int
    place: Place
    ids: Sequence[int]
    rule: str = ""


@dataclass
class AnswerBalance:
    """Supervised texts as a multiset: the assistants' on one side, the trained ones on the other.

    A text with equal counts on both sides is forgotten, so a sound file needs no memory.
    """

    _texts: dict[bytes, _OpenText] = field(default_factory=dict)
    _beyond: int = 0

    def add(
        self, ids: Sequence[int], labels: Sequence[int], oracle: Oracle, place: Place, by: int, rule: str = ""
    ) -> None:
        """Note each run of supervised tokens that ends with EOS, without the EOS; an answer without EOS does not count.

        An answer with an id outside the vocabulary has no text, and does not count either (ML520 reports it).

        Args:
            ids: The ids of a row.
            labels: Its labels, as many.
            oracle: Mistral's own tokenization.
            place: File and line.
            by: 1 for answers that should be trained on, -1 for answers that are.
            rule: The rule that the line breaks, if it may lose answers.
        """
        start: int | None = None
        for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label == IGNORE_INDEX:
                start = None
                continue
            start = index if start is None else start
            if token != oracle.eos_id:
                continue
            text, start = ids[start:index], None
            if text and not 0 <= min(text) <= max(text) < oracle.vocab_size:
                continue
            # a digest in place of the ids: 16 bytes a text, however long the answers are
            key = hashlib.blake2b(array("q", text).tobytes(), digest_size=16).digest()
            if key not in self._texts and len(self._texts) >= MOST:
                self._beyond += 1
                continue
            entry = self._texts.setdefault(key, _OpenText(0, place, tuple(text[:100]), rule))
            entry.balance += by
            if not entry.balance:
                del self._texts[key]

    def extend(self, other: AnswerBalance) -> None:
        """Add the texts of later lines."""
        self._beyond += other._beyond
        for key, entry in other._texts.items():
            known = self._texts.get(key)
            if known is None and len(self._texts) >= MOST:
                self._beyond += 1
            elif known is None:
                self._texts[key] = entry
            else:
                known.balance += entry.balance
                if not known.balance:
                    del self._texts[key]

    def findings(self, place: Place, oracle: Oracle) -> Iterator[Finding]:
        """Yield a finding for lost texts, and a finding for texts that are trained on too often."""
        lost = [text for text in self._texts.values() if text.balance > 0]
        more = [text for text in self._texts.values() if text.balance < 0]
        rest = f" ({self._beyond} more texts were not compared)" if self._beyond else ""
        if lost:
            found = f"{sum(text.balance for text in lost)} assistant texts are not trained on{rest}"
            # rows that lose them have a finding of their own; missing rows have none
            rules = {text.rule for text in lost}
            effect_of = "" if "" in rules else max(rules, key=[text.rule for text in lost].count)
            yield Finding("ML506", found, place, detail=_text_lines(lost, oracle), effect_of=effect_of)
        if more:
            times = -sum(text.balance for text in more)
            found = f"{times} texts are trained on that no assistant says, or not so often{rest}"
            yield Finding("ML506", found, place, detail=_text_lines(more, oracle))


def _text_lines(texts: list[_OpenText], oracle: Oracle) -> str:
    lines = []
    for text in sorted(texts, key=lambda text: text.place.order)[:SHOWN_TEXTS]:
        times = f" ({abs(text.balance)} times)" if abs(text.balance) > 1 else ""
        lines.append(f"{text.place}: {oracle.decode(list(text.ids))[:80]!r}{times}")
    return "\n".join(lines + ([f"… and {len(texts) - SHOWN_TEXTS} more"] if len(texts) > SHOWN_TEXTS else []))


def row_digest(row: Row, *, loose: bool = False) -> bytes:
    """Return 12 bytes that are equal for rows that differ only in null fields and a spelled-out weight of 1.

    They also tell an answer that is wanted from one that is not.

    Args:
        row: The row.
        loose: Whether the bytes also ignore nulls and key order within the JSON of tools and arguments.
    """

    def without_defaults(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {
                key: item if key in IN_ORDER and not loose else without_defaults(item)
                for key, item in value.items()
                if item is not None
            }
            if kept.get("role") == "assistant":
                kept["weight"] = weight_of(kept)
            return kept
        return [without_defaults(item) for item in value] if isinstance(value, list | tuple) else value

    data = without_defaults(row.to_json()) | ({} if row.kind.counts_as_wanted(row) else {"unwanted": True})
    text = json.dumps(data, sort_keys=True) if loose else compact_json(sorted_keys(data))
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def source_records(paths: Sequence[Path]) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each record of the source files, in order: both sides of a pair, or one row.

    Raises:
        InputError: If a file cannot be opened.
        RowsError: If a row cannot be read: then row numbers cannot be trusted.
    """
    for path in paths:
        for item in scan_records(path):
            if isinstance(item, RowError):
                raise RowsError([item], place=str(path))
            yield item


@dataclass
class SourceTracker:
    """The records of a source that have been seen so far; each takes some 200 bytes.

    It is no state of a part of the file: what it finds of a line depends on all lines before it.

    A record is a row or a preference pair. A pair has two lines, one after the other, with the number of the record.

    Attributes:
        paths: The source's files; without files, only the numbers of the rows show that a row is missing.
        packed: Whether a packed sequence was seen; then conversations count, and not their numbers.
        unreadable: Number of unreadable lines, which may explain as many missing rows.
        is_known: Whether there is a source, or a line has named its row; else missing rows cannot be detected.
    """

    paths: tuple[Path, ...] = ()
    packed: bool = False
    unreadable: int = 0
    is_known: bool = False
    _seen: set[int] = field(default_factory=set)
    _seen_rejected: set[int] = field(default_factory=set)
    _refused: set[int] = field(default_factory=set)
    _matched: set[int] = field(default_factory=set)
    _last: int = -1
    _read: int = -1
    _read_rows: tuple[Row, ...] = ()
    _chosen: int = -1

    @cached_property
    def _in_order(self) -> Iterator[tuple[int, tuple[Row, ...]]]:
        return enumerate(source_records(self.paths))

    @cached_property
    def _digests(self) -> list[tuple[bytes, ...]]:
        return [tuple(map(row_digest, rows)) for rows in source_records(self.paths)]

    @cached_property
    def _loose_digests(self) -> list[tuple[bytes, ...]]:
        return [tuple(row_digest(row, loose=True) for row in rows) for rows in source_records(self.paths)]

    @cached_property
    def _by_digest(self) -> dict[bytes, list[int]]:
        """Numbers of the records with an equal first row, the first record last."""
        records: dict[bytes, list[int]] = {}
        for index in reversed(range(len(self._digests))):
            records.setdefault(self._digests[index][0], []).append(index)
        return records

    def _first_free(self, digest: bytes) -> int | None:
        """Return the number of the first record with a row that no line has matched yet; None if there is none.

        Matched records are dropped from the end of the list alone: a dataset may have one row a million times.
        """
        records = self._by_digest.get(digest, [])
        while records and records[-1] in self._matched:
            records.pop()
        return records[-1] if records else None

    def with_messages(self, line: EncodedLine) -> EncodedLine:
        """Add to a line with only ids the row of its number in the source, if that row is still to be read."""
        if not self.paths or line.rows or line.error:
            return line
        if line.chosen is not None:
            rows = self._read_rows[1:] if line.index == self._read else ()
            return _with_row(line, rows[:1])
        # the source is read once, beside the lines: a number that is repeated or out of order has no row
        if line.index > self._read:
            for number, rows in self._in_order:
                self._read, self._read_rows = number, rows
                if number == line.index:
                    return _with_row(line, rows[:1])
        return line

    def numbered(self, line: EncodedLine) -> EncodedLine:
        """Return the line with its number in the source, if it names no number and the source has such a row."""
        if line.numbered or line.packed or not self.paths or len(line.rows) != 1:
            return line
        if line.chosen is not None:
            return dataclasses.replace(line, index=self._chosen)
        free = self._first_free(row_digest(line.rows[0]))
        self._chosen = line.index if free is None else free
        return dataclasses.replace(line, index=self._chosen)

    def is_new(self, line: EncodedLine) -> bool:
        """Whether no line has had this row's number; the two lines of a pair have one number."""
        return self.is_new_number(line.index, is_second=line.chosen is not None)

    def is_new_number(self, index: int, *, is_second: bool) -> bool:
        """Whether no line has had a number, as the first or as the second line of a pair."""
        return index not in (self._seen_rejected if is_second else self._seen)

    def take(self, line: EncodedLine) -> list[Finding]:
        """Note a line, and return the findings about its place in the source."""
        findings = self.take_in_order(TakenLine.of(line))
        if self.paths and not line.error:
            findings += self._take_from_source(line)
        return findings

    def take_in_order(self, line: TakenLine) -> list[Finding]:
        """Note the number of a line, and return the findings about the order of the numbers."""
        if line.is_second:
            # the line of the chosen answer stands for the record
            self._seen_rejected.add(line.index)
            return []
        findings = []
        self.is_known = self.is_known or line.numbered or bool(self.paths)
        if line.index in self._seen:
            findings.append(Finding("ML503", f"row {line.index} comes again", line.place, "each row once"))
        elif line.index < self._last:
            found, expected = f"row {line.index} comes after row {self._last}", "rows in the order of their numbers"
            findings.append(Finding("ML504", found, line.place, expected))
        if line.error:
            self._refused.add(line.index)
            found = f"row {line.index} was dropped: {line.error}"
            findings.append(Finding("ML502", found, line.place, row=line.shown))
        self._seen.add(line.index)
        self._last = max(self._last, line.index)
        self.packed = self.packed or line.packed
        return findings

    def _take_from_source(self, line: EncodedLine) -> Iterator[Finding]:
        """Match the conversations of a line with the source; yield a finding for each that is not its row."""
        if not line.rows:
            found = f"row {line.index} has ids alone, and comes after row {self._read}"
            if line.index >= len(self._digests):
                found = f"row {line.index} of a dataset of {len(self._digests)} rows"
            yield Finding("ML505", found, line.place, "ids without messages in the order of the dataset")
        part = 0 if line.chosen is None else 1
        for number, row in enumerate(line.rows):
            digest = row_digest(row)
            free = self._first_free(digest) if part == 0 else None
            is_its_row = self._has_row(line.index, part, digest)
            found = ""
            # the number of a packed sequence is its own: its conversations may come from anywhere in the source
            if line.packed:
                found = "" if free is not None else f"conversation {number} is not in the dataset, or not so often"
            elif line.index >= len(self._digests):
                found = f"row {line.index} of a dataset of {len(self._digests)} rows"
            elif not is_its_row:
                found = f"the messages are not those of row {line.index}"
                found += f", but of row {free}" if free is not None else ""
                if line.side is not None and self._has_other_label(line.index, part, row):
                    found = f"the label is not that of row {line.index}"
                if self._loose_digests[line.index][part : part + 1] == (row_digest(row, loose=True),):
                    found = f"tools or arguments have other nulls or another key order than in row {line.index}"
            if free is not None:
                is_its_own = is_its_row and not line.packed and line.index not in self._matched
                self._matched.add(line.index if is_its_own else free)
            if found:
                yield Finding("ML505", found, line.place, row=row.to_jsonl())

    def _has_other_label(self, index: int, part: int, row: Row) -> bool:
        """Return whether a record of the source has a row with another label."""
        other = dataclasses.replace(row, side=row.kind.other_side(row))
        return self._has_row(index, part, row_digest(other))

    def _has_row(self, index: int, part: int, digest: bytes) -> bool:
        """Return whether a record of the source has a row, as its first or its second one."""
        return index < len(self._digests) and self._digests[index][part : part + 1] == (digest,)

    def missing_rows(self) -> Iterator[Row]:
        """Yield the rows of the records that the file lacks."""
        came = self._seen - self._refused
        for index, rows in enumerate(source_records(self.paths)):
            if index not in (self._matched if self.packed else came):
                yield from rows

    def missing_findings(self, place: Place) -> Iterator[Finding]:
        """Yield a finding if the file lacks rows."""
        if self.packed and self.paths:
            count = len(self._digests) - len(self._matched)
            if count > self.unreadable:
                yield Finding("ML502", f"{count} conversations of the dataset are in no sequence", place)
            return
        # without the source, rows missing at the end cannot be detected
        total = len(self._digests) if self.paths else self._last + 1
        count = total - sum(index < total for index in self._seen)
        if count > self.unreadable:
            # a number may be as large as 10**18: the search ends with the last shown number
            missing = list(islice((index for index in range(total) if index not in self._seen), SHOWN))
            named = ", ".join(map(str, missing)) + (", …" if count > SHOWN else "")
            found = f"{count} of {total} rows are not there: {named}"
            yield Finding("ML502", found, place, "every row of the source")


def _with_row(line: EncodedLine, rows: tuple[Row, ...]) -> EncodedLine:
    """Return a line with the row of its number, if the source has it; the side of the row is the line's."""
    if line.side is not None:
        rows = tuple(as_side(row, line.side.row_side) for row in rows)
    return dataclasses.replace(line, rows=rows, numbered=line.numbered or bool(rows))
