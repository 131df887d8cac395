"""What an evaluation asks beside the ids of its prompts: a chat, its examples as turns, and the system prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place

_SHOWN = 80


@dataclass
class EvaluationPrompts:
    """The prompts of an evaluation.

    Attributes:
        prompts: Their number.
        others: Number of those whose system prompt no row is trained with.
        first: The system prompt of the first of these, and its place; None without one.
    """

    prompts: int = 0
    others: int = 0
    first: tuple[str | None, Place] | None = None

    def extend(self, other: EvaluationPrompts) -> None:
        """Add the prompts of later lines."""
        self.prompts += other.prompts
        self.others += other.others
        self.first = self.first or other.first


class EvaluationJudge:
    """Judges the prompts of an evaluation, a line at a time."""

    def __init__(self, trained: Sequence[Row] = ()) -> None:
        """Note the system prompts of training.

        Args:
            trained: The rows that the model was trained on; empty if they are not known.
        """
        systems = [_system_prompt(row) for row in trained]
        self._trained = dict.fromkeys(systems) if None not in systems else {}
        self._trained_rows = len(systems)

    def findings(self, line: EncodedLine, noted: EvaluationPrompts) -> Iterator[Finding]:
        """Yield the findings of a line, and note it; none if it is no prompt of an evaluation."""
        if line.few_shot is None:
            return
        if not line.rows:
            expected = "messages, which the chat template of the model renders"
            yield Finding("ML580", line.error or "the prompt has no messages", line.place, expected)
            return
        [row] = line.rows
        users = sum(message["role"] == "user" for message in row.messages)
        if line.few_shot and users == 1:
            found = f"{counted(line.few_shot, 'example')} in the turn of the question"
            yield Finding("ML581", found, line.place, "a user turn and an answer for each", row=row.to_jsonl())
        answer = text_of(row.messages[-1]["content"])
        if answer[:1].isspace():
            found = f"the scored answer begins with white space: {answer[:_SHOWN]!r}"
            yield Finding("ML582", found, line.place, repr(answer.strip()[:_SHOWN]), row=row.to_jsonl())
        noted.prompts += 1
        system = _system_prompt(row)
        if self._trained and system not in self._trained:
            noted.others += 1
            noted.first = noted.first or (system, line.place)

    def file_findings(self, noted: EvaluationPrompts) -> Iterator[Finding]:
        """Yield the findings of all prompts together."""
        if noted.first is None:
            return
        system, place = noted.first
        shown = "no system prompt" if system is None else f"the system prompt {system[:_SHOWN]!r}"
        found = (
            f"{noted.others:,} of {noted.prompts:,} prompts have a system prompt that no row is trained with, or none; "
        )
        found += f"the first ({place}) has {shown}"
        first = str(next(iter(self._trained)))[:_SHOWN]
        expected = (
            f"a system prompt of the rows that are trained on ({counted(self._trained_rows, 'row')}), such as {first!r}"
        )
        yield Finding("ML583", found, place, expected)


def _system_prompt(row: Row) -> str | None:
    """Return the text of the system messages of a row; None if it has none."""
    systems = [text_of(message["content"]) for message in row.messages if message["role"] == "system"]
    return "\n\n".join(systems) if systems else None
