"""The rows of a gate: none of them is trained on, and those of other subjects are not the held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.likeness import conversation_numbers, row_likeness, shared_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.training.recipe import Evaluation
from pytest_mistral_lora.training.rows.loading import Split

Numbers = npt.NDArray[np.int64]

RETENTION_ROWS = NOWHERE.within("evaluation", "retention", "rows")


@dataclass(frozen=True)
class RowsToMeasure:
    """Rows whose loss is measured, each with the number of its conversation.

    Attributes:
        encoded: The rows.
        conversations: The result of `conversation_numbers`, `(rows,)` int64.
    """

    encoded: Sequence[EncodedRow] = ()
    conversations: Numbers = field(default_factory=lambda: numbers_of(()))

    @classmethod
    def of(cls, split: Split | None) -> RowsToMeasure:
        """Return the rows of a side of a split; no row without one."""
        return cls() if split is None else cls(split.encoded, numbers_of(split.rows))


@dataclass(frozen=True)
class GateRows:
    """The rows of a gate, and what is asked of them.

    Attributes:
        held_out: Held-out rows; the adapter's loss must not be above the base's.
        retention: Rows of other subjects.
        max_loss_increase: The increase of their loss that is allowed, in nats a trained token.
        asked: Held-out rows whose last turn is generated; empty without checks.
        checks: Format checks of the answers; the adapter's rates must not be below the base's.
        max_new_tokens: Longest answer, in tokens.
    """

    held_out: RowsToMeasure = field(default_factory=RowsToMeasure)
    retention: RowsToMeasure = field(default_factory=RowsToMeasure)
    max_loss_increase: float = 0.0
    asked: Sequence[Row] = ()
    checks: Sequence[FormatCheck] = ()
    max_new_tokens: int = 256

    @classmethod
    def of(
        cls, evaluation: Evaluation, checks: Sequence[FormatCheck], held_out: Split | None, retention: Split | None
    ) -> GateRows:
        """Return the rows of a recipe's gate.

        Args:
            evaluation: The section of the recipe.
            checks: Its format checks.
            held_out: The held-out rows; None without them.
            retention: The rows of `evaluation.retention`; None without them.
        """
        return cls(
            RowsToMeasure.of(held_out),
            RowsToMeasure.of(retention),
            evaluation.retention.max_loss_increase if evaluation.retention is not None else 0.0,
            # without held-out rows, those that a run answers are trained on
            held_out.rows[: evaluation.generations] if held_out is not None else (),
            checks,
            evaluation.max_new_tokens,
        )


def numbers_of(rows: Iterable[Row]) -> Numbers:
    """Return the number of each row's conversation, `(rows,)` int64."""
    return np.array(conversation_numbers(rows), np.int64)


def require_apart(train: Iterable[Row], held_out: Iterable[Row], retention: Iterable[Row]) -> None:
    """Refuse rows of a gate that measure something else than they are there for, by their content.

    Rows that differ in form alone are the same, as for the rules ML610, ML615 and ML632 of `mistral-lora check`.

    Args:
        train: The rows to train on.
        held_out: The held-out rows.
        retention: The rows of `evaluation.retention`.

    Raises:
        RecipeError: If the rows of other subjects have each held-out row, or no other one.
        InputError: If a row of the gate is trained on.
    """
    held, others = ({row_likeness(row): row for row in side} for side in (held_out, retention))
    if shared := shared_rows(held.keys(), others.keys()):
        raise RecipeError(
            shared,
            place=RETENTION_ROWS,
            expected="rows of other subjects",
            next_step="Name other files: these rows are judged as the held-out ones already.",
        )
    judged = {**others, **held}
    trained = ((row, judged.get(row_likeness(row))) for row in train) if judged else ()
    leaked = [(row, same) for row, same in trained if same is not None]
    if leaked:
        row, same = leaked[0]
        more = f"; so are {len(leaked) - 1} more" if len(leaked) > 1 else ""
        raise InputError(
            f"the row is also trained on, at {row.place}{more}",
            place=same.place,
            expected="rows that the gate can judge: none of them trained on",
            next_step="Take the row out of one side; mistral-lora check names each.",
        )
