"""Statistics of a run's rows, for each side of the split: counts of used, dropped and cut rows, and hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.chat.encoded import DROPPED, EncodedRow, PolicyResult
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.records.hashing import framed_ids, framed_row

HASHED = ("rows", "ids", "labels")

SHOWN = 10
"""Places that are kept of the rows with one change; all are counted."""


@dataclass
class RowCounts:
    """Counts of rows and tokens of one side of a split.

    Attributes:
        rows: Rows that were read for it.
        used: Rows that are left.
        tokens: Tokens of the rows that are left.
        supervised_tokens: Those of them with loss.
        tokens_removed: Tokens of rows that were dropped, and tokens that were cut off.
        supervised_tokens_removed: Those of them that had loss.
        changes: Number of rows with each change of `PolicyResult.changes`.
        places: File (its index) and line of the first rows with each change.
    """

    rows: int = 0
    used: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    tokens_removed: int = 0
    supervised_tokens_removed: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, before: EncodedRow, kept: PolicyResult, file: int = 0, line: int = 0) -> None:
        """Add a row: its encoding, and the policy's result for it."""
        tokens, supervised = (len(kept.encoded.input_ids), kept.encoded.supervised_tokens) if kept.encoded else (0, 0)
        self.rows += 1
        self.used += kept.encoded is not None
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.tokens_removed += len(before.input_ids) - tokens
        self.supervised_tokens_removed += before.supervised_tokens - supervised
        self.changes.update(kept.changes)
        for change in kept.changes:
            self._place(change, [(file, line)])

    def extend(self, other: RowCounts) -> None:
        """Add the counts of the rows that come next."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.changes += other.changes
        for change, places in other.places.items():
            self._place(change, places)

    def _place(self, change: str, places: Sequence[tuple[int, int]]) -> None:
        known = self.places.setdefault(change, [])
        known += places[: SHOWN - len(known)]


@dataclass(frozen=True)
class SplitStats:
    """The statistics of one side of a split.

    Attributes:
        tally: Counts of its rows and tokens.
        sha256: Hashes of the rows that are used, by name: `rows`, `ids` and `labels`, as in `records.hashing`.
    """

    tally: RowCounts
    sha256: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as plain JSON data."""
        return {"tally": vars(self.tally), "sha256": dict(self.sha256)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SplitStats:
        """Return the statistics that `to_json` wrote."""
        counts = RowCounts(**data["tally"])
        counts.changes = Counter(counts.changes)
        # JSON has no tuples: a place comes back as a list.
        counts.places = {change: [(file, line) for file, line in found] for change, found in counts.places.items()}
        return cls(counts, data["sha256"])


def removed_counts(counts: RowCounts) -> dict[str, Any]:
    """Return the counts of dropped and cut rows and tokens, by the names of a manifest's `dataset`."""
    return {
        "rows_dropped": {reason: counts.changes[reason] for reason in DROPPED if counts.changes[reason]},
        "rows_truncated": counts.changes["cut"],
        "rows_without_loss": counts.changes["without-loss"],
        "tokens_removed": counts.tokens_removed,
        "supervised_tokens_removed": counts.supervised_tokens_removed,
    }


def token_stats(stats: SplitStats) -> dict[str, Any]:
    """Return hashes and numbers of the tokens that are used, by the names of a manifest's `masking`."""
    return {
        "ids_sha256": stats.sha256["ids"],
        "labels_sha256": stats.sha256["labels"],
        "tokens": stats.tally.tokens,
        "supervised_tokens": stats.tally.supervised_tokens,
    }


class StatsBuilder:
    """Builds the statistics of rows that come in order, one by one or in parts."""

    def __init__(self) -> None:
        self.tally = RowCounts()
        self._digests = {name: hashlib.sha256() for name in HASHED}

    def update(self, parts: Mapping[str, bytes]) -> None:
        """Add the bytes of the next rows, as `hashed_parts` returns them."""
        for name, part in parts.items():
            self._digests[name].update(part)

    def build(self) -> SplitStats:
        """Return the statistics of the rows so far."""
        return SplitStats(self.tally, {name: digest.hexdigest() for name, digest in self._digests.items()})


def hashed_parts(row: Row, encoded: EncodedRow) -> dict[str, bytes]:
    """Return the bytes of a row that are hashed, by the names of `SplitStats.sha256`."""
    ids, labels = framed_ids(encoded.input_ids), framed_ids(encoded.labels or ())
    return {"rows": framed_row(row), "ids": ids, "labels": labels}


def stats_of(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> SplitStats:
    """Return the statistics of rows that were encoded one by one, and all kept."""
    builder = StatsBuilder()
    for row, one in zip(rows, encoded, strict=True):
        builder.tally.add(one, PolicyResult(one))
        builder.update(hashed_parts(row, one))
    return builder.build()
