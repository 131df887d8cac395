"""SGLang, which serves a transformers checkpoint, and shows the ids of prompts.

The support follows python/sglang/srt/entrypoints/openai/protocol.py: no build of it runs here.
"""

from __future__ import annotations

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import CHECKPOINT_GREEDY, ServedPrompt, Server, served_prompt


class Sglang(Server):
    """SGLang from version 0.5.13 on; an older one hides the ids, and shows their number."""

    name, title, strength = "sglang", "SGLang", "ids"
    was_run = False
    version_at = ("/server_info", "version")
    greedy = CHECKPOINT_GREEDY

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_prompt_token_ids=True)
        return served_prompt(answer, client, lambda chat: chat.choices[0].prompt_token_ids)


SGLANG = Sglang()
