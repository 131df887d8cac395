"""Golden transcripts of several adapters, each asked under the name of each adapter of one server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_mistral_lora.records.transcripts import Transcript
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.replay import Outcome, outcome_of
from pytest_mistral_lora.serving.server import Server

ASKED = 2
"""The number of transcripts of each adapter to ask for: those with the longest answers."""


@dataclass(frozen=True, slots=True)
class NamedAnswer:
    """The answer under one name to a prompt of a transcript.

    Attributes:
        name: The name that was asked; empty for the base without an adapter.
        owner: The name of the adapter that the transcript is of.
        transcript: The transcript.
        outcome: The answer to the ids of its prompt; None if the server cannot be asked.
    """

    name: str
    owner: str
    transcript: Transcript
    outcome: Outcome


async def ask_names(
    server: Server, client: ServerClient, transcripts: Mapping[str, Sequence[Transcript]]
) -> list[NamedAnswer]:
    """Return the answer under each name, and of the base, to transcripts of each adapter.

    A failed request is an outcome and is not raised.

    Args:
        server: The kind of server.
        client: The connection.
        transcripts: The transcripts of each adapter, by the name under which it is served.
    """
    answers = []
    for owner, of_owner in transcripts.items():
        by_length = sorted(of_owner, key=lambda transcript: len(transcript.completion_ids), reverse=True)
        for transcript in by_length[:ASKED]:
            ids, limit = transcript.prompt_ids, transcript.max_new_tokens
            for name in transcripts:
                # one at a time: a server may cache a prompt as one adapter computed it
                outcome = await outcome_of(server.complete_as(client, ids, name, limit))
                answers.append(NamedAnswer(name, owner, transcript, outcome))
            base = await outcome_of(server.base_answer(client, ids, owner, limit))
            answers.append(NamedAnswer("", owner, transcript, base))
    return answers
