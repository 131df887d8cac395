"""vLLM: a chat request returns the ids that were fed, and completions take ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.answers import ServedAnswer, integers, read_field, vllm_completion
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, ServerFacts, prompt_count, refused_prompt


class Vllm(Server):
    """vLLM: a chat request returns the ids that were fed."""

    name, title, strength = "vllm", "vLLM", "ids"
    remark = "run with version 0.32.0, on a CPU"
    # a server that was started without a parser refuses requests that may call
    reads_calls = False
    greedy: ClassVar[Mapping[str, Any]] = {
        **Server.greedy,
        # generation_config.json of the model may set each of them, and a penalty works at temperature 0, too
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "min_tokens": 0,
    }

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the version and the models of a server; an adapter has a parent."""
        facts = await super().facts(client)
        return replace(facts, adapters=tuple([one for one, parent in await _parents(client) if parent]))

    async def version(self, client: ServerClient) -> str:
        """Return the version of the server."""
        return str(read_field((await client.get("/version")).data, "version") or "")

    async def answer(
        self, client: ServerClient, row: Row, model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer:
        """Return the answer to a row's messages, with its ids; calls are left in the text."""
        shown = {"return_token_ids": True, **({"tool_choice": "none"} if row.tools else {})}
        return await super().answer(client, row, model, limit, {**settings, **shown})

    async def complete(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a prompt that is given as ids."""
        asked = {"model": model, "prompt": list(ids), "max_tokens": limit, "logprobs": 1, "return_token_ids": True}
        answer = await client.post("/v1/completions", {**asked, **settings})
        return vllm_completion(answer, f"{client.url}/v1/completions")

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the answer of an adapter's parent; None of a model that has none."""
        parent = dict(await _parents(client)).get(model)
        return await self.complete(client, ids, parent, limit, self.greedy) if parent else None

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_token_ids=True)
        if not answer.is_ok:
            return refused_prompt(answer, client)
        found = read_field(answer.data, "prompt_token_ids")
        place = f"{client.url}/v1/chat/completions"
        return ServedPrompt(None if found is None else integers(found, place), prompt_count(answer))


async def _parents(client: ServerClient) -> list[tuple[str, str]]:
    """Return the name of each model that vLLM serves, and that of its base; empty of a base itself."""
    entries = read_field((await client.get("/v1/models")).data, "data")
    entries = entries if isinstance(entries, list) else []
    return [(str(read_field(one, "id")), str(read_field(one, "parent") or "")) for one in entries]
