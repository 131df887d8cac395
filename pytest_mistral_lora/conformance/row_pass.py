"""The pass over rows: one judged record, the rules that observe it, and what they have found at the end.

Chat rows, encoded rows with messages, and conversations that are read back from ids become a `JudgedRecord`. Each rule
on rows is an observer: it sees one record at a time, and may keep a state of the file, which is merged over parts. The
pass owns one table of rows, puts it in order once, and asks the observers what the whole files show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.conformance.bounded_findings import BoundedFindings
from pytest_mistral_lora.conformance.counted_rows import CountedRows
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_table import JudgedTable, packed_place, unpacked_place
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.dataset.answers import JudgedAnswers
    from pytest_mistral_lora.conformance.row_table import Order

Origin = Literal["written", "read back"]
"""Where the messages of a record come from: the record itself, or its ids."""


LOST_IN_IDS: Mapping[str, str] = {
    "ML614": "messages that the encoder joins into one turn are one message when the ids are read back",
    "ML616": "an empty answer cannot be told from a turn that is missing: ML560; an empty completion is ML616",
    "ML677": "the ids have the system prompt where the encoder writes it",
    "ML678": "the empty user turn that the encoder writes is a message when the ids are read back",
    "ML648": "characters that are not encoded are not in the ids; U+2581 is a space, at the end of an answer ML528, "
    "ML529 or, if the answer is nothing else, ML560",
}
"""Rules that do not see conversations that are read back from ids, each with the reason."""


class GivenIds(NamedTuple):
    """What a trainer made of a record, without padding; of a packed sequence, of all its conversations.

    Attributes:
        ids: The ids.
        labels: The labels, as many as ids; fewer if the record has fewer.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class JudgedRecord:
    """A record whose rows were encoded: what a rule on rows sees.

    Attributes:
        place: Its place.
        rows: Its rows: both sides of a pair, or one.
        layouts: The encoding of each row by mistral-common; without an oracle, by the backend.
        trained: The encoding of each row that is trained on.
        origin: Where its messages come from.
        is_held_out: Whether it is held out.
        given: The ids and labels that stand beside it; None for chat rows.
        is_exact: Whether its ids and labels are mistral-common's: only then its answers are decoded.
        joins_system: Whether the tokenizer writes the system prompt into a text of the user, so that conversations that
            are read back have it there.
        declared: What the record has under the keys of `DECLARED_KEYS`.
        file: The index of its file.
    """

    place: Place
    rows: tuple[Row, ...]
    layouts: tuple[EncodedRow, ...]
    trained: tuple[EncodedRow, ...]
    origin: Origin = "written"
    is_held_out: bool = False
    given: GivenIds | None = None
    is_exact: bool = True
    joins_system: bool = False
    declared: tuple[tuple[str, Any], ...] = ()
    file: int = 0

    @property
    def at(self) -> int:
        """File and record, as `packed_place` returns them."""
        return packed_place(self.file, self.place.record or 0)

    @cached_property
    def parts(self) -> tuple[Row, ...]:
        """The first row, and of the second side of a pair its answer: the prompt of both sides is there once."""
        return (self.rows[0], *(row.kind.answer_part(row) for row in self.rows[1:]))

    @cached_property
    def whole(self) -> Row:
        """The messages of all its parts as one row."""
        if len(self.rows) == 1:
            return self.rows[0]
        return replace(self.rows[0], messages=tuple(message for part in self.parts for message in part.messages))


class JudgedRow(NamedTuple):
    """A row that was encoded, by itself: one side of a pair, or a row that the policies of a recipe drop.

    Attributes:
        row: The row.
        place: The place of its record.
        file: The index of its file.
        origin: Where its messages come from.
        answers: The verdict on its answers as they are decoded; None if they are not to be decoded.
        thinks: Whether the tokenizer has control tokens for thinking.
    """

    row: Row
    place: Place
    file: int
    origin: Origin = "written"
    answers: JudgedAnswers | None = None
    thinks: bool = False

    @property
    def at(self) -> int:
        """File and record, as `packed_place` returns them."""
        return packed_place(self.file, self.place.record or 0)


class RowState(Protocol):
    """What an observer keeps of the rows of a file, in one process."""

    def extend(self, other: Any) -> None:
        """Add the state of other rows, which may come before or after these."""


@runtime_checkable
class ColumnState(Protocol):
    """A state with a value for each row of the table."""

    def reorder(self, order: Order) -> None:
        """Put the values in another order, as `JudgedTable.reorder` does."""


class JudgedFiles(Sequence[Place]):
    """The files of a pass, each by its place, with the table of their rows, in order.

    Attributes:
        table: The rows.
        judged: The number of judged records of each file, those that are dropped included.
        is_sample: Whether more rows follow, as behind the batches of a guard.
    """

    def __init__(
        self, places: Sequence[Place], table: JudgedTable, judged: Sequence[int], *, is_sample: bool = False
    ) -> None:
        self._places = places
        self.table: JudgedTable = table
        self.judged: Sequence[int] = judged
        self.is_sample: bool = is_sample

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Place: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Place]: ...
    def __getitem__(self, index: int | slice) -> Place | Sequence[Place]:
        """Return the place of a file by its index."""
        return self._places[index]

    def place_of_row(self, row: int) -> Place:
        """Return the place of a row of the table by its index."""
        file, record = unpacked_place(self.table.places[row])
        return replace(self[file], record=record, line=self.table.lines[row] or None)


