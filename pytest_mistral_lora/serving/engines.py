"""vLLM, SGLang and Text Generation Inference: engines that serve a folder of transformers, and show the ids of prompts.

SGLang is written from python/sglang/srt/entrypoints/openai/protocol.py, Text Generation Inference from router/src: no
build of them runs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.answers import ServedAnswer, first_choice, integers, number, read_field, refusal
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, chat_request, served_prompt

_GREEDY: Mapping[str, Any] = {
    **Server.greedy,
    # generation_config.json of the model may set each of them, and a penalty works at temperature 0, too
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
}


class Vllm(Server):
    """vLLM: a chat request returns the ids that were fed."""

    name, title, strength = "vllm", "vLLM", "ids"
    version_at = ("/version", "version")
    # a server that was started without a parser refuses requests that may call
    reads_calls = False
    greedy = _GREEDY

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
        answer, place = await client.post("/v1/completions", {**asked, **settings}), f"{client.url}/v1/completions"
        if not answer.is_ok:
            return ServedAnswer(refused=refusal(answer, place))
        choice = first_choice(answer, place)
        made = integers(read_field(choice, "token_ids"), place)
        given = read_field(choice, "logprobs", "token_logprobs")
        numbers = tuple(map(number, given)) if isinstance(given, list) and len(given) == len(made) else ()
        ended = read_field(choice, "finish_reason") != "length"
        return ServedAnswer(str(read_field(choice, "text") or ""), made, numbers, ended=ended)

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the answer of an adapter's parent; None of a model that has none."""
        entries = read_field((await client.get("/v1/models")).data, "data")
        entries = entries if isinstance(entries, list) else []
        parent = next((read_field(one, "parent") for one in entries if read_field(one, "id") == model), None)
        return await self.complete(client, ids, str(parent), limit, self.greedy) if parent else None

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_token_ids=True)
        found = read_field(answer.data, "prompt_token_ids")
        shown = answer.is_ok and found is not None
        return served_prompt(answer, client, integers(found, f"{client.url}/v1/chat/completions") if shown else None)


class Sglang(Server):
    """SGLang from version 0.5.13 on; an older one hides the ids, and shows their number."""

    name, title, strength = "sglang", "SGLang", "ids"
    was_run = False
    version_at = ("/server_info", "version")
    greedy = _GREEDY

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_prompt_token_ids=True)
        place = f"{client.url}/v1/chat/completions"
        found = first_choice(answer, place).get("prompt_token_ids") if answer.is_ok else None
        return served_prompt(answer, client, None if found is None else integers(found, place))


class Tgi(Server):
    """Text Generation Inference: `/chat_tokenize` renders and tokenizes."""

    name, title, strength = "tgi", "Text Generation Inference", "preview"
    was_run = False
    version_at = ("/info", "version")
    # a presence_penalty of 0 becomes a repetition penalty of 2 (router/src/lib.rs), and top_p has to be below 1
    greedy: ClassVar[Mapping[str, Any]] = {"temperature": 0}

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids of the rendered prompt, and the number that the chat reports."""
        shown = await client.post("/chat_tokenize", {"model": model, **chat_request(row)})
        if not shown.is_ok:
            return served_prompt(shown, client)
        tokens = read_field(shown.data, "tokenize_response")
        listed = [read_field(one, "id") for one in tokens] if isinstance(tokens, list) else tokens
        ids = integers(listed, f"{client.url}/chat_tokenize")
        return served_prompt(await self.chat(client, row, model), client, ids)
