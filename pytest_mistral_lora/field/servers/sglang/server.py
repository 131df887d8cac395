"""SGLang, which serves a transformers checkpoint, and shows the ids of prompts.

The support follows python/sglang/srt/entrypoints/openai/protocol.py: no build of it runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.field.servers.refused_settings import refused_settings
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import CHECKPOINT_GREEDY, ServedPrompt, Server, served_prompt

_EFFECTS = {
    "use_dora": "refuses DoRA",
    "lora_bias": "knows no bias of LoRA",
    "trainable_token_indices": "knows no tokens that are trained alone",
    "target_parameters": "reads the parameters of experts in another layout",
    "layer_replication": "replicates no layers: it leaves out the tensors of those that are not there",
}


class Sglang(Server):
    """SGLang from version 0.5.13 on; an older one hides the ids, and shows their number."""

    name, title, strength = "sglang", "SGLang", "ids"
    was_run = False
    version_at = ("/server_info", "version")
    greedy = CHECKPOINT_GREEDY

    def adapter_faults(self, folder: AdapterFolder, scales: Mapping[str, float]) -> Iterator[ProgramFault]:
        """Yield ML426."""
        yield from refused_settings(folder, "SGLang", _EFFECTS)

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_prompt_token_ids=True)
        return served_prompt(answer, client, lambda chat: chat.choices[0].prompt_token_ids)


SGLANG = Sglang()
