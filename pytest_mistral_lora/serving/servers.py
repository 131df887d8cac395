"""The known servers, by name, and the recognition of a server by its endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, did_you_mean
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.registry import SERVERS_GROUP, Registry
from pytest_mistral_lora.records.asking_limits import AT_ONCE
from pytest_mistral_lora.serving.answers import read_field
from pytest_mistral_lora.serving.client import BUSY_STEP, SLOW, ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, Strength

SERVERS = Registry(SERVERS_GROUP, "kind of server", Server, {Server.name: Server()})
"""The kinds of servers, by name. A server whose kind is not named is recognised among those of this package."""

RECOGNISED = "auto"
"""The name for the kind that is recognised."""

_ADDED = 1 << 16
"""Tokens that a server may add to a row: its own system prompt, and those of images."""

SECONDS = 10.0
"""Limit of each request of the recognition, in seconds."""


@dataclass(frozen=True)
class ScriptedServer(Server):
    """A server that a user's script asks, once for all rows: see `conformance.server.script`.

    Attributes:
        file: The script.
    """

    file: Path
    name: ClassVar[str] = "script"
    strength: ClassVar[Strength] = "ids"
    gives_answers: ClassVar[bool] = False
    lists_models: ClassVar[bool] = False

    @property
    def title(self) -> str:  # type: ignore[override]
        """The name of the script."""
        return self.file.name


def find_server(name: str) -> Server:
    """Return the kind of a name, or of the user's script (`*.py`).

    Raises:
        InputError: If the name is not known or not unique, or the script is missing.
        EntryPointError: If it is of another package, and does not load.
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

    async def ask(row: Row) -> ServedPrompt | InputError:
        try:
            return _bounded(await server.prompt(client, row, model), row, Place.of(client.url))
        except InputError as error:
            return error
        finally:
            done()

    return list(await asyncio.gather(*(ask(row) for row in rows)))


def _bounded(prompt: ServedPrompt, row: Row, place: Place) -> ServedPrompt:
    """Return a prompt, unless it is too long for its row.

    Raises:
        InputError: If it has more tokens than the row has bytes, plus the most that a template or an image adds.
    """
    most = _ADDED + len(row.to_jsonl().encode())
    length = max(len(prompt.ids or ()), len(prompt.text or ""))
    if length > most:
        found = f"a prompt of {length:,} tokens or characters for a row of {most - _ADDED:,} bytes"
        raise InputError(found, place=place, expected=f"at most {most:,}")
    return prompt


async def recognise_server(url: str, at_once: int = AT_ONCE) -> tuple[Server, str]:
    """Return the kind of the server at an address, and the endpoint that shows it.

    Each kind has its version at another endpoint, or in another field. A server without any of them that lists its
    models as OpenAI does is of OpenAI's kind.

    Args:
        url: The address.
        at_once: The most open requests.

    Raises:
        InputError: If no server answers, or its kind is not known.
    """
    kinds = [kind for kind in SERVERS.of_this_package() if kind.version_at[0]]
    async with ServerClient(url, SECONDS, at_once) as client:
        # a server that answers one endpoint late, or forbids it, may be of another kind
        answers = await asyncio.gather(*(client.get(kind.version_at[0]) for kind in kinds), return_exceptions=True)
        for kind, answer in zip(kinds, answers, strict=True):
            if not isinstance(answer, BaseException):
                version = read_field(answer.data, kind.version_at[1])
                if answer.is_ok and isinstance(version, str) and version:
                    return kind, kind.version_at[0]
            elif not isinstance(answer, InputError):
                raise answer
        for kind, answer in zip(kinds, answers, strict=True):
            # one may list its model while it loads or is busy, and would look like one of OpenAI's kind
            if not isinstance(answer, BaseException):
                answer.require_ready(Place.of(f"{url}{kind.version_at[0]}"))
            elif isinstance(answer, InputError) and answer.next_step == BUSY_STEP:
                raise answer
        try:
            await SERVERS["openai"].facts(client)
        except InputError as error:
            if error.next_step and error.next_step != SLOW:  # no server answers, or it refuses the key
                raise
            expected = error.expected or f"a server of a kind that is recognised: {', '.join(SERVERS)}"
            step = "Name its kind, NAME=URL, or give a script of your own: see docs/serving.md."
            raise InputError(error.found, place=error.place, expected=expected, next_step=step) from error
    return SERVERS["openai"], "/v1/models"


async def require_kind(server: Server, url: str, at_once: int = AT_ONCE) -> None:
    """Refuse a server whose recognised kind differs from its named kind, if that has a version.

    Args:
        server: The named kind.
        url: The address.
        at_once: The most open requests.

    Raises:
        InputError: If the kinds differ.
    """
    found, endpoint = server, ""
    # it answers like its named kind, or its kind is not recognised and nothing is known
    with suppress(InputError):
        found, endpoint = await recognise_server(url, at_once)
    if server.version_at[0] and found.version_at[0] and found.name != server.name:
        raise InputError(
            f"it is {found.title}, recognised by {endpoint}, and was named as {server.title}",
            place=url,
            expected=f"{found.name}={url}",
            next_step="Name its own kind, or leave the name out.",
        )
