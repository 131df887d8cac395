"""Text Generation Inference: an endpoint renders and tokenizes a chat request as the chat does.

Written from its source, router/src/server.rs and router/src/lib.rs, and never run here: it has no build for a CPU that
installs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.answers import integers, read_field
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, chat_request, prompt_count, refused_prompt


class Tgi(Server):
    """Text Generation Inference: `/chat_tokenize` renders and tokenizes."""

    name, title, strength = "tgi", "Text Generation Inference", "preview"
    remark = "written from its source, never run here"
    # a presence_penalty of 0 becomes a repetition penalty of 2 (router/src/lib.rs), and top_p has to be below 1
    greedy: ClassVar[Mapping[str, Any]] = {"temperature": 0}

    async def version(self, client: ServerClient) -> str:
        """Return the version of the server."""
        return str(read_field((await client.get("/info")).data, "version") or "")

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids of the rendered prompt, and the number that the chat reports."""
        shown = await client.post("/chat_tokenize", {"model": model, **chat_request(row)})
        if not shown.is_ok:
            return refused_prompt(shown, client)
        tokens = read_field(shown.data, "tokenize_response")
        listed = [read_field(one, "id") for one in tokens] if isinstance(tokens, list) else tokens
        ids = integers(listed, f"{client.url}/chat_tokenize")
        answer = await self.chat(client, row, model)
        return ServedPrompt(ids, prompt_count(answer)) if answer.is_ok else refused_prompt(answer, client)