class RowObserver(Protocol):
    """A rule on rows, or several rules that read the same texts.

    An observer is given to worker processes by its importable name, `package.module:NAME`.

    Attributes:
        case: The check that reports its findings.
        fires_on_sample: Whether `report` is asked about a sample, too, such as the batches of a guard, behind which
            more rows follow.
    """

    case: str
    fires_on_sample: bool

    def start(self) -> RowState:
        """Return the state of no row."""

    def observe(self, record: JudgedRecord, state: Any) -> Iterator[Finding]:
        """Yield the findings of a record, and note it in the state."""

    def report(self, state: Any, files: JudgedFiles) -> Iterator[Finding]:
        """Yield the findings of whole files; of a sample only if the observer `fires_on_sample`.

        Findings of one rule are printed in this order, but those at a file in the order of the files. One with `more`
        stands for as many findings as that.

        Args:
            state: The state of all rows, merged over processes.
            files: The files, and the table of their rows.
        """


@runtime_checkable
class EachRowObserver(Protocol):
    """An observer that sees each row that is encoded, too, whether or not its record is trained on."""

    def observe_row(self, row: JudgedRow, state: Any) -> Iterator[Finding]:
        """Yield the findings of a row, and note it in the state; `observe` follows for the whole record."""


OBSERVERS: list[str] = [
    f"pytest_mistral_lora.conformance.dataset.{name}"
    for name in (
        "decoded_answers:ANSWERS",
        "texts:CONVERSIONS",
        "pairs:PAIRS",
        "figures:FIGURES",
        "file_faults:FAULTY_FILES",
        "repeats:REPEATS",
        "every_text:EDGES",
        "every_row:TURN_ALONE",
        "every_text:OPENINGS",
        "every_row:ONE_LENGTH",
        "every_side:SIDES",
        "every_side:RATINGS",
        "declared_answers:DECLARED",
        "declared_answers:CUT",
        "turn_order:TURN_ORDER",
    )
]
"""The importable names of the observers, in order: `package.module:NAME`. Add yours behind them.

Behind these come the rules about trainers, which each `Trainer` names.
"""


def named_observer(name: str) -> RowObserver:
    """Return the observer of an importable name.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.
    """
    found: RowObserver = imported(name)
    return found


Key = TypeVar("Key")
State = TypeVar("State", bound=RowState)


def extend_states(known: dict[Key, State], other: Mapping[Key, State]) -> None:
    """Add the states of other rows to those that have the same key."""
    for key, state in other.items():
        if key in known:
            known[key].extend(state)
        else:
            known[key] = state


@dataclass
class ObserverStates:
    """The states of the observers, by their importable names."""

    by_name: dict[str, RowState] = field(default_factory=dict)

    def of(self, name: str) -> Any:
        """Return the state of an observer by its name; that of no row if it has seen none."""
        state = self.by_name.get(name)
        if state is None:
            state = self.by_name[name] = named_observer(name).start()
        return state

    def extend(self, other: ObserverStates) -> None:
        """Add the states of other rows."""
        extend_states(self.by_name, other.by_name)


@dataclass
class RowPass:
    """What a pass over rows has found, or over a part of them: parts merge in any order.

    Attributes:
        file: The index of the file of the record that is judged.
        place: The place of that record.
        table: The rows.
        counts: Numbers of records by file and by what became of them: `judged`, and what a subclass adds.
        converted: The records by what was converted to read them.
        states: The states of the observers.
        findings: The findings, rule by rule.
        unchecked: The rows that are not judged.
    """

    file: int = 0
    place: Place = NOWHERE
    table: JudgedTable = field(default_factory=JudgedTable)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    converted: CountedRows = field(default_factory=CountedRows)
    states: ObserverStates = field(default_factory=ObserverStates)
    findings: BoundedFindings = field(default_factory=BoundedFindings)
    unchecked: CountedRows = field(default_factory=CountedRows)

    def look_at(self, file: int, place: Place) -> None:
        """Take the record to which the next findings belong.

        Args:
            file: The index of its file.
            place: The place of the record.
        """
        self.file, self.place = file, place
        self.findings.at = packed_place(file, place.record or 0)

    def extend(self, other: RowPass) -> None:
        """Add the rows, counts and findings of another part of the files."""
        self.table.extend(other.table)
        self.counts.update(other.counts)
        self.converted.extend(other.converted)
        self.states.extend(other.states)
        self.findings.extend(other.findings)
        self.unchecked.extend(other.unchecked)

    def put_in_order(self) -> None:
        """Put the rows into the order of the files, regardless of the order of adding parts."""
        order = self.table.order()
        if order is None:
            return
        self.table.reorder(order)
        for state in self.states.by_name.values():
            if isinstance(state, ColumnState):
                state.reorder(order)

    def report(self, places: Sequence[Place], *, is_sample: bool = False) -> None:
        """Add the findings that only whole files show, once all rows are in order.

        Args:
            places: The place of each file.
            is_sample: Whether more rows follow, as behind the batches of a guard: then only those observers are asked
                that fire on a sample.
        """
        judged = [self.counts[file, "judged"] for file in range(len(places))]
        files = JudgedFiles(places, self.table, judged, is_sample=is_sample)
        indices = {file.whole: index for index, file in reversed([*enumerate(places)])}
        for name, state in self.states.by_name.items():
            observer = named_observer(name)
            if is_sample and not observer.fires_on_sample:
                continue
            for finding in observer.report(state, files):
                is_of_file = finding.place.record is None
                at = packed_place(indices.get(finding.place.whole, 0), 0) if is_of_file else None
                self.findings.add_of_file(finding, at)
