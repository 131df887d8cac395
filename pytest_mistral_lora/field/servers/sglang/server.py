"""SGLang, which serves a transformers checkpoint, and shows the ids of prompts.

The support follows python/sglang/srt/entrypoints/openai/protocol.py: no build of it runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.field.servers.refused_settings import expert_faults, refused_settings, scale_faults
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import CHECKPOINT_GREEDY, ServedPrompt, Server, served_prompt

_EFFECTS = {
    "use_dora": "refuses DoRA",
    "lora_bias": "knows no bias of LoRA",
    "trainable_token_indices": "knows no tokens that are trained alone",
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
        config = folder.config
        yield from refused_settings(folder, "SGLang", _EFFECTS)
        # 0.5.23, srt/lora/lora.py: the scale is lora_alpha / r for every layer, and no name is that of fused experts
        keys, usual = ("use_rslora", "rank_pattern", "alpha_pattern"), config["lora_alpha"] / config["r"]
        yield from scale_faults(folder, scales, self.title, usual, keys)
        yield from expert_faults(folder, self.title, "does not know these names of experts, and leaves them out")

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_prompt_token_ids=True)
        return served_prompt(answer, client, lambda chat: chat.choices[0].prompt_token_ids)


SGLANG = Sglang()
