"""Rows: one conversation each, or the texts of a record of another kind, already checked.

A row is `{"messages": [{"role": …, "content": …}, …], "tools": […], "reasoning_effort": …, "response_format": …}`; all
but the messages may be absent. Other keys of a row are the user's own; unknown keys of a *message* are refused, since a
misspelt `weight` or `tool_calls` would train on something else. The kinds of records (`chat.kinds`) make rows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_mistral_lora.chat.chunks.registry import type_of
from pytest_mistral_lora.chat.fields import IN_ORDER
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.turns import Tokenization, Turn
from pytest_mistral_lora.errors import MistralLoraError, RowError
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts


def imported(name: str) -> Any:
    """Return the object of an importable name, `package.module:ATTRIBUTE`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@cache
def _conversation() -> RecordKind:
    # the kinds stand on rows: one is named here, and not imported
    kind: RecordKind = imported("pytest_mistral_lora.chat.kinds.conversation:CONVERSATION")
    return kind


Message = Mapping[str, Any]

# `json.dumps` makes an encoder for each call
_ON_ONE_LINE = json.JSONEncoder(ensure_ascii=False)
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, already checked.

    Attributes:
        messages: The messages as plain JSON data, in order.
        tools: Function tools in the OpenAI layout, or None.
        place: The place of the row, for messages; `NOWHERE` for a row made in code.
        reasoning_effort: The model setting of that name, as in mistral-common's request (tokenizers from v15 on): how
            much the answer is thought about, such as `none` or `high`. None for the tokenizer's own default.
        response_format: As in mistral-common's request; its schema is encoded by tokenizers whose
            `model_settings_builder` has a `json_schema`. None for plain text.
        side: The row's part in its record, by the name that its kind has for it; empty if the record is the row.
        kind: The kind of the record that it is read from.
        objective: The declared objective, by which its tokens have a loss.
        converted: What was converted to read it, in words: names of roles and fields that other programs have.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    place: Place = field(default=NOWHERE, compare=False)
    reasoning_effort: str | None = None
    response_format: Mapping[str, Any] | None = None
    side: str = field(default="", compare=False)
    kind: RecordKind = field(default_factory=_conversation, compare=False, repr=False)
    objective: Objective = field(default=ANSWERS, compare=False, repr=False)
    converted: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Check a row of plain data: the inverse of `to_json`.

        Args:
            data: A row as a line of a dataset has it: `{"messages": [...], "tools": [...]}`.

        Raises:
            RowError: With the field and the value, if the data is not a row.

        Example:
            >>> from pytest_mistral_lora import Row
            >>> Row.from_dict({"messages": [{"role": "user", "content": "Hi"}, {"role": "poet", "content": "Yo"}]})
            Traceback (most recent call last):
            pytest_mistral_lora.errors.RowError: messages[1].role: 'poet'; expected one of system, user, assistant, tool
        """
        return _conversation().parse(data)[0]

    def __eq__(self, other: object) -> bool:
        """Return whether two rows are encoded alike: the order of keys matters where mistral-common keeps it."""
        return self.canonical() == other.canonical() if isinstance(other, Row) else NotImplemented

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, fit for one line of a dataset."""
        return self.kind.to_json(self)

    def prompt_json(self) -> dict[str, Any]:
        """Return what the last answer follows, as plain JSON data."""
        return self.kind.prompt_json(self)

    def to_jsonl(self) -> str:
        """Return the row as one line that can be pasted into a dataset."""
        return _ON_ONE_LINE.encode(self.to_json())

    def canonical(self) -> str:
        """Return the row as canonical JSON: keys sorted, except where mistral-common keeps their order."""
        return compact_json(sorted_keys(self.to_json()))

    def content_place(self, index: int) -> Place:
        """Return the place of the text of a message, such as `rows.jsonl:3, messages[1].content`."""
        return self.place.within(*self.kind.content_part(self, index))

    def content_field(self, index: int) -> str:
        """Return the path to the text of a message within its record, such as `messages[1].content`."""
        return NOWHERE.within(*self.kind.content_part(self, index)).field

    def assistant_groups(self) -> list[list[int]]:
        """Return the indices of the messages of each turn that the model writes."""
        return self.kind.answer_groups(self)

    def trained_weights(self) -> tuple[int, ...]:
        """Return 1 for each message whose turn has a loss under the row's objective, and 0 for each other one.

        Under `everything`, the other messages have a loss, too: `EncodedRow.under` gives it to their tokens.
        """
        weights = [int(message["role"] in self.kind.answer_roles and weight_of(message)) for message in self.messages]
        start = 0
        if self.objective.turns == "last-answer":
            start = self.assistant_groups()[-1][0]
        elif self.objective.turns == "last-round":
            start = max((at for at, message in enumerate(self.messages) if message["role"] == "user"), default=0)
        return (*[0] * start, *weights[start:])

    def unweighed(self) -> Row:
        """Return the row with the weight 1 for each answer."""
        messages = ({key: value for key, value in one.items() if key != "weight"} for one in self.messages)
        return replace(self, messages=tuple(messages))

    def with_objective(self, objective: Objective) -> Row:
        """Return the row with a declared objective.

        Raises:
            RowError: If the row is no conversation: a pair, a rated answer or a completion has its own loss.
        """
        if not objective.is_default and not self.kind.takes_objective:
            raise self.kind.without_objective(objective, self.place)
        return replace(self, objective=objective)


