"""Ollama, which runs llama.cpp.

The support follows its source, api/types.go and server/routes.go, and was never run: no registry has a build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.field.servers.ollama.forms import NativeChat, TagList
from pytest_mistral_lora.serving.answers import ServedAnswer, ServedCall, read_field, unanswered
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.forms import read_form
from pytest_mistral_lora.serving.server import ServedPrompt, Server, ServerFacts, chat_request, parsed, with_arguments

_DEFAULT_TAG = ":latest"


class Ollama(Server):
    """Ollama: from version 0.11.5 on it shows the rendered prompt, and the chat the number of its tokens."""

    name, title, strength = "ollama", "Ollama", "preview"
    was_run = False
    version_at = ("/api/version", "version")
    exporter = "pytest_mistral_lora.field.servers.ollama.export:EXPORT"
    model_file_checks = "pytest_mistral_lora.field.servers.ollama.modelfile_checks:model_file_cases"

    # options of its own endpoint: the one with OpenAI's API lacks most of them
    greedy: ClassVar[Mapping[str, Any]] = {**Server.greedy, "top_k": 1, "min_p": 0, "repeat_penalty": 1}

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the version and the models of a server.

        Raises:
            InputError: If it is not Ollama.
        """
        answer = await client.get("/api/tags")
        tags = read_form(TagList, answer, client.place_of("/api/tags"), expected="the models that Ollama has")
        names = [model.name for model in tags.models]
        # a name without a tag means the tag `latest`
        short = [name.removesuffix(_DEFAULT_TAG) for name in names if name.endswith(_DEFAULT_TAG)]
        return ServerFacts(await self.version(client), (*short, *names))

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the text of the rendered prompt, and the number of prompt tokens of a chat request."""
        request = _request(row, model, {**self.greedy, "num_predict": 1})
        answer, place = (
            await client.post("/api/chat", {**request, "_debug_render_only": True}),
            client.place_of("/api/chat"),
        )
        text = None
        if answer.is_ok:
            preview = read_form(NativeChat, answer, place).preview
            text = preview.rendered_template if preview is not None else None
            if text is not None:
                # an older version has answered the chat itself
                answer = await client.post("/api/chat", request)
        if not answer.is_ok:
            return ServedPrompt(**unanswered(answer, place))
        return ServedPrompt(count=read_form(NativeChat, answer, place).prompt_eval_count, text=text)

    async def answer(
        self, client: ServerClient, row: Row, model: str, limit: int | None, settings: Mapping[str, Any]
    ) -> ServedAnswer:
        """Return the answer to a row's messages."""
        limited = settings if limit is None else {**settings, "num_predict": limit}
        answer = await client.post("/api/chat", _request(row, model, limited))
        place = client.place_of("/api/chat")
        if not answer.is_ok:
            return ServedAnswer(**unanswered(answer, place))
        chat = read_form(NativeChat, answer, place)
        functions = [call.function for call in chat.message.tool_calls or ()]
        # in OpenAI's form, with arguments as text
        calls = tuple(ServedCall(function.name, json.dumps(function.arguments)) for function in functions)
        return ServedAnswer(chat.message.content or "", calls=calls, ended=chat.done_reason != "length")

    async def stream(
        self, client: ServerClient, row: Row, model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return None: its own endpoint streams in another form, and the other one lacks most of the settings."""
        return None


def _request(row: Row, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request in the form of Ollama's own API: arguments as an object, a message for each part of a text."""
    request, messages = chat_request(row), []
    for message in request.pop("messages"):
        content = message.get("content") or ""
        # its endpoint with OpenAI's API makes the same of parts (openai/openai.go)
        for text in [read_field(part, "text") for part in content] if isinstance(content, list) else [content]:
            messages.append({**with_arguments(message, parsed), "content": str(text or "")})
    return {"model": model, "messages": messages, **request, "stream": False, "options": dict(options)}


OLLAMA = Ollama()
