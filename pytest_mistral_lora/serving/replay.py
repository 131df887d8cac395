"""Golden transcripts through a server: each prompt asked by its ids and by its messages, greedily."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from pytest_mistral_lora.errors import InputError, NoAnswerError
from pytest_mistral_lora.records.transcripts import Transcript
from pytest_mistral_lora.serving.answers import ServedAnswer
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

REPEATED = 4
"""The number of transcripts, by longest answers, to ask again, with a client's settings, and of the base alone."""

SECONDS = 600.0
"""Limit of a request in seconds: a long answer on a CPU takes minutes."""

PLAIN = {"temperature": 0}
"""The settings that most clients use for a greedy answer."""

REPLAY_SECONDS = 1800.0
"""The most time for all transcripts, in seconds: each request has a limit of its own, and can use it up."""

_T = TypeVar("_T")

Outcome = ServedAnswer | InputError | None
"""An answer, or the error of its request; None if the server was not or cannot be asked."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A golden transcript, and the answers of a server to its prompt.

    Attributes:
        transcript: The recorded answer.
        by_ids: The answer to the recorded ids.
        by_messages: The answer to the messages, with all settings explicit.
        stream: The same answer as a stream.
        prompt: The prompt that the server makes of the messages.
        again: The answer to the messages, asked a second time.
        plain: The answer to the messages with only the temperature set.
        unlimited: The answer to the same request without a limit of tokens; None if an answer with one did not end.
        base: The answer of the base without its adapter to the recorded ids.
    """

    transcript: Transcript
    by_ids: Outcome = None
    by_messages: Outcome = None
    stream: Outcome = None
    prompt: ServedPrompt | InputError | None = None
    again: Outcome = None
    plain: Outcome = None
    unlimited: Outcome = None
    base: Outcome = None


async def replay(
    server: Server,
    client: ServerClient,
    transcripts: Sequence[Transcript],
    model: str,
    done: Callable[[], object] = lambda: None,
) -> tuple[Replayed, ...]:
    """Ask a server for the answers to the prompts of transcripts, in order.

    A failed request is an outcome and is not raised; so is each that was not answered within `REPLAY_SECONDS`.

    Args:
        server: The kind of server.
        client: The connection.
        transcripts: The transcripts.
        model: The name of the model.
        done: Called after each transcript.
    """
    late = NoAnswerError(
        f"not answered within {REPLAY_SECONDS:,.0f} seconds for all transcripts",
        place=client.url,
        next_step="Ask again when the server has less to do, or replay fewer transcripts: --golden FOLDER.",
    )
    found = [Replayed(transcript, late, late, late) for transcript in transcripts]
    with suppress(TimeoutError):
        async with asyncio.timeout(REPLAY_SECONDS):
            await _replay(server, client, found, model, done)
    return tuple(found)


async def _replay(
    server: Server, client: ServerClient, found: list[Replayed], model: str, done: Callable[[], object]
) -> None:
    """Put the answers into a list, each when it has come."""
    transcripts = [replayed.transcript for replayed in found]
    by_length = sorted(transcripts, key=lambda transcript: len(transcript.completion_ids), reverse=True)
    repeated = {transcript.case for transcript in by_length[:REPEATED]}

    async def replay_one(index: int) -> None:
        transcript = transcripts[index]
        row, ids, limit, greedy = transcript.row, transcript.prompt_ids, transcript.max_new_tokens, server.greedy
        found[index] = Replayed(
            transcript,
            await outcome_of(server.complete(client, ids, model, limit, greedy)),
            await outcome_of(server.answer(client, row, model, limit, greedy)),
            await outcome_of(server.stream(client, row, model, limit, greedy)),
            await outcome_of(server.prompt(client, row, model)),
        )
        if transcript.case in repeated:
            again = await outcome_of(server.answer(client, row, model, limit, greedy))
            plain = await outcome_of(server.answer(client, row, model, limit, PLAIN))
            unlimited = None
            if _ends_as(plain, found[index].by_messages):
                # it ends by itself, and so does this one, unless the server has a limit
                unlimited = await outcome_of(server.answer(client, row, model, None, PLAIN))
            found[index] = replace(found[index], again=again, plain=plain, unlimited=unlimited)
        done()

    await asyncio.gather(*map(replay_one, range(len(transcripts))))
    # last, and one at a time: a server may cache the base's result for a prompt until the cache is reset
    for index, result in enumerate(found):
        if result.transcript.case in repeated:
            transcript = result.transcript
            base = server.base_answer(client, transcript.prompt_ids, model, transcript.max_new_tokens)
            found[index] = replace(result, base=await outcome_of(base))


def _ends_as(plain: Outcome, explicit: Outcome) -> bool:
    """Return whether an answer to the plain settings is that to the explicit ones, and the model ends it."""
    if not isinstance(plain, ServedAnswer) or not isinstance(explicit, ServedAnswer):
        return False
    return plain.finish_reason == "stop" and plain.text != "" and plain.text == explicit.text


async def ask_without_grammar(
    server: Server, client: ServerClient, transcript: Transcript, oracle: Oracle, model: str
) -> Outcome:
    """Return the answer to the messages of a transcript, free of the server's grammar; None if it cannot be freed.

    A failed request is an outcome and is not raised.
    """
    free = server.without_grammar(transcript.row, oracle)
    if free is None:
        return None
    settings = {**server.greedy, **free}
    return await outcome_of(server.answer(client, transcript.row, model, transcript.max_new_tokens, settings))


async def ask_ids_without_grammar(server: Server, client: ServerClient, transcript: Transcript, model: str) -> Outcome:
    """Return the answer to the ids of a transcript, free of a default grammar; None if the server can have none.

    A failed request is an outcome and is not raised.
    """
    if not server.no_grammar:
        return None
    settings, limit = {**server.greedy, **server.no_grammar}, transcript.max_new_tokens
    return await outcome_of(server.complete(client, transcript.prompt_ids, model, limit, settings))


async def outcome_of(request: Awaitable[_T]) -> _T | InputError:
    """Return the answer of a request, or its error."""
    try:
        return await request
    except InputError as error:
        return error