class RecordKind(ABC):
    """A kind of record: an object that answers what the rest of the package asks about its records and rows.

    The defaults are those of texts without turns, one answer of which is trained on.

    Attributes:
        name: Its name.
        title: Its records in sentences: "a preference pair".
        row_title: One of its rows in sentences.
        importable: The importable name of the object, `package.module:ATTRIBUTE`, by which other processes find it.
        keys: The keys of a record that decide ids, in order; its other keys are the user's own.
        order: Kinds of a lower order are asked first whether a record is theirs.
        is_chat: Whether its rows are conversations: chat templates, requests of a chat and servers take these alone.
        is_prose: Whether its texts are written for people, so that escapes, tags and markers in them are signs of a
            fault. In code they are no signs.
        is_trained: Whether its rows are trained on here; if not, `otherwise` says what trains on them.
        tasks: The field of `PreferenceTasks` with the commands of trainers that take its records; empty for a kind
            that trainers take without such a command.
        sides: The names of the two sides of its rows, the wanted one first; empty if a record is one row without a
            label.
        roles: The roles of its turns beside those of a conversation. The turn that is trained on has one of
            `chat.encoded.ANSWERS`.
        answer_roles: The roles of the messages of a row that the model writes.
        placeholder: The answer that stands for the one that a model generates.
        count: The name of the count of its rows in statistics; empty for conversations, whose turns are counted.
        text_law: The importable name of the law of its texts: a function that takes a row, its encoding and the oracle,
            and returns how the tokens differ from the row's texts. Empty if it has none.
        text_rule: The rule of that law.
        signs: The importable name of a function that yields the name of each sign of a row, and what shows it. Empty
            if it has no signs beside those of every text.
        file_faults: The importable name of the faults of files that these signs show, each a `FileFault` whose name is
            that of its sign. They are counted among the rows of the kind, by its `count`. Empty if there are none.
        id_fault: The importable name of a function that takes a row, a trainer's ids and the oracle, and returns the
            fault that only ids of this kind have, or None. Empty if there is none.
        answer_marker: The control token in front of the answer, without which ids are a bare text and not a cut row;
            empty if there is none.
        conversion: The importable name of the function that gives a record with the names of other programs those of
            the kind, `convert_as_given` of `formats.converter`. Empty if its records are read as they are.
        row_format: The importable name of the `RowFormat` that reads its records under other names. Without one,
            `import` takes them as they are. Records of turns have the formats of turns.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    row_title: ClassVar[str]
    importable: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    order: ClassVar[int] = 100
    is_chat: ClassVar[bool] = False
    is_prose: ClassVar[bool] = False
    is_trained: ClassVar[bool] = True
    tasks: ClassVar[str] = ""
    sides: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ()
    answer_roles: ClassVar[tuple[str, ...]] = ("assistant",)
    placeholder: ClassVar[Message] = {"role": "assistant", "content": ""}
    count: ClassVar[str] = ""
    text_law: ClassVar[str] = ""
    text_rule: ClassVar[str] = ""
    signs: ClassVar[str] = ""
    file_faults: ClassVar[str] = ""
    id_fault: ClassVar[str] = ""
    answer_marker: ClassVar[str] = ""
    conversion: ClassVar[str] = ""
    row_format: ClassVar[str] = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries as the importable name: a kind is one object in each process."""
        return imported, (self.importable,)

    # reading

    @abstractmethod
    def claims(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record without `messages` is of this kind, by its keys and their types."""

    @abstractmethod
    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
        """Check a record of this kind with its place, and return the rows that it stands for, at least one.

        Raises:
            RowError: With the field and the value, if the record is faulty.
        """

    def claims_prompt(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record is one of this kind without its answer, for a model to continue."""
        return False

    def answered(self, prompt: Mapping[str, Any], answer: Sequence[Message], place: Place = NOWHERE) -> Row:
        """Check a record without its answer, put the answer behind it, and return the row.

        Args:
            prompt: The record.
            answer: The messages of the answer.
            place: The place of the row.

        Raises:
            RowError: If the prompt or the answer is faulty.
        """
        raise RowError(f"{self.title} is not answered", place=place, expected="a conversation")

    # a row, and the record of rows

    @abstractmethod
    def to_json(self, row: Row) -> dict[str, Any]:
        """Return a row as plain JSON data, fit for one line of a dataset."""

    @abstractmethod
    def prompt_json(self, row: Row) -> dict[str, Any]:
        """Return what the last answer of a row follows, as plain JSON data."""

    def record(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the record that stands for rows: what `parse` reads."""
        return self.to_json(rows[0])

    @abstractmethod
    def answer_groups(self, row: Row) -> list[list[int]]:
        """Return the indices of the messages of each turn that the model writes."""

    @abstractmethod
    def content_part(self, row: Row, index: int) -> tuple[str | int, ...]:
        """Return the path from the place of a row to the text of a message."""

    def answer_words(self, turn: int | None) -> str:
        """Return an answer in words, by the number of its turn."""
        return f"the answer of turn {turn}"

    @property
    def takes_objective(self) -> bool:
        """Whether an objective can be declared for its records; the others have their own loss."""
        return self.is_chat and not self.sides

    def without_objective(self, objective: Objective, place: Place) -> RowError:
        """Return the error of a record that has its own loss, under a declared objective."""
        return RowError(
            f"{self.title} takes no objective, and {objective} is declared",
            place=place,
            expected="conversations; declare no objective for other records",
        )

    # sides

    def starts_record(self, row: Row) -> bool:
        """Return whether a row is the first of its record."""
        return True

    def counts_as_wanted(self, row: Row) -> bool:
        """Return whether the answer of a row is one that the model should give."""
        return True

    def side_part(self, row: Row) -> tuple[str, ...]:
        """Return the part of a place that leads from the record to the row; empty if the record is the row."""
        return ()

    def other_side(self, row: Row) -> str:
        """Return the side that says the opposite of a row's; empty if its rows have no sides."""
        return dict(zip(self.sides, self.sides[::-1], strict=True)).get(row.side, "")

    def wanted_part(self, row: Row) -> Row:
        """Return a row without an answer that the model should not give."""
        return row

    def answer_part(self, row: Row) -> Row:
        """Return a row without what it shares with the other rows of its record."""
        return row

    def answer_key(self, row: Row) -> str:
        """Return the key of the answer, if the record has the prompt apart from its answers; else empty."""
        return ""

    # encoding

    @abstractmethod
    def turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns of a row after BOS, as the model is trained on it.

        Raises:
            OracleRejection: If the tokenizer cannot encode the row.
        """

    @abstractmethod
    def prompt_turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns that the last answer of a row follows, as at inference.

        Raises:
            OracleRejection: If the tokenizer cannot encode them.
        """

    def answer_text(self, oracle: Tokenization, ids: Sequence[int]) -> str:
        """Return the text of a generated answer.

        Args:
            oracle: Mistral's own tokenization.
            ids: The ids behind the prompt.
        """
        return oracle.decode(list(ids))

    def claims_ids(self, ids: Sequence[int], oracle: Tokenization) -> bool:
        """Return whether ids are an encoding of this kind, by its markers; a conversation is what no kind claims."""
        return False

    def read_ids(self, ids: Sequence[int], oracle: Tokenization, labels: Sequence[int] | None, place: Place) -> Row:
        """Return the row of ids that this kind claims; the arguments are those of `read_back`.

        Raises:
            UnreadableIdsError: If no row of this kind explains the ids.
        """
        raise MistralLoraError(f"ids are not read back into {self.row_title}", place=place)

    # training

    def otherwise(self, place: Place) -> str:
        """Return the next step of someone who wants to train on records that are not trained on here."""
        return ""


def require_chat(row: Row) -> None:
    """Refuse a row that is not a conversation.

    Raises:
        RowError: If it is not.
    """
    if not row.kind.is_chat:
        raise RowError(f"{row.kind.row_title} is not a conversation", place=row.place, expected="a row of turns")


def compact_json(value: Any) -> str:
    """Return JSON on one line without spaces, its keys in the order given."""
    return _COMPACT.encode(value)


def sorted_keys(value: Any, name: str = "") -> Any:
    """Return plain JSON data of a row with its keys sorted, except those under `IN_ORDER`."""
    if name in IN_ORDER:
        return value
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key], key) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list | tuple) else value


