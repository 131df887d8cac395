"""One judged record, and the rules that observe it, whatever source it comes from.

Chat rows, encoded rows with messages, and conversations that are read back from ids become a `JudgedRecord`. Each rule
on rows is an observer: it sees one record at a time, and may keep a state of the file, which is merged over parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place

Origin = Literal["written", "read back"]
"""Where the messages of a record come from: the record itself, or its ids."""


class GivenIds(NamedTuple):
    """What a trainer made of a record, without padding; of a packed sequence, of all its conversations.

    Attributes:
        ids: The ids.
        labels: The labels, as many as ids; fewer if the record has fewer.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
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
        label: What the record has under `label`, if that is letters.
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
    label: str = ""


class RowState(Protocol):
    """What an observer keeps of the rows of a file, in one process."""

    def extend(self, other: Any) -> None:
        """Add the state of other rows, which may come before or after these."""


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

    def report(self, state: Any, files: Sequence[Place]) -> Iterator[Finding]:
        """Yield the findings of whole files; of a sample only if the observer `fires_on_sample`.

        Args:
            state: The state of all rows, merged over processes.
            files: The place of each file.
        """


OBSERVERS: list[str] = [
    f"pytest_mistral_lora.conformance.dataset.{name}"
    for name in (
        "every_text:EDGES",
        "every_row:TURN_ALONE",
        "every_text:OPENINGS",
        "every_row:ONE_LENGTH",
        "every_side:SIDES",
        "every_side:RATINGS",
        "every_side:LETTERS",
    )
]
"""The importable names of the observers, in order: `package.module:NAME`. Add yours behind them."""


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
    """The states of further observers, by their importable names."""

    by_name: dict[str, RowState] = field(default_factory=dict)

    def extend(self, other: ObserverStates) -> None:
        """Add the states of other rows."""
        extend_states(self.by_name, other.by_name)
