"""What a chat row becomes: ids, labels, and the spans that say who owns each token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError

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


def encoded_text(encoded: EncodedRow, piece: Callable[[int], str]) -> str:
    """Return one line for each span: its tokens' range, whether they are trained on, turn, role, kind, pieces.

    Args:
        encoded: The row.
        piece: Gives the vocabulary's spelling of an id.
    """
    lines = []
    for span in encoded.spans:
        owner = "-" if span.turn is None else f"turn {span.turn} {span.role}"
        state = "train" if span.supervised else "-100"
        pieces = " ".join(piece(token) for token in encoded.input_ids[span.start : span.end])
        lines.append(f"  {span.start:>5}-{span.end:<5} {state:<6} {owner:<18} {span.kind:<10} {pieces}")
    trained = f"{encoded.supervised_tokens} of {len(encoded.input_ids)} tokens are trained on"
    return "\n".join([*lines, f"  {trained}"])


Truncation = Literal["error", "drop", "right"]
Unsupervised = Literal["error", "drop", "warn"]
Fault = Literal["no-labels", "nothing-supervised", "too-long"]

DROPPED = ("too-long", "nothing-supervised")
"""Why a row is dropped, among the changes of `Kept`."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a policy leaves of a row.

    Attributes:
        encoded: What is trained on; None where the row is dropped.
        changes: What was done and why: `too-long` or `nothing-supervised` for a row that is dropped, `cut` for one that
            is shorter than before, `without-loss` for one that is kept without a supervised token.
    """

    encoded: EncodedRow | None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done with a row that cannot be trained on as it is.

    Attributes:
        max_length: Tokens of the longest row that is trained on whole.
        truncation: What is done with a longer one: `error`, `drop`, or `right` to cut its end off.
        unsupervised: What is done with a row without a supervised token, after a cut: `error`, `drop`, or `warn` to
            keep it.
    """

    max_length: int
    truncation: Truncation = "error"
    unsupervised: Unsupervised = "error"

    def faults(self, encoded: EncodedRow, row: Row) -> Iterator[tuple[Fault, RowError]]:
        """Yield every reason why this policy refuses a row; a trainer gives the first."""
        if encoded.labels is None:
            yield "no-labels", _no_labels(row)
        elif self.unsupervised == "error" and self._teaches_nothing(encoded):
            yield "nothing-supervised", self._nothing_supervised(encoded, row)
        if self.truncation == "error" and self._is_long(encoded):
            yield "too-long", self._too_long(encoded, row)

    def apply(self, encoded: EncodedRow) -> Kept:
        """Return what is left of a row that this policy does not refuse."""
        if self._dropped_whole(encoded):
            return Kept(None, ("too-long",))
        kept = self._shortened(encoded)
        changes = ("cut",) if kept is not encoded else ()
        if kept.supervised_tokens:
            return Kept(kept, changes)
        return (
            Kept(None, ("nothing-supervised",))
            if self.unsupervised == "drop"
            else Kept(kept, (*changes, "without-loss"))
        )

    def _is_long(self, encoded: EncodedRow) -> bool:
        return len(encoded.input_ids) > self.max_length

    def _dropped_whole(self, encoded: EncodedRow) -> bool:
        return self.truncation == "drop" and self._is_long(encoded)

    def _shortened(self, encoded: EncodedRow) -> EncodedRow:
        return encoded.cut(self.max_length) if self.truncation == "right" and self._is_long(encoded) else encoded

    def _teaches_nothing(self, encoded: EncodedRow) -> bool:
        return not self._dropped_whole(encoded) and not self._shortened(encoded).supervised_tokens

    def _nothing_supervised(self, encoded: EncodedRow, row: Row) -> RowError:
        found = "no token is trained on: every assistant message has weight 0"
        if encoded.supervised_tokens:
            found = f"no token is trained on in the first {self.max_length} of {len(encoded.input_ids)}"
        return RowError(found, place=row.place)

    def _too_long(self, encoded: EncodedRow, row: Row) -> RowError:
        return RowError(
            f"{len(encoded.input_ids)} tokens",
            place=row.place,
            expected=f"at most training.max_length = {self.max_length}: a cut row would not teach the model to stop",
        )


def _no_labels(row: Row) -> RowError:
    return RowError(
        "labels are not available: the chat template does not say which tokens are the assistant's",
        place=row.place,
        next_step="Train with backend: mistral-common, or mark the template with {% generation %}.",
    )
