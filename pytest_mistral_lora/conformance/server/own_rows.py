"""Rows of the user's own tests: the prompts that a running server makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.rows import Row, as_row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server import ServerChecks
from pytest_mistral_lora.conformance.server_target import ServerChoice, ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError


def served_findings(url: str, rows: Sequence[Row], tokenizer: CheckpointTokenizer, model: str) -> Iterator[Finding]:
    """Yield the findings of the prompts that a server makes of some rows; hidden ids are one, too.

    Args:
        url: The kind and the address of the server, as `ServerChoice` parses them.
        rows: The rows, each with an answer at its end.
        tokenizer: The tokenizer that the prompts are held to.
        model: The name of the model; empty for the first that the server lists.

    Raises:
        InputError: If the server cannot be one, or a row has no answer.
    """
    target = _target(ServerChoice.parse(url), rows, tokenizer, model)
    results = {case: judge() for case, judge in ServerChecks(target).cases().items()}
    for result in results.values():
        yield from result.findings
    hidden = results["prompts"].not_checked
    if hidden and not results["there"].findings:
        yield Finding("ML902", f"not checked: {hidden}", target.url, "the ids of each prompt")


def served_prompt(
    choice: ServerChoice | None, row: Row | Mapping[str, Any], tokenizer: CheckpointTokenizer
) -> tuple[int, ...]:
    """Return the ids of the prompt that a server makes of a row's messages before its last answer.

    Raises:
        InputError: If no server is named, it is not there, it refuses the messages, it hides its ids, or the row has no
            answer.
        RowError: If the row cannot be used.
    """
    if choice is None:
        step = "Set mistral_servers in your ini file, or give --mistral-golden --mistral-server NAME=URL."
        raise InputError("no server is named", next_step=step)
    target = _target(choice, [as_row(row)], tokenizer)
    found = target.answers.rows[0].served
    if isinstance(found, InputError):
        raise found
    if found.refused:
        raise InputError(f"the server refuses the messages: {found.refused}", place=choice.url)
    if found.ids is None:
        raise InputError(f"{target.server.title} does not show the ids of a prompt", place=choice.url)
    return found.ids


def _target(choice: ServerChoice, rows: Sequence[Row], tokenizer: CheckpointTokenizer, model: str = "") -> ServerTarget:
    judge = Target("tokenizer", tokenizer.path)
    # already loaded: a second one, of 131,000 tokens, would cost seconds
    vars(judge)["tokenizer"] = tokenizer
    target = choice.target("server", judge, given=tuple(rows), model=model)
    if not rows or len(target.asked_rows()) < len(rows):
        found = "a row without an answer, or with settings that a chat request names otherwise" if rows else "no row"
        raise InputError(found, expected="rows that end with the answer to a prompt")
    return target
