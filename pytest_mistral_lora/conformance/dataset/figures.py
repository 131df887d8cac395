"""The figures of a dataset: rows, tokens, roles, tools and scripts, as `stats` prints them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pytest_mistral_lora.chat.chunks.registry import chunk_types, types_in
from pytest_mistral_lora.conformance.dataset.texts import main_script
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord, ObserverStates


@dataclass
class Figures:
    """The numbers of the records that are trained on or held out.

    Attributes:
        tokens: Number of rows by their tokens.
        supervised: Number of rows by their supervised tokens.
        counts: Numbers by file and name.
        named: Numbers by kind and name: of messages by role, of calls by tool, of records by script.
    """

    tokens: Counter[int] = field(default_factory=Counter)
    supervised: Counter[int] = field(default_factory=Counter)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    named: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, record: JudgedRecord) -> None:
        """Add a record."""
        tokens, supervised = 0, 0
        for side in record.trained:
            length, trained = len(side.input_ids), side.supervised_tokens
            self.tokens[length] += 1
            self.supervised[trained] += 1
            tokens, supervised = tokens + length, supervised + trained
        whole, kind = record.whole, record.rows[0].kind
        roles = [message["role"] for message in whole.messages]
        for role in roles:
            self.named["roles", role] += 1
        for message in whole.messages:
            for call in message.get("tool_calls") or ():
                self.named["tools", call["function"]["name"]] += 1
        self.named["scripts", main_script(whole)] += 1
        figures = {
            "rows": 1,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_trained_on": 0 if record.is_held_out else tokens,
            "messages": len(roles) if kind.is_chat else 0,
            "assistant_turns": sum(len(part.assistant_groups()) for part in record.parts) if kind.is_chat else 0,
            "rows_with_system_prompt": int("system" in roles),
            "rows_with_tools": int(bool(whole.tools) or any("tool_calls" in message for message in whole.messages)),
        }
        types = types_in(message.get("content") for message in whole.messages)
        of_kinds = (kind.count, *(chunk_types()[name].count for name in types))
        figures |= {name: 1 for name in of_kinds if name}
        for name, figure in figures.items():
            self.counts[record.file, name] += figure

    def extend(self, other: Figures) -> None:
        """Add other records."""
        for name in ("tokens", "supervised", "counts", "named"):
            getattr(self, name).update(getattr(other, name))


class FiguresOfRecords:
    """Counts what a dataset has; it reports nothing."""

    case = "statistics"
    fires_on_sample = False

    def start(self) -> Figures:
        """Return the state of no row."""
        return Figures()

    def observe(self, record: JudgedRecord, state: Figures) -> Iterator[Finding]:
        """Count a record."""
        state.note(record)
        return iter(())

    def report(self, state: Figures, files: JudgedFiles) -> Iterator[Finding]:
        """Yield nothing: a figure is no finding."""
        return iter(())


FIGURES = FiguresOfRecords()
"""The observer that counts."""


def figures_of(states: ObserverStates) -> Figures:
    """Return the figures of a pass."""
    found: Figures = states.of(f"{__name__}:FIGURES")
    return found
