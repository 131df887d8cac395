"""What a proxy or a gateway does to the messages of a chat, by the tokens that the model is fed, or their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import OracleRejection, RowError, counted

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

ASK_ITSELF = (
    "If a proxy or a gateway is in front of the server, ask the server itself, to see which of the two does it."
)


@dataclass(frozen=True, slots=True)
class FedPrompt:
    """The prompt of one chat.

    Attributes:
        row: The messages that were sent.
        expected: The number of tokens of mistral-common's prompt.
        fed: The number of tokens that the server reports.
    """

    row: Row
    expected: int
    fed: int


@dataclass(frozen=True, slots=True)
class ChangedMessages:
    """What happens to the messages.

    Attributes:
        words: What the numbers show, as a sentence; that they show nothing, too.
        fix: What to look for.
        is_told: Whether the numbers show one change, and no other that we know.
    """

    words: str
    fix: str
    is_told: bool = True


def changed_messages(prompts: Iterable[FedPrompt], oracle: Oracle) -> ChangedMessages | None:
    """Return what the numbers of tokens show; None if each is that of mistral-common.

    A change is named only if it gives the number of each prompt, those that do not differ among them.
    """
    # a row may be asked several times
    given = list({(prompt.row.to_jsonl(), prompt.fed): prompt for prompt in prompts}.values())
    if all(prompt.fed == prompt.expected for prompt in given):
        return None
    found = [
        ChangedMessages(f"{words}, which gives each of {counted(len(given), 'number')}", fix)
        for words, fix, change in _CHANGES
        if _gives_each(given, change, oracle)
    ]
    found += _added(given, oracle)
    if len(found) == 1:
        return replace(found[0], words=f"{found[0].words}.", fix=f"{found[0].fix} {ASK_ITSELF}")
    if found:
        words = f"One of these gives each number: {'; '.join(change.words for change in found)}."
        return ChangedMessages(words, f"{' Or: '.join(change.fix for change in found)} {ASK_ITSELF}", is_told=False)
    words = "What changes them cannot be told by the numbers of tokens alone."
    fix = f"Find what changes the messages of a chat on their way to the model. {ASK_ITSELF}"
    return ChangedMessages(words, fix, is_told=False)


def _last_message(row: Row) -> Row:
    return replace(row, messages=row.messages[-1:])


def _without_tools(row: Row) -> Row:
    return replace(row, tools=None)


def _without_system(row: Row) -> Row:
    return replace(row, messages=tuple(message for message in row.messages if message.get("role") != "system"))


def _stripped(row: Row) -> Row:
    def strip(message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content")
        return {**message, "content": content.strip()} if isinstance(content, str) else message

    return replace(row, messages=tuple(map(strip, row.messages)))


def changed_by_ids(prompts: Sequence[tuple[Row, tuple[int, ...]]], oracle: Oracle) -> ChangedMessages | None:
    """Return the change of the messages that gives the ids of each prompt; None if none does, or nothing is changed.

    Args:
        prompts: The messages that were sent, each with the ids that were fed.
        oracle: The tokenizer.
    """
    sent = [_ids(row, oracle) for row, _ in prompts]
    fed: list[tuple[int, ...] | None] = [ids for _, ids in prompts]
    if sent == fed:
        return None
    for words, fix, change in _CHANGES:
        if [_ids(change(row), oracle) for row, _ in prompts] == fed:
            numbers = counted(len(prompts), "prompt")
            return ChangedMessages(f"{words}, which gives the ids of each of {numbers}.", f"{fix} {ASK_ITSELF}")
    return None


_CHANGES: Sequence[tuple[str, str, Callable[[Row], Row]]] = (
    (
        "The chat has the last message alone: its history is lost",
        "Find what keeps only the last message of a chat, such as a session of its own.",
        _last_message,
    ),
    ("The chat has no tools", "Find what drops the field `tools` of a chat.", _without_tools),
    ("The chat has no system message", "Find what drops the system message of a chat.", _without_system),
    (
        "White space at the ends of the texts is stripped",
        "Find what strips the texts of a chat.",
        _stripped,
    ),
)


def _gives_each(prompts: Sequence[FedPrompt], change: Callable[[Row], Row], oracle: Oracle) -> bool:
    """Return whether a change of the messages gives the number of tokens of each prompt, and changes one."""
    numbers = [_count(change(prompt.row), oracle) for prompt in prompts]
    is_change = any(number != prompt.expected for number, prompt in zip(numbers, prompts, strict=True))
    return is_change and all(number == prompt.fed for number, prompt in zip(numbers, prompts, strict=True))


def _count(row: Row, oracle: Oracle) -> int | None:
    """Return the number of tokens of a prompt; None if mistral-common refuses it."""
    ids = _ids(row, oracle)
    return None if ids is None else len(ids)


def _ids(row: Row, oracle: Oracle) -> tuple[int, ...] | None:
    """Return the ids of a prompt; None if mistral-common refuses it."""
    answer = {"role": "assistant", "content": "x"}
    try:
        return oracle.encode_prompt(replace(row, messages=(*row.messages, answer)))
    except (OracleRejection, RowError):
        return None


def _added(prompts: Sequence[FedPrompt], oracle: Oracle) -> list[ChangedMessages]:
    """Return the change that adds as many tokens to each prompt, or to each without a system message."""
    has_system = [any(message.get("role") == "system" for message in prompt.row.messages) for prompt in prompts]
    more = {prompt.fed - prompt.expected for prompt, has in zip(prompts, has_system, strict=True) if not has}
    of_system = {prompt.fed - prompt.expected for prompt, has in zip(prompts, has_system, strict=True) if has}
    if len(more) != 1 or not of_system <= (more | {0}):
        return []
    [number] = more
    if number <= 0:
        return []
    without = " without a system message" if of_system == {0} else ""
    tokens = "one token" if number == 1 else counted(number, "token")
    words = f"Each prompt{without} has {tokens} more"
    row = _without_system(prompts[0].row)
    shortest = replace(row, messages=({"role": "system", "content": "a"}, *row.messages))
    if number < (_count(shortest, oracle) or 0) - (_count(row, oracle) or 0):
        # too few for a system message
        words += ", as of a second BOS or a space"
        return [ChangedMessages(words, "Compare the template of the chat with that of the preview.", is_told=False)]
    words += ", as of a system message that is put before it"
    return [ChangedMessages(words, "Find the system prompt that a chat gets by default.")]
