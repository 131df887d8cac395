"""What the labels of one line say about the objective of a run: those by which they are exact."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.objective import ANSWERS, NEEDS, Objective
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.comparison import EncodedLineComparison, EncodedRowComparison
from pytest_mistral_lora.conformance.encoded.row_faults import label_faults

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


class LineLabels(NamedTuple):
    """What the labels of a line say about the objective of the run.

    Attributes:
        fits: The objectives other than `answers` by which they are exact.
        is_other: Whether they differ from those of `answers`.
    """

    fits: frozenset[Objective]
    is_other: bool


_EVERYTHING = Objective("everything")


def candidates(oracle: Oracle) -> frozenset[Objective]:
    """Return the objectives that labels may follow although nobody declares one."""
    return frozenset(Objective.expressible(oracle.control_ids)) - {ANSWERS, _EVERYTHING}


def labels_of(
    comparison: EncodedLineComparison, wanted: frozenset[Objective], *, is_written: bool
) -> LineLabels | None:
    """Return what the labels of a line say about some objectives; None if they say nothing.

    Args:
        comparison: The line with mistral-common's encoding.
        wanted: The objectives that all lines before it agree on.
        is_written: Whether the line has messages; else their weights are read from the labels, and count as 1.
    """
    found = [_RowLabels(one, is_written).fitting(wanted) for one in comparison.conversations() if _takes_part(one)]
    known = [one for one in found if one is not None]
    if not known:
        return None
    fits = frozenset.intersection(*(fits for fits, _ in known))
    return LineLabels(fits, any(is_other for _, is_other in known))


def _takes_part(compared: EncodedRowComparison) -> bool:
    """Return whether the labels of a conversation may follow an objective.

    One that cannot be read back has no messages, a completion takes no objective, and no objective is meant to leave
    nothing to train on (ML544).
    """
    is_conversation = bool(compared.row.messages) and compared.row.kind.is_chat
    return is_conversation and any(label != IGNORE_INDEX for label in compared.labels)


class _RowLabels:
    """The labels of a conversation, compared with those by several objectives."""

    def __init__(self, compared: EncodedRowComparison, is_written: bool) -> None:
        self._compared = compared
        self._encoded, self._oracle = compared.expected, compared.oracle
        is_unweighed = any(message.get("weight") == 0 for message in compared.row.messages)
        self._row = compared.row.unweighed() if is_unweighed and not is_written else compared.row
        self._known: dict[Objective, bool | None] = {}

    def fitting(self, wanted: frozenset[Objective]) -> tuple[frozenset[Objective], bool] | None:
        """Return the objectives by which the labels are exact, and whether `answers` is none of them.

        None if the labels say nothing: of a row that is cut, or has other ids, they may fit no objective.
        """
        by_answers = self._is_exact(ANSWERS)
        if by_answers is None:
            return None
        if not by_answers and self._is_exact(_EVERYTHING):
            return frozenset(), True  # ML543, which a careless default makes in each row
        if self._compared.ids == self._encoded.input_ids:
            return frozenset(objective for objective in wanted if self._is_exact(objective)), not by_answers
        # all candidates, so that the lines before it do not decide whether it says something
        fits = frozenset(objective for objective in candidates(self._oracle) if self._is_exact(objective))
        return (fits, not by_answers) if fits or by_answers else None

    def _is_exact(self, objective: Objective) -> bool | None:
        """Return whether the labels are exact by an objective; None if its turns cannot be told apart."""
        objective = self._simplest(objective)
        if objective not in self._known:
            self._known[objective] = self._compare(replace(self._row, objective=objective))
        return self._known[objective]

    def _simplest(self, objective: Objective) -> Objective:
        """Return an objective of fewer words with the same labels of this row, if that is seen at once."""
        without = tuple(word for word in objective.without if word in self._telling)
        turns = objective.turns
        if turns in ("last-answer", "last-round") and self._has_one_answer:
            turns = ANSWERS.turns
        return Objective(turns, without)

    @cached_property
    def _telling(self) -> frozenset[str]:
        """The modifiers whose tokens are among the ids."""
        ids = self._compared.ids
        return frozenset(word for word, literal in NEEDS.items() if self._oracle.control_ids.get(literal) in ids)

    @property
    def _has_its_weights(self) -> bool:
        return self._row is self._compared.row

    @cached_property
    def _has_one_answer(self) -> bool:
        return len(self._row.assistant_groups()) == 1

    def _compare(self, row: Row) -> bool | None:
        expected: EncodedRow | None = self._encoded
        # a sound row in a file of any size is compared with its encoding alone
        if not row.objective.is_default or not self._has_its_weights:
            expected = self._encoded.weighed_as(row, self._oracle.control_ids)
        if expected is None:
            return None
        compared = self._compared
        return not label_faults(expected, compared.ids, compared.labels, self._oracle, row.objective)
