"""Golden transcripts through a server: each prompt asked by its ids and by its messages, greedily."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import Transcript
from pytest_mistral_lora.serving.answers import ServedAnswer
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server

REPEATED = 4
"""Transcripts, those with the longest answers, that are asked again, as a client asks, and of the base alone."""

SECONDS = 600.0
"""Limit of a request: a long answer on a CPU takes minutes."""

PLAIN = {"temperature": 0}
"""The settings by which most clients ask for a greedy answer."""

_T = TypeVar("_T")

Outcome = ServedAnswer | InputError | None
"""An answer, or the error of its request; None if the server was not asked, or cannot be."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A golden transcript, and the answers of a server to its prompt.

    Attributes:
        transcript: The recorded answer.
        by_ids: The answer to the recorded ids.
        by_messages: The answer to the messages, with all settings spelled out.
        prompt: The prompt that the server makes of the messages.
        again: The same, asked a second time.
        plain: The answer to the messages with the temperature alone.
        base: The answer of the base without its adapter to the recorded ids.
    """

    transcript: Transcript
    by_ids: Outcome = None
    by_messages: Outcome = None
    prompt: ServedPrompt | InputError | None = None
    again: Outcome = None
    plain: Outcome = None
    base: Outcome = None


async def replay(
    server: Server, client: ServerClient, transcripts: Sequence[Transcript], model: str
) -> tuple[Replayed, ...]:
    """Ask a server for the answers to the prompts of transcripts, in order.

    Requests that fail are outcomes: nothing is raised for them.
    """
    by_length = sorted(transcripts, key=lambda one: len(one.completion_ids), reverse=True)
    repeated = {one.case for one in by_length[:REPEATED]}

    async def asked(one: Transcript) -> Replayed:
        row, ids, limit, greedy = one.row, one.prompt_ids, one.max_new_tokens, server.greedy
        found = Replayed(
            one,
            await _outcome(server.complete(client, ids, model, limit, greedy)),
            await _outcome(server.answer(client, row, model, limit, greedy)),
            await _outcome(server.prompt(client, row, model)),
        )
        if one.case not in repeated:
            return found
        again = await _outcome(server.answer(client, row, model, limit, greedy))
        return replace(found, again=again, plain=await _outcome(server.answer(client, row, model, limit, PLAIN)))

    replayed = list(await asyncio.gather(*(asked(one) for one in transcripts)))
    # last, and one at a time: a server may keep what the base made of a prompt, until it is undone
    for index, one in enumerate(replayed):
        if one.transcript.case in repeated:
            transcript = one.transcript
            base = server.base_answer(client, transcript.prompt_ids, model, transcript.max_new_tokens)
            replayed[index] = replace(one, base=await _outcome(base))
    return tuple(replayed)


async def _outcome(asked: Awaitable[_T]) -> _T | InputError:
    try:
        return await asked
    except InputError as error:
        return error
