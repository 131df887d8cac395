"""What became of many answers once they are decoded: those that a grammar judged, and characters that are lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pytest_mistral_lora.conformance.dataset.sign_count import SignCount
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord, JudgedRow, ObserverStates
from pytest_mistral_lora.errors import counted


@dataclass
class UnjudgedRows:
    """Rows whose answers were not judged.

    Attributes:
        rows: Their number.
        first: The place of the first of them, as `packed_place` returns it, and the reason; None without one.
    """

    rows: int = 0
    first: tuple[int, str] | None = None

    @property
    def reason(self) -> str:
        """Why the first of them was not judged; empty without one."""
        return "" if self.first is None else self.first[1]

    def add(self, at: int, reason: str) -> None:
        """Add a row, at its place as `packed_place` returns it."""
        self.extend(UnjudgedRows(1, (at, reason)))

    def extend(self, other: UnjudgedRows) -> None:
        """Add other rows."""
        self.rows += other.rows
        self.first = min(filter(None, (self.first, other.first)), default=None)


@dataclass
class DecodedAnswers:
    """What became of the answers of rows, as they are decoded.

    Attributes:
        not_read_back: Rows whose answers were not read back.
        by_grammar: Number of rows that a grammar judged.
        not_by_grammar: Rows that the grammar of their requests did not judge.
        refused: Number of rows with calls whose ids mistral-common's grammar refuses: its fault, not that of the rows.
        lost: Rows with answers that have characters which are not encoded.
    """

    not_read_back: UnjudgedRows = field(default_factory=UnjudgedRows)
    by_grammar: int = 0
    not_by_grammar: UnjudgedRows = field(default_factory=UnjudgedRows)
    refused: int = 0
    lost: SignCount = field(default_factory=SignCount)

    @property
    def why_not_by_grammar(self) -> str:
        """Why no grammar has judged an answer; empty if one has, or if there is none to ask."""
        return "" if self.by_grammar else self.not_by_grammar.reason

    @property
    def figures(self) -> dict[str, int]:
        """The numbers of rows by what a grammar could judge of them; empty if it has judged none."""
        if not self.by_grammar:
            return {}
        return {
            "rows_by_grammar": self.by_grammar,
            "rows_not_by_grammar": self.not_by_grammar.rows,
            "rows_with_refused_call_ids": self.refused,
        }

    def extend(self, other: DecodedAnswers) -> None:
        """Add the answers of other rows."""
        self.not_read_back.extend(other.not_read_back)
        self.by_grammar += other.by_grammar
        self.not_by_grammar.extend(other.not_by_grammar)
        self.refused += other.refused
        self.lost.extend(other.lost)


class AnswersAsDecoded:
    """The rules on answers as they are decoded; one of them is about what many rows have in common."""

    case = "answers-are-read-back"
    fires_on_sample = True

    def start(self) -> DecodedAnswers:
        """Return the state of no row."""
        return DecodedAnswers()

    def observe_row(self, row: JudgedRow, state: DecodedAnswers) -> Iterator[Finding]:
        """Yield the findings of the answers of a row."""
        judged = row.answers
        if judged is None:
            return
        yield from judged.findings
        if judged.no_decoder:
            state.not_read_back.add(row.at, judged.no_decoder)
        if judged.no_grammar:
            state.not_by_grammar.add(row.at, judged.no_grammar)
        elif judged.has_grammar:
            state.by_grammar += 1
        state.refused += judged.refuses_call_ids
        if judged.lost and row.origin == "written":
            state.lost.add(row.at, judged.lost, row.place)

    def observe(self, record: JudgedRecord, state: DecodedAnswers) -> Iterator[Finding]:
        """Yield nothing: each row was seen by itself."""
        return iter(())

    def report(self, state: DecodedAnswers, files: JudgedFiles) -> Iterator[Finding]:
        """Yield once what many rows can have in common: characters that are not encoded."""
        if state.lost.rows:
            examples = state.lost.examples
            found = f"characters of answers are not encoded in {counted(state.lost.rows, 'row')}"
            shown = "\n".join(f"{example.place}, {example.shown}" for example in examples)
            yield Finding("ML648", found, examples[0].place, "the texts of the rows", shown)


ANSWERS = AnswersAsDecoded()
"""The observer of answers as they are decoded."""


def decoded_answers(states: ObserverStates) -> DecodedAnswers:
    """Return what a pass has found of answers."""
    found: DecodedAnswers = states.of(f"{__name__}:ANSWERS")
    return found
