"""The rows of an encoded-rows file against their source: dropped, doubled, in another order, or changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.rows import Row, scan_rows, weight_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import RowError, RowsError

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
