"""What a whole file trains on against what its assistants say: texts that were lost, and texts that came twice."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.findings import Finding

MOST = 100_000
"""Texts that are kept at a time; what a file loses beyond them is counted, not named."""
SHOWN = 20
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
    for text in texts[:SHOWN]:
        times = f" ({abs(text.balance)} times)" if abs(text.balance) > 1 else ""
        lines.append(f"{text.place}: {oracle.decode(list(text.ids))[:80]!r}{times}")
    return "\n".join(lines + ([f"… and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []))
