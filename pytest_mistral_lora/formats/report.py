"""The report of a conversion: changes and losses by kind, with the rows that show them first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.errors import InputError, RowError, counted
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.formats.layouts import Layout

CHANGES = {
    "roles": "roles have our names: {detail}",
    "null-keys": "keys that are null or empty are left out",
    "json-text": "fields that held JSON as text are objects and lists",
    "call-ids": "ids of tool calls have 9 letters and digits, the same in the results",
    "made-ids": "tool calls without an id have one, made from the call",
    "call-form": "tool calls are written as {{id, type, function}}",
    "function-call": "`function_call` and `functions` are tool calls and tools",
    "tool-form": "tools are written as {{type, function}}, with parameters",
    "result-text": "results of tools that were JSON are its text",
    "call-text": "calls and results in the letters of `<tool_call>` and `<tool_response>` are calls and results",
    "result-chunks": "chunks of tool results are messages of the tool",
    "results-split": "one result for several calls is a list: each call has its element",
    "thinking": "reasoning is a thinking chunk",
    "chunks": "chunks of content have our names",
    "content-key": "`text` or `value` is `content`",
    "refusals": "a refusal is the answer's content",
    "weights": "flags of training are `weight`: {detail}",
    "only-last": "`only_last`: answers before the last have weight 0",
    "tools-last": "in a row with tools of mistral-finetune, answers before the last have weight 0",
    "prompt-weights": "answers in the prompt have weight 0",
    "untrained-roles": "answers of a role that is not trained on have weight 0",
    "system": "the system prompt is the first message",
    "system-dropped": "the system prompt is left out, as declared",
    "input": "instruction and input are one message, joined as {detail}",
    "history": "rounds of `history` are messages",
    "turns": "`{detail}` are a user and an assistant message",
    "chosen": "the chosen answer is the answer",
    "chosen-copy": "a copy of the chosen conversation is left out",
    "pair": "a pair is `prompt`, `chosen` and `rejected`",
    "best-worst": "the best and the worst of `{detail}` are the chosen and the rejected answer",
    "rated": "an answer that is marked as good or bad is `prompt`, `completion` and `label`, by `{detail}`",
    "label-letters": "a label in letters is true or false: {detail}",
    "fim-keys": "texts of fill-in-the-middle have the names of Mistral's API: {detail}",
    "pictures": "pictures under `{detail}` are chunks of the messages",
    "completion-space": "one space at the start of a completion is left out",
}
"""The kinds of changes, each with its effect."""

LOSSES = {
    "rejected": "the rejected answer of a pair",
    "unwanted": "rows whose answer is marked as bad or cut",
    "media": "images, audio and video",
    "weights": "weights other than 0 and 1: all but 0 become 1",
    "part-weights": "flags of training on a part of an answer",
    "trained-prompts": "training on messages other than answers",
    "names": "names of speakers",
    "message-keys": "other keys of messages",
    "tool-keys": "other keys of tools and tool calls",
    "keys": "other keys of rows, where a row cannot have them",
    "refusals": "a refusal beside an answer",
    "system": "a second system prompt",
    "last-prompt": "messages after the last answer",
    "bad-records": "records that cannot be converted",
}
"""The kinds of losses; each is an error unless it is allowed by name."""

SHOWN = 3
MOST_FAULTS = 20


@dataclass
class Tally:
    """One kind of change or loss.

    Attributes:
        count: Number of rows that have it.
        first: Places of the first such rows.
        details: How often each detail was seen.
    """

    count: int = 0
    first: list[Place] = field(default_factory=list)
    details: Counter[str] = field(default_factory=Counter)

    def add(self, place: Place, details: Mapping[str, None]) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(place)
        # names of keys are details, and a hostile file may have any number of them
        self.details.update(detail for detail in details if detail in self.details or len(self.details) < 100)

    def text(self, template: str) -> str:
        """Return the effect, the number of rows and the places of the first, as one line."""
        most = ", ".join(detail for detail, _ in self.details.most_common(6))
        places = ", ".join(map(str, self.first)) + (", …" if self.count > len(self.first) else "")
        return printable(f"{template.format(detail=most)}: {counted(self.count, 'row')} ({places})", lines=False)


class Change(NamedTuple):
    """A change of a row, or a loss.

    Attributes:
        kind: A key of `CHANGES`, or of `LOSSES` if it is a loss.
        detail: The key or the name concerned; empty if the kind says everything.
        is_loss: Whether the row cannot keep something of its record.
        place: The place of a field that is lost; `NOWHERE` if it is not known.
    """

    kind: str
    detail: str = ""
    is_loss: bool = False
    place: Place = NOWHERE

    @property
    def words(self) -> str:
        """The effect in words."""
        return CHANGES[self.kind].format(detail=self.detail)


def changed(kind: str, detail: str = "") -> Change:
    """Return a change of a kind of `CHANGES`."""
    return Change(kind, detail)


def lost(kind: str, detail: str = "", place: Place = NOWHERE) -> Change:
    """Return a loss of a kind of `LOSSES`."""
    return Change(kind, detail, is_loss=True, place=place)


def conversion_words(counts: Counter[str], first: Place = NOWHERE) -> str:
    """Return how many rows were converted while they were read, by what was converted; empty if none was.

    Args:
        counts: Numbers of rows by `Row.converted`.
        first: The place of the first of these rows, if it is known.
    """
    words = [f"{words} ({counted(rows, 'row')})" for words, rows in counts.most_common()]
    return "; ".join([*words, *([f"first {first}"] if words and first else [])])


def conversion_parts(reports: Iterable[Report], counts: Counter[str], first: Place) -> list[str]:
    """Return what was converted to read the rows of some files, with the command that writes them; empty if nothing.

    Args:
        reports: The reports of the files that are converted as declared.
        counts: Numbers of the other rows by `Row.converted`.
        first: The place of the first of these.
    """
    reports = list(reports)
    parts = [words for report in reports if (words := report.change_words)]
    changed = next((place for report in reports if (place := report.first_changed)), first)
    if words := conversion_words(counts, first):
        parts.append(f"converted as by import: {words}")
    return [*parts, f"to write them: {import_command(changed)}"] if parts else []


@dataclass
class Report:
    """The report of a conversion.

    Attributes:
        sources: The files, each with its container and the recognised format.
        rows: Number of rows written.
        dropped: Number of records without a row, because of an allowed loss.
        bad: Number of records that cannot be converted, because of an error or a loss that is not allowed.
        refused: Number of these that have an error.
        changes: By kind.
        losses: By kind, whether allowed or not.
        own_keys: The user's own keys, which rows keep and no token shows.
        unread: Numbers of rows with columns that another trainer may train on, by these columns.
        layouts: The layout of each source.
        remarks: Sentences about settings of a declaration that do not apply to rows.
        faults: The errors by their text, each with its fields; at most 20, even for a hostile file.
    """

    sources: list[dict[str, str]] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    bad: int = 0
    refused: int = 0
    changes: dict[str, Tally] = field(default_factory=dict)
    losses: dict[str, Tally] = field(default_factory=dict)
    own_keys: Tally = field(default_factory=Tally)
    unread: Counter[tuple[str, ...]] = field(default_factory=Counter)
    layouts: list[Layout] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    faults: dict[str, Tally] = field(default_factory=dict)

    def take(self, changes: Iterable[Change], place: Place) -> None:
        """Count the changes and losses of a row: each kind once, with all of its details."""
        kinds: dict[tuple[str, bool], dict[str, None]] = {}
        for change in changes:
            details = kinds.setdefault((change.kind, change.is_loss), {})
            if change.detail:
                details[change.detail] = None
        for (kind, is_loss), details in kinds.items():
            tallies = self.losses if is_loss else self.changes
            tallies.setdefault(kind, Tally()).add(place, details)

    def refuse(self, error: RowError, *, allowed: bool) -> None:
        """Count a record that cannot be converted."""
        self.bad += not allowed
        self.dropped += allowed
        self.refused += 1
        text = str(error).removeprefix(f"{error.place}: ")
        if text in self.faults or len(self.faults) < MOST_FAULTS:
            self.faults.setdefault(text, Tally()).add(error.place, {})

    def fault_lines(self) -> list[str]:
        """Return the faults as text, the first place of each before it."""
        lines = []
        for text, tally in self.faults.items():
            others = ", ".join(str(place.row) for place in tally.first[1:]) + (", …" if tally.count > SHOWN else "")
            more = f" (and {tally.count - 1} more: {others})" if tally.count > 1 else ""
            lines.append(f"{tally.first[0]}: {text}{more}")
        left = self.refused - sum(tally.count for tally in self.faults.values())
        return lines + ([f"… and {left} more"] if left else [])

    @property
    def change_words(self) -> str:
        """Each kind of change with its number of rows and the first of them; empty if no row is changed."""
        return "; ".join(tally.text(CHANGES[kind]) for kind, tally in sorted(self.changes.items()))

    @property
    def first_changed(self) -> Place:
        """The place of a row that is changed; `NOWHERE` if none is."""
        return next((tally.first[0] for tally in self.changes.values()), NOWHERE)

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = [
            printable(f"{source['file']}: {source['container']}, {source['format']}", lines=False)
            for source in self.sources
        ]
        for kind, tally in sorted(self.changes.items()):
            lines.append(f"changed  {kind:<16} {tally.text(CHANGES[kind])}")
        for kind, tally in sorted(self.losses.items()):
            lost = LOSSES[kind] + (" ({detail})" if tally.details else "")
            lines.append(f"lost     {kind:<16} {tally.text(lost)}")
        if self.own_keys.count:
            lines.append(f"kept     {'own-keys':<16} {self.own_keys.text('keys of your own, in no token: {detail}')}")
        lines += [printable(f"remark   {remark}", lines=False) for remark in self.remarks]
        dropped = f", {self.dropped:,} left out" if self.dropped else ""
        lines += [f"left out {line}" for line in self.fault_lines()]
        return [*lines, counted(self.rows, "row") + dropped]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        kinds = {"changes": self.changes, "losses": self.losses}
        return {
            "rows": self.rows,
            "dropped": self.dropped,
            "sources": self.sources,
            **{
                name: {
                    kind: {"rows": tally.count, "first": tally.first, "details": dict(tally.details)}
                    for kind, tally in sorted(tallies.items())
                }
                for name, tallies in kinds.items()
            },
            "own_keys": dict(self.own_keys.details),
            "remarks": self.remarks,
            "left_out": self.fault_lines(),
        }


def refuse_unknown_losses(lossy: Collection[str]) -> None:
    """Refuse an unknown kind of loss.

    Raises:
        InputError: With the known kinds.
    """
    unknown = set(lossy) - LOSSES.keys()
    if unknown:
        raise InputError(f"unknown kind {min(unknown)!r}", place="--lossy", expected=f"one of {', '.join(LOSSES)}")
