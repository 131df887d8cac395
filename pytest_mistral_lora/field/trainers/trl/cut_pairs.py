"""ML657: pairs whose answers differ only behind the tokens that TRL keeps by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.conformance.dataset.pairs import likeness_of_sides
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord

KEPT_TOKENS = 1024
"""Tokens of a side that `DPOConfig` of TRL 1.16 keeps by default, from its start."""


class _NoState:
    """The state of a rule that looks at one record alone."""

    def extend(self, other: _NoState) -> None:
        """Add nothing."""


class CutPairs:
    """Sees each pair by itself."""

    case: ClassVar[str] = "no-duplicates"
    fires_on_sample: ClassVar[bool] = False

    def start(self) -> _NoState:
        """Return the state of no row."""
        return _NoState()

    def observe(self, record: JudgedRecord, state: _NoState) -> Iterator[Finding]:
        """Yield the finding of a pair whose sides differ, but not in the tokens that are kept."""
        if len(record.rows) == 1 or likeness_of_sides(record.rows, record.layouts):
            return
        chosen, rejected = (side.input_ids for side in record.layouts)
        alike = equal_beginning(chosen, rejected)
        if alike >= KEPT_TOKENS:
            found = f"both sides begin with the same {alike:,} tokens: the first {KEPT_TOKENS:,} do not tell them apart"
            expected = f"answers that differ earlier, or a max_length above {alike:,}"
            yield Finding("ML657", found, record.rows[0].place.row, expected)

    def report(self, state: _NoState, files: JudgedFiles) -> Iterator[Finding]:
        """Yield nothing: each pair was judged by itself."""
        return iter(())


CUT_PAIRS = CutPairs()
