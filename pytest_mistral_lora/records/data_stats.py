"""Numbers and hashes of the rows of a run: what was used, and what was dropped and cut on the way to it."""

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
"""Places that are kept of the rows that one thing was done to; all are counted."""


@dataclass
class Tally:
    """Numbers of one side of a split.

    Attributes:
        rows: Rows that were read for it.
        used: Rows that are left.
        tokens: Tokens of the rows that are left.
        supervised_tokens: Those of them with loss.
        tokens_removed: Tokens of rows that were dropped, and tokens that were cut off.
        supervised_tokens_removed: Those of them that had loss.
        changes: How many rows each change of `Kept.changes` was made to.
        places: File (its index) and line of the first of them.
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
        """Add a row: its encoding, and what the policy left of it."""
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

    def extend(self, other: Tally) -> None:
        """Add the rows that come next."""
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
class Figures:
    """What is known of one side of a split.

    Attributes:
        tally: Its numbers.
        sha256: Hashes of what is used, by name: `rows`, `ids` and `labels`, as `records.hashing` has them.
    """

    tally: Tally
    sha256: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON data."""
        return {"tally": vars(self.tally), "sha256": dict(self.sha256)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """Return figures from what `to_json` gave."""
        tally = Tally(**data["tally"])
        tally.changes = Counter(tally.changes)
        tally.places = {change: [(file, line) for file, line in found] for change, found in tally.places.items()}
        return cls(tally, data["sha256"])


def removed(tally: Tally) -> dict[str, Any]:
    """Return what policies did to the rows of one side, by the names of a manifest's `dataset`."""
    return {
        "rows_dropped": {reason: tally.changes[reason] for reason in DROPPED if tally.changes[reason]},
        "rows_truncated": tally.changes["cut"],
        "rows_without_loss": tally.changes["without-loss"],
        "tokens_removed": tally.tokens_removed,
        "supervised_tokens_removed": tally.supervised_tokens_removed,
    }


def tokens(figures: Figures) -> dict[str, Any]:
    """Return hashes and numbers of the tokens that are used, by the names of a manifest's `masking`."""
    return {
        "ids_sha256": figures.sha256["ids"],
        "labels_sha256": figures.sha256["labels"],
        "tokens": figures.tally.tokens,
        "supervised_tokens": figures.tally.supervised_tokens,
    }


class Sums:
    """Figures in the making: rows come in order, one by one or in parts."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._digests = {name: hashlib.sha256() for name in HASHED}

    def update(self, parts: Mapping[str, bytes]) -> None:
        """Hash what `hashed` gave for the next rows."""
        for name, part in parts.items():
            self._digests[name].update(part)

    def figures(self) -> Figures:
        """Return what it came to."""
        return Figures(self.tally, {name: digest.hexdigest() for name, digest in self._digests.items()})


def hashed(row: Row, encoded: EncodedRow) -> dict[str, bytes]:
    """Return what is hashed of a row, by the names of `Figures.sha256`."""
    ids, labels = framed_ids(encoded.input_ids), framed_ids(encoded.labels or ())
    return {"rows": framed_row(row), "ids": ids, "labels": labels}


def figures_of(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> Figures:
    """Return the figures of rows that were encoded one by one, and all kept."""
    sums = Sums()
    for row, one in zip(rows, encoded, strict=True):
        sums.tally.add(one, PolicyResult(one))
        sums.update(hashed(row, one))
    return sums.figures()
