"""Ollama: it hides the ids of a prompt, and its own chat endpoint reports their number.

Written from its source, api/types.go and server/routes.go, and never run here: no registry has a build of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving.answers import read_field
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, ServerFacts, chat_request, refused_prompt

_DEFAULT_TAG = ":latest"


class Ollama(Server):
    """Ollama: the number of prompt tokens is all that it shows."""

    name, title, strength = "ollama", "Ollama", "count"
    remark = "written from its source, never run here"

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the version and the models of a server.

        Raises:
            InputError: If it is not Ollama.
        """
        answer = await client.get("/api/tags")
        entries = read_field(answer.data, "models")
        if not answer.is_ok or not isinstance(entries, list):
            found = f"HTTP {answer.status}: {answer.error}"
            raise InputError(found, place=f"{client.url}/api/tags", expected="the models that Ollama has")
        names = [str(read_field(one, "name")) for one in entries]
        # a name without a tag is that of the tag `latest`
        short = [one.removesuffix(_DEFAULT_TAG) for one in names if one.endswith(_DEFAULT_TAG)]
        version = str(read_field((await client.get("/api/version")).data, "version") or "")
        return ServerFacts(version, (*short, *names))

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the number of prompt tokens of a chat request."""
        request = chat_request(row)
        messages = [native for one in request.pop("messages") for native in _native(one)]
        options = {"num_predict": 1, "temperature": 0, "top_k": 1, "repeat_penalty": 1}
        data = {"model": model, "messages": messages, **request, "stream": False, "options": options}
        answer = await client.post("/api/chat", data)
        if not answer.is_ok:
            return refused_prompt(answer, client)
        count = read_field(answer.data, "prompt_eval_count")
        return ServedPrompt(count=count if type(count) is int else None)


def _native(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message in the form of Ollama's own API: arguments as an object, a message for each part of a text."""
    found, content = dict(message), message.get("content") or ""
    if message.get("tool_calls"):
        found["tool_calls"] = [{**call, "function": _with_object(call["function"])} for call in message["tool_calls"]]
    # its endpoint with OpenAI's API makes the same of parts (openai/openai.go)
    texts = [read_field(part, "text") for part in content] if isinstance(content, list) else [content]
    for text in texts:
        yield {**found, "content": str(text or "")}


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    with suppress(TypeError, ValueError):
        arguments = json.loads(str(arguments))
    return {**function, "arguments": arguments}
