"""The row formats, and the format of a record by its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import RecordKind, imported
from pytest_mistral_lora.formats.alpaca import ALPACA
from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS, message_keys
from pytest_mistral_lora.formats.kept import kept_format
from pytest_mistral_lora.formats.messages import MESSAGES
from pytest_mistral_lora.formats.preference import PREFERENCE
from pytest_mistral_lora.formats.prompt_completion import PROMPT_COMPLETION
from pytest_mistral_lora.formats.row_format import Recognised, RowFormat
from pytest_mistral_lora.formats.sharegpt import SHAREGPT

_OF_TURNS: Mapping[str, RowFormat] = {
    row_format.name: row_format for row_format in (MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION, PREFERENCE)
}
"""The formats of turns, by name. A new one is a module beside these, and an entry here."""

# sorted() is stable: equals keep the order of the table
_IN_ORDER = sorted(_OF_TURNS.values(), key=lambda row_format: not row_format.is_tried_first)


@cache
def _format_of(kind: RecordKind) -> RowFormat:
    """Return the format of the records of a kind without turns: its own one, or one that keeps them as they are."""
    own: RowFormat = imported(kind.row_format) if kind.row_format else kept_format(kind)
    return own


class _Formats(Mapping[str, RowFormat]):
    """The formats of turns, and those of each kind of record without turns, which may be registered at any time."""

    def __getitem__(self, name: str) -> RowFormat:
        found = {**_OF_TURNS, **self.of_kinds()}
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**_OF_TURNS, **self.of_kinds()})

    def __len__(self) -> int:
        return len(_OF_TURNS) + len(self.of_kinds())

    def of_kinds(self) -> dict[str, RowFormat]:
        """Return the formats of kinds without turns, by name."""
        found = (_format_of(kind) for kind in KINDS.values() if not kind.is_chat)
        return {row_format.name: row_format for row_format in found}


FORMATS = _Formats()
"""The formats that are converted to rows, by name."""

IDS = ("input_ids", "chosen_ids", "chosen_input_ids", "completion_ids", "completion_input_ids")
"""The columns of a trainer's ids, by which encoded rows are recognised: of rows, of pairs, and of answers alone."""

_NO_TURNS = {
    "query tools answers": (
        "calls beside their question, as in xLAM (query, tools, answers)",
        "Write `query` as a message of the user, and `answers` as the `tool_calls` of the one behind it; put each of "
        "`tools` into a JSON schema: its `parameters` are properties.",
    ),
    "context question answers": (
        "answers that are parts of a text, as in SQuAD (context, question, answers)",
        "Write `context` and `question` as a message of the user, and one of `answers.text` as the answer.",
    ),
    "paragraphs": (
        "an article with its questions, as in SQuAD's own files (paragraphs)",
        "Write a row for each of `qas`: its `context` and `question` as a message of the user, and one of its answers.",
    ),
    "input_ids": ("encoded rows (input_ids)", "Judge them: mistral-lora check FILE --tokenizer PATH"),
    "segments": (
        "a text in segments that are trained on or not (segments)",
        "Segments have no turns: write messages with roles.",
    ),
    "role": ("a message alone (role)", "Put all messages of a conversation in a list under `messages`."),
    "text": ("plain text (text)", "A text has no turns: write messages with roles, and no markers of a template."),
    "message_tree_id": (
        "a tree of messages, as in OASST (message_tree_id)",
        "Write each path from the first question to an answer as a conversation of its own, under `messages`.",
    ),
    **{
        key: (
            f"several answers to one prompt ({key})",
            "Choose one of them, and write it beside its prompt, under `completion`; or two, under `chosen` and "
            "`rejected`.",
        )
        for key in ("responses", "completions", "answers", "candidates")
    },
    "instruction": ("an instruction alone (instruction)", "Put its answer beside it, under `output`."),
    "chosen": ("a chosen answer alone (chosen)", "Put `prompt` and `rejected` beside it, or name it `completion`."),
    "prompt": ("a prompt alone (prompt)", "Put its answer beside it, under `completion`."),
    "question": ("a question alone (question)", "Put its answer beside it, under `answer`."),
}
"""Formats without turns, by the keys that show each, with its title and the next step."""


_PAIRS_ADVICE = "Write each pair as two messages, of the user and of the assistant, under `messages`."


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.keys() >= {"input", "output"}


def recognise(record: Any) -> Recognised | None:
    """Return the format of a record by its structure, or None if its format is unknown."""
    if isinstance(record, Sequence) and not isinstance(record, str):
        keys = message_keys(record)
        return _recognised(MESSAGES, f"a list of messages with {keys}", {"messages": ""}) if keys else None
    if not isinstance(record, Mapping):
        return None
    # a table of many sources pads the keys of other sources with null; if no format matches, the null is the fault
    present = {key for key, value in record.items() if value is not None}
    for row_format in FORMATS.of_kinds().values():
        evidence = row_format.recognise(record, present)
        if evidence is not None:
            return _recognised(row_format, evidence.words, evidence.keys)
        if unread := row_format.unread(record, present):
            title, advice = unread
            return Recognised("", title, title, {}, advice)
    for named in (present, record.keys()):
        for row_format in _IN_ORDER:
            evidence = row_format.recognise(record, named)
            if evidence is not None:
                return _recognised(row_format, evidence.words, evidence.keys)
    for key in (key for key in MESSAGE_LISTS if key in present):
        turns = record[key]
        if isinstance(turns, list) and turns and all(_is_pair(turn) for turn in turns):
            title = f"a conversation as pairs of input and output, as in Capybara ({key})"
            return Recognised("", title, title, {}, _PAIRS_ADVICE)
    for keys, (title, advice) in _NO_TURNS.items():
        if present.issuperset(keys.split()) and present.isdisjoint(MESSAGE_LISTS):
            return Recognised("", title, title, {}, advice)
    return None


def _recognised(row_format: RowFormat, evidence: str, keys: Mapping[str, str]) -> Recognised:
    return Recognised(row_format.name, f"{row_format.title} ({evidence})", evidence, keys)


def ids_key(record: Any) -> str:
    """Return the key of a trainer's ids or labels in a record; empty if it has none."""
    if not isinstance(record, Mapping):
        return ""
    for key in IDS:
        if record.get(key) is not None:
            return key
    labels = record.get("labels")
    # classes may be called labels, too; labels of tokens include the label of a token without loss
    return "labels" if isinstance(labels, Sequence) and not isinstance(labels, str) and -100 in labels else ""


def unread_columns(record: Any) -> tuple[str, ...]:
    """Return the keys of a row that another trainer may train on instead of its messages."""
    if not isinstance(record, Mapping):
        return ()
    if key := ids_key(record):
        return (key,)
    if record.get("messages") is None:
        # a row of another kind has no other columns to train on
        return ()
    if isinstance(record.get("prompt"), str | list) and isinstance(record.get("completion"), str | list):
        return ("prompt", "completion")
    return ("text",) if isinstance(record.get("text"), str) else ()
