"""Split whole conversations into a prompt and its answers: the turns of a preference pair, or of a rated answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import error_at
from pytest_mistral_lora.formats.report import Change, changed
from pytest_mistral_lora.places import Place

Messages = list[dict[str, Any]]


def pair_of(
    chosen: Messages, rejected: Messages, answer_at: int | None, place: Place
) -> tuple[dict[str, Any], list[Change]]:
    """Return the turns of a pair, and the changes.

    Args:
        chosen: The conversation with the better answer.
        rejected: The conversation with the worse answer.
        answer_at: Index of the first message of the answers; None for the first one after the last request or result
            of a tool that both conversations begin with.
        place: The place of the record.

    Raises:
        RowError: If the prompts of the conversations differ.
    """
    plain_chosen, plain_rejected = _without_weights(chosen), _without_weights(rejected)
    common = 0
    while common < min(len(chosen), len(rejected)) and plain_chosen[common] == plain_rejected[common]:
        common += 1
    if answer_at is None:
        answer_at = after_prompt(chosen[:common])
    answers = {"chosen": chosen[answer_at:], "rejected": rejected[answer_at:]}
    differ = any(message["role"] not in ("assistant", "tool") for answer in answers.values() for message in answer)
    if not answer_at or answer_at > common or differ:
        expected = "one prompt, which both conversations begin with"
        raise error_at(place / "rejected", "has another prompt than the chosen answer", expected)
    prompt, changes = _unscored(chosen[:answer_at])
    return {"prompt": prompt, **{key: _scored(answer) for key, answer in answers.items()}}, changes


def rated_of(
    messages: Messages, answer_at: int | None, is_good: bool, place: Place
) -> tuple[dict[str, Any], list[Change]]:
    """Return the turns of a rated answer, and the changes.

    Args:
        messages: The conversation.
        answer_at: Index of the first message of the answer; None for the first one after the last request.
        is_good: Whether the answer is wanted.
        place: The place of the record.

    Raises:
        RowError: If nothing follows the last request.
    """
    answer_at = after_prompt(messages) if answer_at is None else answer_at
    if not messages[answer_at:]:
        raise error_at(place / "messages", "no answer to rate", "an answer after the last request")
    prompt, changes = _unscored(messages[:answer_at])
    return {"prompt": prompt, "completion": _scored(messages[answer_at:]), "label": is_good}, changes


def after_prompt(messages: Sequence[dict[str, Any]]) -> int:
    """Return the index behind the last message of the user or of a tool; 0 without one."""
    return max((index for index, message in enumerate(messages, 1) if message["role"] in ("user", "tool")), default=0)


def _without_weights(messages: Messages) -> Messages:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _unscored(prompt: Messages) -> tuple[Messages, list[Change]]:
    """Return a prompt without weights, and the change: its answers are not scored, whatever a flag says."""
    trained = any(message.get("weight") for message in prompt)
    return _without_weights(prompt), [changed("prompt-weights")] if trained else []


def _scored(answer: Messages) -> Messages:
    """Return an answer without weights of 1; an answer that is not scored is refused with the row."""
    return [{key: value for key, value in message.items() if key != "weight" or value == 0} for message in answer]
