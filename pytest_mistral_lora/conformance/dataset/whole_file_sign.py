"""A sign of a whole file as an observer: a state for each file, which is merged over parts in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord, extend_states
from pytest_mistral_lora.places import Place

FEWEST = 10
"""Fewest rows, pairs or answers of a file that show a sign: fewer can have something in common by chance."""


class FileState(Protocol):
    """What a sign keeps of the rows of one file; its size does not grow with the file."""

    def note(self, record: JudgedRecord) -> None:
        """Add a record."""

    def extend(self, other: Self) -> None:
        """Add the state of other rows of the file, which may come before or after these."""

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield what the whole file shows.

        Args:
            file: The place of the file.
        """


State = TypeVar("State", bound=FileState)


@dataclass
class FileStates(Generic[State]):
    """The state of each file, by its index."""

    by_file: dict[int, State] = field(default_factory=dict)

    def extend(self, other: FileStates[State]) -> None:
        """Add the states of other rows."""
        extend_states(self.by_file, other.by_file)


@dataclass(frozen=True)
class WholeFileSign(Generic[State]):
    """The observer of a sign that only a whole file shows.

    Attributes:
        make: Returns the state of no row.
    """

    make: Callable[[], State]
    case: ClassVar[str] = "statistics"
    fires_on_sample: ClassVar[bool] = False

    def start(self) -> FileStates[State]:
        """Return the state of no row."""
        return FileStates()

    def observe(self, record: JudgedRecord, state: FileStates[State]) -> Iterator[Finding]:
        """Note a record in the state of its file."""
        of_file = state.by_file.get(record.file)
        if of_file is None:
            of_file = state.by_file[record.file] = self.make()
        of_file.note(record)
        return iter(())

    def report(self, state: FileStates[State], files: Sequence[Place]) -> Iterator[Finding]:
        """Yield the findings of each file, at the file."""
        for index, file in enumerate(files):
            of_file = state.by_file.get(index)
            if of_file is not None:
                yield from of_file.findings(file)
