"""vLLM, which serves a transformers checkpoint, and shows the ids of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.oracle.answer_grammar import has_grammar
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.field.servers.vllm.forms import TextCompletions
from pytest_mistral_lora.serving.answers import ServedAnswer, unanswered
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.forms import ModelList, read_form
from pytest_mistral_lora.serving.server import (
    CHECKPOINT_GREEDY,
    Parsers,
    ServedPrompt,
    Server,
    SpokenAnswer,
    served_prompt,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.programs.faults import ProgramFault
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_NO_PARSER = "--enable-auto-tool-choice"
"""The option that vLLM names if it refuses tools because it has no parser of calls."""


class Vllm(Server):
    """vLLM: a chat request returns the ids that were fed."""

    name, title, strength = "vllm", "vLLM", "ids"
    words, deviations = Path(__file__).parent / "fixes.toml", Path(__file__).parent / "deviations.toml"
    version_at = ("/version", "version")
    lists_parents = True
    parsers = Parsers(
        Path(__file__).parent / "scripts" / "vllm_parsers.py",
        {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    exporter = "pytest_mistral_lora.field.servers.vllm.export:EXPORT"
    greedy = CHECKPOINT_GREEDY

    def adapter_faults(self, folder: AdapterFolder, scales: Mapping[str, float]) -> Iterator[ProgramFault]:
        """Yield ML426 and ML427."""
        from pytest_mistral_lora.field.servers.vllm.adapter_faults import adapter_faults

        yield from adapter_faults(folder, scales)

    async def answer(
        self, client: ServerClient, row: Row, model: str, limit: int | None, settings: Mapping[str, Any]
    ) -> ServedAnswer:
        """Return the answer to a row's messages, with its ids.

        The tool choice is that of most clients, `auto`: with `none`, the grammar of a Tekken tokenizer from version 11
        on forbids the calls that the model has learned. A server that was started without a parser of calls refuses
        `auto` in the mode `hf`, and leaves calls in the text in the mode `mistral`: both decode without that grammar.
        """
        shown = {**settings, "return_token_ids": True}
        answer = await super().answer(client, row, model, limit, shown)
        if row.tools and _NO_PARSER in answer.refused:
            answer = await super().answer(client, row, model, limit, {**shown, "tool_choice": "none"})
        return replace(answer, calls_read=bool(answer.calls))

    async def stream(
        self, client: ServerClient, row: Row, model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer from a stream; a server without a parser of calls leaves them in the text. See `answer`."""
        answer = await super().stream(client, row, model, limit, settings)
        return None if answer is None else replace(answer, calls_read=bool(answer.calls))

    def without_grammar(self, row: Row, oracle: Oracle) -> Mapping[str, Any] | None:
        """Return a grammar of any token, which takes the place of the one that the server makes of a request."""
        if not row.tools and not has_grammar(oracle):
            return None
        return {"structured_outputs": {"grammar": f"start: <[0-{oracle.vocab_size - 1}]>*"}}

    def shown_ids(self, *, is_stream: bool) -> Mapping[str, Any]:
        """Return the field that makes the server show the ids of an answer."""
        return {"return_token_ids": True}

    def forced_request(self, request: Mapping[str, Any], answer: SpokenAnswer) -> Mapping[str, Any] | None:
        """Return a request whose grammar allows the ids of the answer alone; None if it has a grammar of its own.

        The server shows the ids, so that an answer that was not forced is seen: one with a reasoning parser ignores
        grammars until the model has thought.
        """
        if request.get("response_format") or request.get("tool_choice", "auto") not in ("auto", "none"):
            return None
        grammar = " ".join(f"<[{token}]>" for token in answer.ids[:-1])
        return {**request, "structured_outputs": {"grammar": f"start: {grammar}"}}

    async def complete(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a prompt given as ids."""
        request = {"model": model, "prompt": list(ids), "max_tokens": limit, "logprobs": 1, "return_token_ids": True}
        answer, place = (
            await client.post("/v1/completions", {**request, **settings}),
            client.place_of("/v1/completions"),
        )
        if not answer.is_ok:
            return ServedAnswer(**unanswered(answer, place))
        choice = read_form(TextCompletions, answer, place).choices[0]
        made, given = tuple(choice.token_ids), choice.logprobs.token_logprobs if choice.logprobs else None
        numbers = tuple(math.nan if number is None else number for number in given or ())
        ended = choice.finish_reason != "length"
        return ServedAnswer(choice.text, made, numbers if len(numbers) == len(made) else (), ended=ended)

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the answer of an adapter's parent; None for a model without a parent."""
        models = read_form(ModelList, await client.get("/v1/models"), client.place_of("/v1/models")).data
        parent = next((entry.parent for entry in models if entry.id == model), None)
        return await self.complete(client, ids, parent, limit, self.greedy) if parent else None

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids that the server fed its model."""
        answer = await self.chat(client, row, model, return_token_ids=True)
        return served_prompt(answer, client, lambda chat: chat.prompt_token_ids)


VLLM = Vllm()
