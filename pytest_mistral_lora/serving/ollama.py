"""Ollama: it hides the ids of a prompt, and its own chat endpoint reports their number.

Written from its source, api/types.go and server/routes.go, and never run here: no registry has a build of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving.answers import ServedAnswer, chat_answer, read_field, refusal
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, ServerFacts, chat_request, refused_prompt

_DEFAULT_TAG = ":latest"


class Ollama(Server):
    """Ollama: the number of prompt tokens is all that it shows."""

    name, title, strength = "ollama", "Ollama", "count"
    remark = "written from its source, never run here"

    # options of its own endpoint: the one with OpenAI's API has no place for most of them
    greedy: ClassVar[Mapping[str, Any]] = {**Server.greedy, "top_k": 1, "min_p": 0, "repeat_penalty": 1}

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
        answer = await client.post("/api/chat", _request(row, model, {**self.greedy, "num_predict": 1}))
        if not answer.is_ok:
            return refused_prompt(answer, client)
        count = read_field(answer.data, "prompt_eval_count")
        return ServedPrompt(count=count if type(count) is int else None)

    async def answer(
        self, client: ServerClient, row: Row, model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer:
        """Return the answer to a row's messages."""
        answer = await client.post("/api/chat", _request(row, model, {**settings, "num_predict": limit}))
        place = f"{client.url}/api/chat"
        if not answer.is_ok:
            return ServedAnswer(refused=refusal(answer, place))
        message = read_field(answer.data, "message")
        calls = [_with_text(one) for one in read_field(message, "tool_calls") or []]
        choice = {"message": {"content": read_field(message, "content"), "tool_calls": calls}}
        reason = read_field(answer.data, "done_reason")
        same = {"choices": [{**choice, "finish_reason": reason}]}
        return chat_answer(replace(answer, data=same), place)


def _request(row: Row, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    request = chat_request(row)
    messages = [native for one in request.pop("messages") for native in _native(one)]
    return {"model": model, "messages": messages, **request, "stream": False, "options": dict(options)}


def _with_text(call: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, whose arguments are text."""
    name, arguments = (read_field(call, "function", key) for key in ("name", "arguments"))
    return {"function": {"name": name, "arguments": json.dumps(arguments)}}


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
