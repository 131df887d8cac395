"""SGLang: each choice of a chat request can have the ids that were fed.

Written from its source, python/sglang/srt/entrypoints/openai/protocol.py, and never run here: its wheel needs CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.answers import first_choice, integers, read_field
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, prompt_count, refused_prompt


class Sglang(Server):
    """SGLang from version 0.5.13 on; an older one hides the ids, and shows their number."""

    name, title, strength = "sglang", "SGLang", "ids"
    remark = "written from its source, never run here"
    greedy: ClassVar[Mapping[str, Any]] = {
        **Server.greedy,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "min_tokens": 0,
    }

    async def version(self, client: ServerClient) -> str:
        """Return the version of the server."""
        # the rest of this answer are its arguments, which may have a key in them
        return str(read_field((await client.get("/server_info")).data, "version") or "")

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_prompt_token_ids=True)
        if not answer.is_ok:
            return refused_prompt(answer, client)
        place = f"{client.url}/v1/chat/completions"
        found = first_choice(answer, place).get("prompt_token_ids")
        return ServedPrompt(None if found is None else integers(found, place), prompt_count(answer))
