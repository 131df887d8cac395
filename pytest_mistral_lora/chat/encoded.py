"""An encoded row: ids, labels, the spans that own the tokens, and the policy for rows that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pytest_mistral_lora.chat.chunks.registry import block_literals
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError

IGNORE_INDEX = -100
"""The label of a token without loss (PyTorch's `ignore_index`)."""

ANSWERS = ("assistant", "completion")
"""The roles of the turns that the model writes."""

SpanKind = Literal["control", "text", "tool_call", "eos"]


class Span(NamedTuple):
    """A run of tokens with one owner.

    Attributes:
        turn: Index of the turn in the normalised conversation, or None for BOS.
        role: `system`, `user`, `assistant` or `tool`; of a fill-in-the-middle row, `suffix`, `prompt` or `completion`;
            None for BOS.
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

    @property
    def is_answer(self) -> bool:
        """Whether the model writes these tokens: an answer, or a completion."""
        return self.role in ANSWERS

    def to_json(self) -> dict[str, Any]:
        """Return the span as plain JSON data, in field order."""
        return self._asdict()


@dataclass(frozen=True)
class EncodedRow:
    """A row as a model is trained on it.

    Attributes:
        input_ids: Token ids, one `int` a token; BOS first.
        labels: As long as `input_ids`; `IGNORE_INDEX` if there is no loss, otherwise the token's own id
            (the shift by one happens in the model). None if a backend cannot separate the assistant's tokens from the
            others: then nothing may be trained on this row.
        spans: Half-open, in order, partitioning `input_ids`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None
    spans: tuple[Span, ...]

    @classmethod
    def from_spans(cls, input_ids: Sequence[int], spans: Iterable[Span]) -> EncodedRow:
        """Build a row whose labels follow from its spans: a token is supervised if its span is."""
        spans = tuple(spans)
        labels = [IGNORE_INDEX] * len(input_ids)
        for span in spans:
            if span.supervised:
                labels[span.start : span.end] = input_ids[span.start : span.end]
        return cls(tuple(input_ids), tuple(labels), spans)

    def cut(self, length: int) -> EncodedRow:
        """Return the first `length` tokens with their labels and spans; no EOS is put at the cut."""
        kept = (span for span in self.spans if span.start < length)
        spans = tuple(span._replace(end=min(span.end, length)) for span in kept)
        return EncodedRow(self.input_ids[:length], None if self.labels is None else self.labels[:length], spans)

    def under(self, objective: Objective, controls: Mapping[str, int]) -> EncodedRow:
        """Return the row, whose turns have labels by `Row.trained_weights`, with a label for each token.

        Args:
            objective: The declared objective.
            controls: The ids of the control tokens, by literal.
        """
        if objective.is_of_turns:
            return self
        trained = [False] * len(self.input_ids)
        for span in self.spans:
            is_given = objective.turns == "everything" and not span.is_answer
            trained[span.start : span.end] = [span.supervised or is_given] * (span.end - span.start)
        if objective.turns == "everything":
            inputs = {controls[name] for name in block_literals() if name in controls}
            # no token predicts the first one
            trained = [bool(at) and is_on and self.input_ids[at] not in inputs for at, is_on in enumerate(trained)]
        if "no-thinking" in objective.without:
            for at in _thoughts(self, controls):
                trained[at] = False
        if "no-calls" in objective.without:
            for at in _calls(self, controls):
                trained[at] = False
        return EncodedRow.from_spans(self.input_ids, _split(self.spans, trained))

    def weighed_as(self, row: Row, controls: Mapping[str, int]) -> EncodedRow | None:
        """Return the encoding with labels by the weights and the objective of a row with the same turns.

        Args:
            row: The row; its messages are those of the encoding, but for their weights.
            controls: The ids of the control tokens, by literal.

        Returns:
            The encoding; None if the weights join turns of the model that the encoding has apart.
        """
        turns = list(dict.fromkeys(span.turn for span in self.spans if span.is_answer))
        groups, weights = row.assistant_groups(), row.trained_weights()
        if len(turns) != len(groups):
            return None
        trained = {turn for turn, group in zip(turns, groups, strict=True) if weights[group[0]]}
        spans = (span._replace(supervised=span.is_answer and span.turn in trained) for span in self.spans)
        return EncodedRow.from_spans(self.input_ids, spans).under(row.objective, controls)

    @cached_property
    def answer_spans(self) -> Mapping[int, Sequence[Span]]:
        """The spans of each turn that the model writes, by the index of the turn."""
        turns: dict[int, list[Span]] = {}
        for span in self.spans:
            if span.is_answer and span.turn is not None:
                turns.setdefault(span.turn, []).append(span)
        return turns

    @cached_property
    def supervised_tokens(self) -> int:
        """Number of tokens with a label other than `IGNORE_INDEX`; 0 if there are no labels."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX) if self.labels else 0


def _thoughts(encoded: EncodedRow, controls: Mapping[str, int]) -> Iterator[int]:
    """Yield the tokens of each thought with its markers; one that is left open ends before the next control token."""
    opens, closes, marks = controls.get("[THINK]"), controls.get("[/THINK]"), set(controls.values())
    is_open = False
    for at, token in enumerate(encoded.input_ids):
        if token == opens or (is_open and token not in marks):
            is_open = True
            yield at
        elif is_open:
            is_open = False
            if token == closes:
                yield at


def _calls(encoded: EncodedRow, controls: Mapping[str, int]) -> Iterator[int]:
    """Yield the tokens of each answer from its first `[TOOL_CALLS]` on."""
    called: int | None = None
    for span in encoded.spans:
        if not span.is_answer:
            continue
        for at in range(span.start, span.end):
            if encoded.input_ids[at] == controls.get("[TOOL_CALLS]"):
                called = span.turn
            if called is not None and span.turn == called:
                yield at


def _split(spans: tuple[Span, ...], trained: list[bool]) -> Iterator[Span]:
    """Yield spans each of which is trained on as a whole, or not at all."""
    for span in spans:
        start = span.start
        for end in range(span.start + 1, span.end + 1):
            if end == span.end or trained[end] != trained[start]:
                yield span._replace(start=start, end=end, supervised=trained[start])
                start = end


def encoded_text(encoded: EncodedRow, piece: Callable[[int], str]) -> str:
    """Return one line for each span: token range, `train` or -100, turn, role, kind and pieces.

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


def why_without_loss(row: Row) -> str:
    """Return why no token of a row is trained on, though its encoding is whole."""
    reason = "every assistant message has weight 0"
    if not row.objective.is_default:
        reason = f"the objective is {row.objective}"
    elif any(row.trained_weights()):
        # v2 leaves out tool calls before the last user message, and the blocks of a template may be empty
        reason = "the encoding has no token of an answer of weight 1"
    return f"no token is trained on: {reason}"


Truncation = Literal["error", "drop", "right"]
Unsupervised = Literal["error", "drop", "warn"]
PolicyFault = Literal["no-labels", "nothing-supervised", "too-long"]

DROPPED = ("too-long", "nothing-supervised")
"""The values of `PolicyResult.changes` for a dropped row."""


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The result of a policy for one row.

    Attributes:
        encoded: The row that is trained on; None if the row is dropped.
        changes: `too-long` or `nothing-supervised` if the row is dropped, `cut` if it is shorter than before,
            `without-loss` if it is kept without a supervised token; empty if it is kept whole.
    """

    encoded: EncodedRow | None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """A recipe's choice for rows that cannot be trained on unchanged.

    Attributes:
        max_length: Tokens of the longest row that is trained on whole.
        truncation: For a longer row: `error`, `drop`, or `right` to cut its end off.
        unsupervised: For a row without a supervised token, after a cut: `error`, `drop`, or `warn` to keep it.
    """

    max_length: int
    truncation: Truncation = "error"
    unsupervised: Unsupervised = "error"

    def faults(self, encoded: EncodedRow, row: Row) -> Iterator[tuple[PolicyFault, RowError]]:
        """Yield every reason why this policy refuses a row; a trainer reports the first."""
        length = len(encoded.input_ids)
        dropped_as_long = self.truncation == "drop" and length > self.max_length
        if encoded.labels is None:
            yield (
                "no-labels",
                RowError(
                    "labels are not available: the chat template does not mark the assistant's tokens",
                    place=row.place,
                    next_step="Train with backend: mistral-common, or mark the template with {% generation %}.",
                ),
            )
        elif self.unsupervised == "error" and not dropped_as_long and not self._shortened(encoded).supervised_tokens:
            found = f"no token is trained on in the first {self.max_length} of {length}"
            if not encoded.supervised_tokens:
                found = why_without_loss(row)
            yield "nothing-supervised", RowError(found, place=row.place)
        if self.truncation == "error" and length > self.max_length:
            limit = f"at most training.max_length = {self.max_length}: a cut row would not teach the model to stop"
            yield "too-long", RowError(f"{length} tokens", place=row.place, expected=limit)

    def apply(self, encoded: EncodedRow) -> PolicyResult:
        """Drop, cut or keep a row that this policy does not refuse."""
        if self.truncation == "drop" and len(encoded.input_ids) > self.max_length:
            return PolicyResult(None, ("too-long",))
        kept = self._shortened(encoded)
        changes = ("cut",) if kept is not encoded else ()
        if kept.supervised_tokens:
            return PolicyResult(kept, changes)
        if self.unsupervised == "drop":
            return PolicyResult(None, ("nothing-supervised",))
        return PolicyResult(kept, (*changes, "without-loss"))

    def _shortened(self, encoded: EncodedRow) -> EncodedRow:
        too_long = self.truncation == "right" and len(encoded.input_ids) > self.max_length
        return encoded.cut(self.max_length) if too_long else encoded
