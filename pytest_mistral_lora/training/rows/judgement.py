"""The judgement of the rows that a run trains on, in the pass that encodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.records.judged_rows import Judgement

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

Take: TypeAlias = "Callable[[int, Row | None, EncodedRow | RowError], None]"
"""Takes the number of a record, its row, and the backend's encoding of it, or why it cannot be trained on."""

ChunkJudge: TypeAlias = Callable[[Chunk, Take], Any]
"""Judges the records of a chunk, gives each to a function as it is encoded, and returns its part of the verdict."""


class RowsJudge(Protocol):
    """Judges the rows of a run.

    Attributes:
        identity: What its results depend on beside the rows and their encoding, as plain JSON data.
    """

    identity: Any

    def in_chunks(self, first: int, processes: int) -> Callable[[], ChunkJudge]:
        """Return what makes the judge of chunks in a process.

        Args:
            first: The index of the first file of the pass among all files.
            processes: The number of processes; if there are several, the result is picklable.
        """

    def take(self, part: Any) -> None:
        """Take the part of a chunk."""

    def refuse(self, file: int, error: InputError) -> None:
        """Take the error of a file that cannot be read, by its index among all files."""

    def results(self) -> str:
        """Return the results of all rows as one text, which may be kept; the rules on whole files speak here."""

    def decide(self, results: str) -> Judgement:
        """Return the judgement.

        Args:
            results: The results, of this or an earlier run.

        Raises:
            FindingsError: If the rows have an error that is not accepted.
        """


JUDGE = "pytest_mistral_lora.judging:rows_judge"
"""The importable name of the function that makes the judge, which has the rules: this room imports none."""


def judge_of(recipe: Recipe, encoder: Encoder, files: Sequence[DataFile], xfails: Path | None) -> RowsJudge:
    """Return the judge of the rows of a run.

    Args:
        recipe: The recipe.
        encoder: Its backend.
        files: Its files, those of `evaluation.retention` last.
        xfails: A file of known deviations beside that of the recipe, or None.

    Raises:
        InputError: If the known deviations cannot be read.
    """
    judge: RowsJudge = imported(JUDGE)(recipe, encoder, files, xfails)
    return judge
