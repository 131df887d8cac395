"""Which encoded rows are trained on: whole, cut by choice, or not at all, and never in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError

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
