"""The prompts of a dataset's rows, which end with a question: a chat template may err in them alone.

Templates look at roles, tools and kinds of content, and treat prompts of one shape alike. So one row of each shape is
kept, and of its prompts those are compared whose shape was not, the longest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.rows import Row, has_more_than_text
from pytest_mistral_lora.conformance.dataset.row_findings import backend_findings
from pytest_mistral_lora.conformance.row_table import unpacked_place
from pytest_mistral_lora.errors import OracleRejection

if TYPE_CHECKING:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.dataset.rows import DatasetPass

_ROWS = 64
"""Most rows to keep: those of the longest shapes."""
_SHARE = 24
"""One token of prompts is compared for so many tokens of rows, so that a pass takes hardly longer."""
_IN_ANY_CASE = 8_000
"""Tokens of prompts that are compared in any case: these take a small part of the time of the start."""

Shape = tuple[int, str]
"""The number of messages, and what else a template may look at."""


def shape_of(row: Row) -> Shape:
    """Return the shape of a row: its roles, its settings, and whether it has tools, calls and chunks (thinking)."""
    roles = " ".join(message["role"] for message in row.messages)
    calls = any(message.get("tool_calls") for message in row.messages)
    chunks = any(has_more_than_text(message.get("content")) for message in row.messages)
    return len(
        row.messages
    ), f"{roles} {bool(row.tools)} {calls} {chunks} {row.reasoning_effort} {bool(row.response_format)}"


@dataclass
class PromptRows:
    """The first row of each of the longest shapes: both sides agree about the row, so its prompts are worth a look.

    Attributes:
        first: The place of each row, as `packed_place` returns it, and the row, by its shape.
    """

    first: dict[Shape, tuple[int, Row]] = field(default_factory=dict)

    def note(self, row: Row, at: int) -> None:
        """Add a row.

        Args:
            row: The row.
            at: Its place, as `packed_place` returns it.
        """
        self._note(shape_of(row), at, row)

    def _note(self, shape: Shape, at: int, row: Row) -> None:
        if shape in self.first:
            if at < self.first[shape][0]:
                self.first[shape] = at, row
            return
        self.first[shape] = at, row
        if len(self.first) > _ROWS:
            del self.first[min(self.first)]

    def extend(self, other: PromptRows) -> None:
        """Add other rows."""
        for shape, (at, row) in other.first.items():
            self._note(shape, at, row)

    def prompts(self) -> Iterator[tuple[int, Row]]:
        """Yield one prompt of each shape, the longest first, with the place of its row."""
        from pytest_mistral_lora.chat.templates.compare import prompts_of

        rows = sorted(self.first.values(), key=lambda kept: kept[0])
        of_rows = [[(-len(prompt.messages), at, prompt) for prompt in prompts_of(row)] for at, row in rows]
        seen: set[Shape] = set()
        for _, at, prompt in heapq.merge(*of_rows, key=lambda entry: entry[:2]):
            shape = shape_of(prompt)
            if shape not in seen:
                seen.add(shape)
                yield at, prompt


def compare_prompts(found: DatasetPass, tokenizer: CheckpointTokenizer) -> dict[str, int]:
    """Compare prompts of a pass's rows, and add the differences to its findings; of each cause the first.

    Args:
        found: The pass over all rows.
        tokenizer: The tokenizer that judged them, with a chat template.

    Returns:
        The number of prompts that were compared, that mistral-common refuses, and that are left out for their length.
    """
    from pytest_mistral_lora.chat.templates.compare import compare

    counts = {"compared": 0, "refused": 0, "left_out": 0}
    tokens = max(_IN_ANY_CASE, sum(n * rows for n, rows in found.lengths.tokens.items()) // _SHARE)
    causes: set[str] = set()
    for at, prompt in found.prompts.prompts():
        if tokens <= 0:
            counts["left_out"] += 1
            continue
        try:
            comparison = compare(prompt, tokenizer.oracle, tokenizer.template)
        except OracleRejection:
            counts["refused"] += 1
            continue
        counts["compared"] += 1
        tokens -= len(comparison.oracle.input_ids)
        found.look_at(unpacked_place(at)[0], prompt.place)
        found.findings.at = at
        for finding in backend_findings(prompt, comparison, tokenizer.oracle):
            cause = finding.shape or finding.found
            if cause not in causes:
                causes.add(cause)
                found.findings.add(finding)
    return counts