def weight_of(message: Mapping[str, Any]) -> int:
    """Return 1 if an assistant message is trained on, else 0 (mistral-finetune's `weight`; 1 by default)."""
    weight = message.get("weight")
    return 1 if weight is None else int(weight)


def unscored(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages of a prompt, with the weight 0 on each answer: only the answer behind them is scored."""
    return [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in messages]


def text_of(content: Any) -> str:
    """Return the text of a checked `content`: a string, or text chunks joined as mistral-common joins them up to v13.

    Chunks that are no text, such as thinking, are left out; null is the empty text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    given = (type_of(chunk).native(chunk) for chunk in content)
    return "\n\n".join(chunk["text"] for chunk in given if chunk.get("text"))


def native_content(content: Any) -> Any:
    """Return a checked `content` as mistral-common and chat templates take it."""
    if isinstance(content, str | None):
        return content
    given = [type_of(chunk).native(chunk) for chunk in content]
    return content if all(new is chunk for new, chunk in zip(given, content, strict=True)) else given


def beyond_text(content: Any) -> list[Mapping[str, Any]]:
    """Return the chunks of a checked `content` that `text_of` leaves out: those not encoded as text, as thinking."""
    return [] if isinstance(content, str | None) else [chunk for chunk in content if not is_text_chunk(chunk)]


def has_more_than_text(content: Any) -> bool:
    """Return whether a checked `content` has a chunk that is not encoded as text, such as thinking."""
    return not isinstance(content, str | None) and any(not is_text_chunk(chunk) for chunk in content)


def is_text_chunk(chunk: Mapping[str, Any]) -> bool:
    """Return whether a checked chunk is encoded as text."""
    return bool(type_of(chunk).native(chunk)["type"] == "text")


def merged_chunks(contents: Iterable[Any], facts: VersionFacts) -> list[dict[str, Any]]:
    """Merge the contents of the messages of one turn into chunks, as mistral-common does.

    Neighbouring texts become one: with a blank line between messages, and the version's joint between the chunks of a
    message.

    Args:
        contents: The checked `content` of each message of the turn, in order.
        facts: The facts of the tokenizer version.
    """
    chunks: list[dict[str, Any]] = []
    for content in contents:
        join = "\n\n"
        for given in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            chunk = type_of(given).native(given)
            if chunk["type"] != "text":
                chunks.append(dict(chunk))
            elif chunk["text"]:
                before = chunks.pop()["text"] + join if chunks and chunks[-1]["type"] == "text" else ""
                chunks.append({"type": "text", "text": before + chunk["text"]})
                join = facts.joint
    return chunks


def assistant_text(contents: Iterable[Any], facts: VersionFacts) -> str:
    """Return the text of one assistant turn, thinking included, as mistral-common encodes it.

    Most versions strip spaces at the end, unless the turn has more than text.

    Args:
        contents: The checked `content` of each message of the turn, in order.
        facts: The facts of the tokenizer version.
    """
    chunks = merged_chunks(contents, facts)
    text = "".join(type_of(chunk).text(chunk) for chunk in chunks)
    return text.rstrip(" ") if facts.strips_answers and not has_more_than_text(chunks) else text
