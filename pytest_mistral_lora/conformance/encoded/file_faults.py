"""What a whole file trains on against what its assistants say: texts that were lost, and texts that came twice."""

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

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.rows import Row, scan_rows, weight_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import RowError, RowsError

MOST = 100_000
"""Texts that are kept at a time; what a file loses beyond them is counted, not named."""
SHOWN_TEXTS = 20
"""Texts that a finding shows."""


@dataclass
class _Text:
    balance: int
    place: str
    ids: Sequence[int]


@dataclass
class Balance:
    """Supervised texts as a multiset: those of the assistants on one side, those trained on on the other.

    A text that is on both sides as often is forgotten, so that a sound file needs no memory.
    """

    _texts: dict[bytes, _Text] = field(default_factory=dict)
    _beyond: int = 0

    def expect(self, encoded: EncodedRow, place: str) -> None:
        """Note every answer that should be trained on."""
        for text in _answers(encoded.input_ids, encoded.labels or (), encoded.input_ids[-1]):
            self._add(text, place, 1)

    def find(self, ids: Sequence[int], labels: Sequence[int], place: str, oracle: Oracle) -> None:
        """Note every answer that is trained on; one without its EOS is none."""
        for text in _answers(ids, labels, oracle.eos_id):
            self._add(text, place, -1)

    def _add(self, text: Sequence[int], place: str, by: int) -> None:
        key = hashlib.blake2b(array("q", text).tobytes(), digest_size=16).digest()
        entry = self._texts.get(key)
        if entry is None and len(self._texts) >= MOST:
            self._beyond += 1
            return
        entry = self._texts.setdefault(key, _Text(0, place, tuple(text[:100])))
        entry.balance += by
        if not entry.balance:
            del self._texts[key]

    def findings(self, path: Path, oracle: Oracle) -> Iterator[Finding]:
        """Yield one finding for the texts that are lost, and one for those that are trained on too often."""
        lost = [text for text in self._texts.values() if text.balance > 0]
        more = [text for text in self._texts.values() if text.balance < 0]
        if lost:
            found = f"{sum(t.balance for t in lost)} assistant texts are not trained on{self._rest()}"
            yield Finding("ML506", found, str(path), detail=_shown(lost, oracle))
        if more:
            found = f"{-sum(t.balance for t in more)} texts are trained on that no assistant says, or not so often"
            yield Finding("ML506", found + self._rest(), str(path), detail=_shown(more, oracle))

    def _rest(self) -> str:
        return f" ({self._beyond} more texts were not compared)" if self._beyond else ""


def _answers(ids: Sequence[int], labels: Sequence[int], eos_id: int) -> Iterator[Sequence[int]]:
    """Yield the ids of each run of supervised tokens that ends with EOS, the EOS left out."""
    start: int | None = None
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label == IGNORE_INDEX:
            start = None
            continue
        start = index if start is None else start
        if token == eos_id:
            yield ids[start:index]
            start = None


def _shown(texts: list[_Text], oracle: Oracle) -> str:
    lines = []
    for text in texts[:SHOWN_TEXTS]:
        times = f" ({abs(text.balance)} times)" if abs(text.balance) > 1 else ""
        lines.append(f"{text.place}: {oracle.decode(list(text.ids))[:80]!r}{times}")
    return "\n".join(lines + ([f"… and {len(texts) - SHOWN} more"] if len(texts) > SHOWN_TEXTS else []))


SHOWN = 20
"""Numbers of missing rows that a finding shows."""


