"""What a chat row becomes: ids, labels, and the spans that say who owns each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

IGNORE_INDEX = -100
"""The label of a token without loss (PyTorch's `ignore_index`)."""

SpanKind = Literal["control", "text", "tool_call", "eos"]


class Span(NamedTuple):
    """A run of tokens with one owner.

    Attributes:
        turn: Index of the turn in the normalised conversation, or None for BOS.
        role: `system`, `user`, `assistant` or `tool`; None for BOS.
        kind: `control` (structure), `text`, `tool_call` (from the marker to the last argument) or `eos`.
        start: First token, an index into `input_ids`.
        end: One past the last token.
        supervised: Whether the model is trained to produce these tokens.
    """

    turn: int | None
    role: str | None
    kind: SpanKind
    start: int
    end: int
    supervised: bool

    def to_json(self) -> dict[str, Any]:
        """Return the span as plain JSON data, in field order."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as a model is trained on it.

    Attributes:
        input_ids: Token ids, one `int` a token; BOS first.
        labels: As long as `input_ids`; `IGNORE_INDEX` where there is no loss, otherwise the token's own id
            (the shift by one happens in the model). None where a backend cannot say which tokens are the
            assistant's: then nothing may be trained on this row.
        spans: Half-open, in order, partitioning `input_ids`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None
    spans: tuple[Span, ...]

    @classmethod
    def from_spans(cls, input_ids: Sequence[int], spans: Iterable[Span]) -> EncodedRow:
        """Build a row whose labels are what its spans say."""
        spans = tuple(spans)
        labels = [IGNORE_INDEX] * len(input_ids)
        for span in spans:
            if span.supervised:
                labels[span.start : span.end] = input_ids[span.start : span.end]
        return cls(tuple(input_ids), tuple(labels), spans)

    def cut(self, length: int) -> EncodedRow:
        """Return the first `length` tokens with their labels and spans; nothing takes the place of what is cut off."""
        kept = (span for span in self.spans if span.start < length)
        spans = tuple(span._replace(end=min(span.end, length)) for span in kept)
        return EncodedRow(self.input_ids[:length], None if self.labels is None else self.labels[:length], spans)

    @property
    def supervised_tokens(self) -> int:
        """How many tokens carry loss."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX) if self.labels else 0
