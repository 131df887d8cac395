"""The rows that a runner is given: the user's records or the packaged ones, and the runner's command for their kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.rated import RATED
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.row_files import read_records, read_rows
from pytest_mistral_lora.chat.rows import RecordKind, Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.goldens import packaged_cases, packaged_pairs
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows of one kind, and the command that takes them.

    Attributes:
        rows: The rows in order; both sides of a preference pair follow each other. May be empty for a user's files.
        task: The runner's command for preferences, one of its `tasks`; empty for chat rows.
    """

    rows: Sequence[Row]
    task: str = ""

    @classmethod
    def read(
        cls, runner: Trainer, files: Iterable[Path | DataFile], *, task: str | None = None, config: Path | None = None
    ) -> GivenRows:
        """Return the rows of files; a runner that takes no preferences refuses pairs.

        Args:
            runner: The runner.
            files: The files.
            task: The command that the user names, or None.
            config: The runner's own configuration, which may name the command, or None.

        Raises:
            InputError: If a file cannot be opened, a record cannot be read or is refused, the records are of several
                kinds, or the command does not take them.
        """
        records: list[tuple[Row, ...]]
        if runner.tasks.pairs or runner.tasks.rated:
            records = [record for file in files for record in read_records(file)]
        else:
            records = [(row,) for file in files for row in read_rows(file)]
        kind = _kind_of(records) if records else _kind_of_packaged(runner.tasks, task, config)
        rows = tuple(row for record in records for row in record)
        return cls(rows, runner.tasks.task_for(kind, task, config))

    @classmethod
    def packaged(cls, runner: Trainer, oracle: Oracle, task: str = "") -> GivenRows:
        """Return the packaged rows that a tokenizer's version encodes.

        Args:
            runner: The runner.
            oracle: The tokenizer.
            task: One of its commands for preferences, which gets the packaged pairs; empty for chat rows.
        """
        if not task:
            return cls([case.row for case in packaged_cases() if case.fits(oracle)])
        return cls(preference_rows([case.rows for case in packaged_pairs() if case.fits(oracle)], runner, task), task)

    @property
    def by_line(self) -> list[Row]:
        """The first row of each record, with the place of the record: that of each line of an encoded-rows file."""
        firsts = (record[0] for record in by_record(self.rows))
        return [replace(row, place=_record_place(row)) for row in firsts]


def by_record(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """Return the rows of each record: both sides of a pair, or one row."""
    records: list[tuple[Row, ...]] = []
    for row in rows:
        if row.kind.starts_record(row):
            records.append((row,))
        else:
            records[-1] += (row,)
    return records


def preference_rows(pairs: Iterable[Sequence[Row]], runner: Trainer, task: str) -> list[Row]:
    """Return the rows of preference pairs in the form that a task of a runner takes.

    Args:
        pairs: The pairs, each as its chosen and its rejected row.
        runner: The runner.
        task: One of its tasks: a task for rated answers alone is given each answer of a pair, rated.
    """
    if task in runner.tasks.pairs:
        return [row for pair in pairs for row in pair]
    return [row for pair in pairs for row in RATED.of_pair(pair)]


def _record_place(row: Row) -> Place:
    """Return the place of the record of a row; that of a packaged row has the name of its case."""
    part, side = row.place.part, row.kind.side_part(row)
    is_of_side = bool(side) and part[-len(side) :] == side
    return replace(row.place, part=part[: -len(side)]) if is_of_side else row.place


def _kind_of_packaged(tasks: PreferenceTasks, task: str | None, config: Path | None) -> RecordKind:
    """Return the kind of the packaged rows that stand in for a user's: pairs if a task of preferences is named."""
    named = task or tasks.configured(config)
    if task is None and named not in (*tasks.pairs, *tasks.rated):
        return CONVERSATION
    return RATED if named in tasks.rated and named not in tasks.pairs else PAIR


def _kind_of(records: Sequence[tuple[Row, ...]]) -> RecordKind:
    """Return the kind of all records."""
    kinds = {kind.name: kind for kind in (record[0].kind for record in records)}
    if len(kinds) > 1:
        found = " and ".join(kind.title for kind in kinds.values())
        place = _record_place(records[0][0])
        raise InputError(f"{found} in one dataset", place=place, expected="rows of one kind")
    return next(iter(kinds.values()))
