"""llama.cpp: its endpoints that render, tokenize, complete ids and list adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.answers import LISTED, ServedAnswer, integers, llamacpp_completion, read_field
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import (
    ServedPrompt,
    Server,
    ServerFacts,
    chat_request,
    prompt_count,
    refused_prompt,
)


class LlamaCpp(Server):
    """llama.cpp: two endpoints render and tokenize as the chat does; the chat itself shows the number of tokens."""

    name, title, strength = "llamacpp", "llama.cpp", "preview"
    remark = "run with build 11549"
    greedy: ClassVar[Mapping[str, Any]] = {
        **Server.greedy,
        # the one sampler: penalties, DRY, XTC, top-k, min-p and those to come are left out
        "samplers": ["temperature"],
        "top_k": 0,
        "min_p": 0,
        "typical_p": 1,
        "top_n_sigma": -1,
        "repeat_penalty": 1,
        "dry_multiplier": 0,
        "xtc_probability": 0,
        "mirostat": 0,
        "dynatemp_range": 0,
        "logit_bias": [],
        "ignore_eos": False,
        # its cache does not know under which adapter a prompt was computed (ggml-org/llama.cpp#26207)
        "cache_prompt": False,
    }

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the build, the models, the precision and the adapters of a server."""
        facts, props = await super().facts(client), (await client.get("/props")).data
        precision = _precision(str(read_field(props, "model_ftype") or ""))
        scales = tuple((str(one.get("path")), float(one.get("scale") or 0)) for one in await _adapters(client))
        return replace(facts, version=str(read_field(props, "build_info") or ""), precision=precision, scales=scales)

    async def complete(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a prompt that is given as ids."""
        data = {"prompt": list(ids), "n_predict": limit, "n_probs": LISTED, "return_tokens": True, **settings}
        return llamacpp_completion(await client.post("/completion", data), f"{client.url}/completion")

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the answer with the scale 0 for each adapter; None if none is loaded."""
        loaded = await _adapters(client)
        if not loaded:
            return None
        off = {"lora": [{"id": one.get("id"), "scale": 0} for one in loaded]}
        answer = await self.complete(client, ids, model, limit, {**self.greedy, **off})
        # computed again: the cache would give what the base made of the prompt to the next who sends it
        await client.post("/completion", {"prompt": list(ids), "n_predict": 0, "cache_prompt": False})
        return answer

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids of the rendered prompt, and the number that the chat reports."""
        rendered = await client.post("/apply-template", chat_request(row))
        text = read_field(rendered.data, "prompt")
        if not rendered.is_ok or not isinstance(text, str):
            return refused_prompt(rendered, client)
        # the rendering leaves the first token out, and the chat puts it there
        data = {"content": text, "add_special": True, "parse_special": True}
        tokenized = await client.post("/tokenize", data)
        if not tokenized.is_ok:
            return refused_prompt(tokenized, client)
        ids = integers(read_field(tokenized.data, "tokens"), f"{client.url}/tokenize")
        answer = await self.chat(client, row, model)
        return ServedPrompt(ids, prompt_count(answer)) if answer.is_ok else refused_prompt(answer, client)


async def _adapters(client: ServerClient) -> list[Mapping[str, Any]]:
    """Return the entry of each adapter that is loaded: its id, path and scale."""
    found = (await client.get("/lora-adapters")).data
    entries = found if isinstance(found, list) else []
    return [one for one in entries if isinstance(one, Mapping) and isinstance(one.get("scale"), int | float)]


def _precision(named: str) -> str:
    """Return the precision that a file type of llama.cpp names, such as `all F32` or `Q4_K - Medium`."""
    kinds = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "Q8_0": "q8_0", "Q6": "q5", "Q5": "q5", "Q4": "q4"}
    return next((found for kind, found in kinds.items() if re.search(rf"\b{kind}(_|\b)", named)), named)
