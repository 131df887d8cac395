"""The prompts of a dataset's rows, which end with a question: a chat template may err in them alone.

Templates look at roles, tools and kinds of content, and treat prompts of one shape alike. So one row of each shape is
kept, and of its prompts those are compared whose shape was not, the longest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from pytest_mistral_lora.chat.rows import Row, has_more_than_text

_ROWS = 64
"""Most rows to keep: those of the longest shapes."""
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