def digest_of(row: Row) -> bytes:
    """Return a digest of what a row says: equal for rows that differ in null fields and a spelled-out weight of 1."""
    messages = [_plain(message) for message in row.messages]
    text = json.dumps([messages, _plain(list(row.tools or ()))], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items() if item is not None}
        if kept.get("role") == "assistant":
            kept["weight"] = weight_of(kept)
        return kept
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def source_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of the source files, in order.

    Raises:
        InputError: If a file cannot be opened.
        RowsError: If a row cannot be read: then no number of a row can be trusted.
    """
    for path in paths:
        for item in scan_rows(path):
            if isinstance(item, RowError):
                raise RowsError([item], place=str(path))
            yield item


@dataclass
class SourceRows:
    """What has been seen of the rows of a source; some 200 bytes a row are kept.

    Attributes:
        paths: The source's files; none where it is not at hand, and then the numbers of the rows say what is missing.
        packed: Whether a packed sequence has been seen: then conversations count, and not their numbers.
        unreadable: Lines that could not be read: as many rows may be missing on their account.
    """

    paths: tuple[Path, ...] = ()
    packed: bool = False
    unreadable: int = 0
    _seen: set[int] = field(default_factory=set)
    _refused: set[int] = field(default_factory=set)
    _last: int = -1

    @cached_property
    def _digests(self) -> list[bytes]:
        return [digest_of(row) for row in source_rows(self.paths)]

    @cached_property
    def _free(self) -> dict[bytes, list[int]]:
        """Numbers of the rows that say the same and are not accounted for, the first one last."""
        free: dict[bytes, list[int]] = {}
        for index in reversed(range(len(self._digests))):
            free.setdefault(self._digests[index], []).append(index)
        return free

    def numbered(self, line: EncodedLine) -> EncodedLine:
        """Return a line with its number in the source, where it names none and the source is at hand."""
        if line.numbered or line.packed or not self.paths or len(line.rows) != 1:
            return line
        free = self._free.get(digest_of(line.rows[0]))
        return dataclasses.replace(line, index=free[-1]) if free else line

    def is_new(self, line: EncodedLine) -> bool:
        """Return whether this row's number has not been seen."""
        return line.index not in self._seen

    def findings(self, line: EncodedLine) -> Iterator[Finding]:
        """Yield what is wrong with a line's place in the source, and note that it has been seen."""
        shown = line.rows[0].to_jsonl() if line.rows else ""
        if not self.is_new(line):
            yield Finding("ML503", f"row {line.index} comes again", line.place, "each row once", row=shown)
        elif line.index < self._last:
            expected = "rows in the order of their numbers"
            yield Finding("ML504", f"row {line.index} comes after row {self._last}", line.place, expected, row=shown)
        if line.error:
            self._refused.add(line.index)
            yield Finding("ML502", f"row {line.index} was dropped: {line.error}", line.place, row=shown)
        elif self.paths:
            yield from self._unlike(line)
        self._seen.add(line.index)
        self._last = max(self._last, line.index)
        self.packed = self.packed or line.packed

    def _unlike(self, line: EncodedLine) -> Iterator[Finding]:
        for number, row in enumerate(line.rows):
            digest = digest_of(row)
            free = self._free.get(digest, [])
            found = ""
            if line.packed:
                found = "" if free else f"conversation {number} is not in the dataset, or not so often"
            elif line.index >= len(self._digests):
                found = f"row {line.index} of a dataset of {len(self._digests)} rows"
            elif digest != self._digests[line.index]:
                found = f"the messages are not those of row {line.index}"
                found += f", but of row {free[-1]}" if free else ""
            if free:
                free.pop() if line.packed or line.index not in free else free.remove(line.index)
            if found:
                yield Finding("ML505", found, line.place, row=row.to_jsonl())

    def missing(self) -> Iterator[Row]:
        """Yield the rows of the source that did not come."""
        came = self._seen - self._refused
        left = {index for free in self._free.values() for index in free}
        for index, row in enumerate(source_rows(self.paths)):
            if index in left if self.packed else index not in came:
                yield row

    def gaps(self, path: Path) -> Iterator[Finding]:
        """Yield a finding if rows did not come at all."""
        if self.packed and self.paths:
            count = sum(map(len, self._free.values()))
            if count > self.unreadable:
                yield Finding("ML502", f"{count} conversations of the dataset are in no sequence", str(path))
            return
        total = len(self._digests) if self.paths else self._last + 1
        count = total - sum(index < total for index in self._seen)
        if count > self.unreadable:
            # numbers may be huge: no more are looked at than there are rows
            missing = list(islice((index for index in range(total) if index not in self._seen), SHOWN))
            named = ", ".join(map(str, missing)) + (", …" if count > SHOWN else "")
            found = f"{count} of {total} rows are not there: {named}"
            yield Finding("ML502", found, str(path), "every row of the source")
