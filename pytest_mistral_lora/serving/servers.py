"""The servers that can be asked which prompt they feed their model, each by its own endpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving.client import Answer, ServerClient

Strength = Literal["ids", "preview", "count"]
"""How much an answer proves: the ids that were fed, those of an endpoint that renders, or their number alone."""

_REFUSED = (400, 422, 500)
"""llama.cpp answers 500 if a template raises."""


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """What a server makes of the messages of a row.

    Attributes:
        ids: The ids of the prompt; None if the server hides them.
        count: The number of prompt tokens that a chat request reports; None if it reports none.
        refused: The server's reason if it refuses the messages; else empty.
    """

    ids: tuple[int, ...] | None = None
    count: int | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        version: Its version or build; empty if it does not say.
        models: The names under which it serves models and adapters.
    """

    version: str
    models: tuple[str, ...]


def chat_request(row: Row) -> dict[str, Any]:
    """Return the messages of a row before its last answer, and its tools, in the form of OpenAI's chat requests."""
    start = row.assistant_groups()[-1][0]
    messages = [{key: value for key, value in one.items() if key != "weight"} for one in row.messages[:start]]
    tools = {"tools": [{"type": "function", "function": tool["function"]} for tool in row.tools]} if row.tools else {}
    return {"messages": messages, **tools}


def integers(value: Any, place: str) -> tuple[int, ...]:
    """Return ids that a server lists.

    Raises:
        InputError: If they are no whole numbers.
    """
    if not isinstance(value, list) or any(type(one) is not int for one in value):
        shown = repr(value)
        raise InputError(f"the ids of the prompt are {shown[:80]}", place=place, expected="a list of whole numbers")
    return tuple(value)


class Server(ABC):
    """A kind of server.

    Attributes:
        name: Its name on the command line.
        title: Its name in texts.
        strength: What its answers prove.
        remark: How it was tried.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    strength: ClassVar[Strength]
    remark: ClassVar[str] = ""

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the version and the models of a server.

        Raises:
            InputError: If it is not one of this kind.
        """
        answer = await client.get("/v1/models")
        entries = answer.data.get("data") if answer.is_ok and isinstance(answer.data, Mapping) else None
        if not isinstance(entries, list) or not all(isinstance(one, Mapping) for one in entries):
            found = f"HTTP {answer.status}: {answer.error}"
            raise InputError(found, place=f"{client.url}/v1/models", expected="the models that it serves")
        return ServerFacts(await self.version(client), tuple(str(one.get("id")) for one in entries))

    async def version(self, client: ServerClient) -> str:
        """Return the version of a server; empty if it does not say."""
        return ""

    @abstractmethod
    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return what the server makes of a row's messages.

        Raises:
            InputError: If the server is not there, or its answer has another form.
        """

    async def chat(self, client: ServerClient, row: Row, model: str, **more: Any) -> Answer:
        """Ask for one token after a row's messages, greedily."""
        data = {"model": model, **chat_request(row), "max_tokens": 1, "temperature": 0, **more}
        # a model that may call is constrained in its answer, and its prompt is the same
        return await client.post("/v1/chat/completions", data)


def _refusal(answer: Answer, client: ServerClient) -> ServedPrompt:
    if answer.status in _REFUSED and answer.data is not None:
        return ServedPrompt(refused=answer.error)
    found = f"HTTP {answer.status}: {answer.error}" if answer.status != 200 else f"no JSON: {answer.text}"
    raise InputError(found, place=client.url, expected="an answer in JSON")


def _field(answer: Answer, *names: str) -> Any:
    value = answer.data
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _count(answer: Answer) -> int | None:
    count = _field(answer, "usage", "prompt_tokens")
    return count if type(count) is int else None


class OpenAi(Server):
    """Any server with OpenAI's chat endpoint: the number of prompt tokens is all that it shows."""

    name, title, strength = "openai", "a server with OpenAI's API", "count"

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the number of prompt tokens of a chat request."""
        answer = await self.chat(client, row, model)
        return ServedPrompt(count=_count(answer)) if answer.is_ok else _refusal(answer, client)


class LlamaCpp(Server):
    """llama.cpp: two endpoints render and tokenize as the chat does; the chat itself shows the number of tokens."""

    name, title, strength = "llamacpp", "llama.cpp", "preview"
    remark = "run with build 11549"

    async def version(self, client: ServerClient) -> str:
        """Return the build of the server."""
        return str(_field(await client.get("/props"), "build_info") or "")

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids of the rendered prompt, and the number that the chat reports."""
        rendered = await client.post("/apply-template", chat_request(row))
        text = _field(rendered, "prompt")
        if not rendered.is_ok or not isinstance(text, str):
            return _refusal(rendered, client)
        # the rendering leaves the first token out, and the chat puts it there
        data = {"content": text, "add_special": True, "parse_special": True}
        tokenized = await client.post("/tokenize", data)
        if not tokenized.is_ok:
            return _refusal(tokenized, client)
        ids = integers(_field(tokenized, "tokens"), f"{client.url}/tokenize")
        answer = await self.chat(client, row, model)
        return ServedPrompt(ids, _count(answer)) if answer.is_ok else _refusal(answer, client)


class Vllm(Server):
    """vLLM: a chat request returns the ids that were fed."""

    name, title, strength = "vllm", "vLLM", "ids"
    remark = "written from its documentation, never run here"

    async def version(self, client: ServerClient) -> str:
        """Return the version of the server."""
        return str(_field(await client.get("/version"), "version") or "")

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_token_ids=True)
        if not answer.is_ok:
            return _refusal(answer, client)
        found = _field(answer, "prompt_token_ids")
        place = f"{client.url}/v1/chat/completions"
        return ServedPrompt(None if found is None else integers(found, place), _count(answer))


SERVERS: Mapping[str, Server] = {one.name: one for one in (LlamaCpp(), Vllm(), OpenAi())}
"""The kinds of servers, by name."""


def find_server(name: str) -> Server:
    """Return the kind of a name.

    Raises:
        InputError: If there is none.
    """
    if name not in SERVERS:
        raise InputError(f"unknown kind of server {name!r}", expected=f"one of {', '.join(SERVERS)}")
    return SERVERS[name]


async def ask_prompts(
    server: Server, client: ServerClient, rows: Sequence[Row], model: str
) -> list[ServedPrompt | InputError]:
    """Return what a server makes of each row, in order, or the error of the request.

    All requests are sent by one client, a few at a time.
    """
    import asyncio

    async def one(row: Row) -> ServedPrompt | InputError:
        try:
            return await server.prompt(client, row, model)
        except InputError as error:
            return error

    return list(await asyncio.gather(*(one(row) for row in rows)))
