"""What a recipe makes of plain conversations: their ids by its layout and their labels, judged as `audit` does.

A layout is rendered by the tokenizer of transformers for the checkpoint, as the trainers do: each part of a layout is
encoded by itself. The rows are packaged ones without tools and without odd characters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boards.inputs import derived_tekken

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.records.goldens import packaged_cases
from recipes_of_trainers.runs import PLAIN

_BOS, _EOS, _CONTENT = "{bos}", "{eos}", "{content}"
_IGNORED = -100
_INVENTED = "You are a helpful assistant."


@dataclass(frozen=True)
class Layout:
    """The layout of a trainer's template: parts of text with `{content}`, `{bos}` and `{eos}`.

    Attributes:
        prefix: The parts before the conversation.
        user: The parts of a question.
        assistant: The parts of an answer.
        system: The parts of the system prompt.
        between: The parts between an answer and the next question.
        is_inside: Whether the system prompt is text in front of the first question, inside its markers.
        invents: Whether a conversation without a system prompt gets one of the trainer's.
    """

    prefix: tuple[str, ...]
    user: tuple[str, ...]
    assistant: tuple[str, ...]
    system: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    is_inside: bool = False
    invents: bool = False


def judged_layout(layout: Layout, tokenizer: str) -> dict[str, tuple[str, ...]]:
    """Return the rules that each plain row breaks in a layout, by the name of the row.

    A layout without a place for a system prompt is judged on the rows without one.

    Args:
        layout: The layout.
        tokenizer: The name of a shipped tokenizer or of a derived one.
    """
    names = PLAIN if layout.system else PLAIN[:2]
    made = {name: _encoded(layout, _packaged(name).messages, tokenizer) for name in names}
    return {name: _rules(name, ids, labels, tokenizer) for name, (ids, labels) in made.items()}


def trained_on_everything(tokenizer: str) -> dict[str, tuple[str, ...]]:
    """Return the rules that each plain row breaks if its ids are mistral-common's and all of them are labels."""
    found = {}
    for name in PLAIN:
        ids = _oracle(tokenizer).encode(_packaged(name)).input_ids
        found[name] = _rules(name, ids, ids, tokenizer)
    return found


def eos_is_padding(tokenizer: str) -> dict[str, tuple[str, ...]]:
    """Return the rules that each plain row breaks if the collator of transformers makes the labels, and EOS is the pad.

    `DataCollatorForLanguageModeling` copies the ids, and masks each that is the padding's. Whether the question is
    trained on is left out: the recipes with it have texts without turns.
    """
    from transformers import DataCollatorForLanguageModeling

    fast = _fast(tokenizer)
    fast.pad_token = fast.eos_token
    collator = DataCollatorForLanguageModeling(fast, mlm=False)
    found = {}
    for name in PLAIN:
        ids = list(_oracle(tokenizer).encode(_packaged(name)).input_ids)
        batch = collator([{"input_ids": ids, "attention_mask": [1] * len(ids)}])
        rules = _rules(name, ids, batch["labels"][0].tolist(), tokenizer)
        found[name] = tuple(rule for rule in rules if rule == "ML546")
    return found


def _rules(name: str, ids: Sequence[int], labels: Sequence[int], tokenizer: str) -> tuple[str, ...]:
    """Return the rules that the ids and labels of a row break, as `audit` and the scoreboard find them."""
    findings = row_findings(_packaged(name), ids, labels, _oracle(tokenizer))
    return tuple(dict.fromkeys(finding.rule for finding in findings))


def _encoded(layout: Layout, messages: Sequence[Mapping[str, Any]], tokenizer: str) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a conversation."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_trained in _parts(layout, messages):
        part = _ids(text, tokenizer)
        ids += part
        labels += part if is_trained else [_IGNORED] * len(part)
    return ids, labels


def _parts(layout: Layout, messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    """Yield each part of a conversation with whether it is trained on."""
    system = [str(message["content"]) for message in messages if message["role"] == "system"]
    system = system or [_INVENTED] * layout.invents
    yield from ((part, False) for part in layout.prefix)
    inside = "".join(part.replace(_CONTENT, text) for text in system for part in layout.system)
    if not layout.is_inside:
        yield inside, False
    first = True
    for message in messages:
        content = str(message.get("content"))
        if message["role"] == "user":
            given = inside + content if layout.is_inside and first else content
            yield from ((part, False) for part in layout.between if not first)
            yield from ((part.replace(_CONTENT, given), False) for part in layout.user)
            first = False
        elif message["role"] == "assistant":
            yield from ((part.replace(_CONTENT, content), True) for part in layout.assistant)


def _ids(text: str, tokenizer: str) -> list[int]:
    fast = _fast(tokenizer)
    if text in (_BOS, _EOS):
        return [fast.bos_token_id if text == _BOS else fast.eos_token_id]
    return list(fast.encode(text, add_special_tokens=False)) if text else []


@functools.cache
def _packaged(name: str) -> Row:
    return next(case.row for case in packaged_cases() if case.name == name)


@functools.cache
def _file(tokenizer: str) -> Any:
    return shipped_tokenizer(tokenizer) if tokenizer in SHIPPED else derived_tekken().derived_tokenizer(tokenizer)


@functools.cache
def _oracle(tokenizer: str) -> Oracle:
    return Oracle(_file(tokenizer))


@functools.cache
def _fast(tokenizer: str) -> Any:
    return CheckpointTokenizer(_file(tokenizer)).fast
