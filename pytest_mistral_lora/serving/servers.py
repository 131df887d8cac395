"""The servers that can be asked, by name, and the recognition of one by its endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, did_you_mean
from pytest_mistral_lora.serving.answers import read_field
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.engines import Sglang, Vllm
from pytest_mistral_lora.serving.llamacpp import LlamaCpp, Ollama
from pytest_mistral_lora.serving.server import ServedPrompt, Server, Strength

SERVERS: Mapping[str, Server] = {one.name: one for one in (LlamaCpp(), Vllm(), Sglang(), Ollama(), Server())}
"""The kinds of servers, by name."""

RECOGNISED = "auto"
"""The name that stands for the kind that a server is recognised as."""

_ADDED = 1 << 16
"""Tokens that a server may add to a row: its own system prompt, and those of images."""

SECONDS = 10.0
"""Limit of each request by which a server is recognised."""


@dataclass(frozen=True)
class ScriptedServer(Server):
    """A server that a script of the user's own asks, once for all rows: see `conformance.server.script`.

    Attributes:
        file: The script.
    """

    file: Path
    name: ClassVar[str] = "script"
    strength: ClassVar[Strength] = "ids"
    gives_answers: ClassVar[bool] = False

    @property
    def title(self) -> str:  # type: ignore[override]
        """The name of the script."""
        return self.file.name


def find_server(name: str) -> Server:
    """Return the kind of a name, or that of a script of the user's own (`*.py`).

    Raises:
        InputError: If there is none.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InputError("no such file", place=name, expected="a script that asks your server: see docs/serving.md")
        return ScriptedServer(Path(name))
    if name not in SERVERS:
        found = f"unknown kind of server {name!r}{did_you_mean(name, SERVERS)}"
        raise InputError(found, expected=f"one of {', '.join(SERVERS)}, or the path of a script (*.py)")
    return SERVERS[name]


async def ask_prompts(
    server: Server, client: ServerClient, rows: Sequence[Row], model: str, done: Callable[[], object] = lambda: None
) -> list[ServedPrompt | InputError]:
    """Return what a server makes of each row, in order, or the error of the request.

    All requests are sent by one client, a few at a time; `done` is called after each row.
    """

    async def one(row: Row) -> ServedPrompt | InputError:
        try:
            return _bounded(await server.prompt(client, row, model), row, client.url)
        except InputError as error:
            return error
        finally:
            done()

    return list(await asyncio.gather(*(one(row) for row in rows)))


def _bounded(prompt: ServedPrompt, row: Row, place: str) -> ServedPrompt:
    """Return a prompt that a row can have.

    Raises:
        InputError: If it has more tokens than the bytes of the row, and the most that a template or an image adds.
    """
    most = _ADDED + len(row.to_jsonl().encode())
    length = max(len(prompt.ids or ()), len(prompt.text or ""))
    if length > most:
        found = f"a prompt of {length:,} tokens or characters for a row of {most - _ADDED:,} bytes"
        raise InputError(found, place=place, expected=f"at most {most:,}")
    return prompt


async def recognise_server(url: str) -> tuple[Server, str]:
    """Return the kind of the server at an address, and the endpoint by which it is recognised.

    Each kind has its version at an endpoint of its own, or in a field of its own; a server that has none of them, and
    lists its models as OpenAI does, is one of OpenAI's kind.

    Raises:
        InputError: If no server is there, or it is of none of the kinds.
    """
    kinds = [one for one in SERVERS.values() if one.version_at[0]]
    async with ServerClient(url, SECONDS) as client:
        # a server that answers one of them late, or forbids it, may be another kind
        asked = await asyncio.gather(*(client.get(one.version_at[0]) for one in kinds), return_exceptions=True)
        for kind, answer in zip(kinds, asked, strict=True):
            if not isinstance(answer, BaseException):
                version = read_field(answer.data, kind.version_at[1])
                if answer.is_ok and isinstance(version, str) and version:
                    return kind, kind.version_at[0]
            elif not isinstance(answer, InputError):
                raise answer
        for kind, answer in zip(kinds, asked, strict=True):
            # llama.cpp lists its model while it loads it, and would be taken for a server of OpenAI's kind
            if not isinstance(answer, BaseException):
                answer.require_ready(f"{url}{kind.version_at[0]}")
        try:
            await SERVERS["openai"].facts(client)
        except InputError as error:
            if error.next_step:  # it is not there, or refuses the key
                raise
            expected = error.expected or f"a server of a kind that is recognised: {', '.join(SERVERS)}"
            step = "Name its kind, NAME=URL, or give a script of your own: see docs/serving.md."
            raise InputError(error.found, place=error.place, expected=expected, next_step=step) from error
    return SERVERS["openai"], "/v1/models"


async def require_kind(server: Server, url: str) -> None:
    """Refuse a server that was named as a kind with a version, and is recognised as another one.

    Raises:
        InputError: If it is.
    """
    found, endpoint = server, ""
    # it answers as its kind does, and of a kind that is not recognised nothing is known
    with suppress(InputError):
        found, endpoint = await recognise_server(url)
    if server.version_at[0] and found.version_at[0] and found.name != server.name:
        raise InputError(
            f"it is {found.title}, recognised by {endpoint}, and was named as {server.title}",
            place=url,
            expected=f"{found.name}={url}",
            next_step="Name its own kind, or leave the name out.",
        )
