"""llama.cpp, whose endpoints render, tokenize, complete ids and list adapters."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.llamacpp.forms import (
    LoadedAdapter,
    LoadedAdapters,
    PromptCompletion,
    Properties,
    RenderedPrompt,
    Tokens,
)
from pytest_mistral_lora.serving.answers import LISTED, ServedAnswer, logprobs_of, unanswered
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.forms import read_form
from pytest_mistral_lora.serving.server import (
    ServedPrompt,
    Server,
    ServerFacts,
    SpokenAnswer,
    chat_request,
    served_prompt,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.programs.faults import ProgramFault
    from pytest_mistral_lora.records.gguf_file import GgufFile

_PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "Q8_0": "q8_0", "Q6": "q5", "Q5": "q5", "Q4": "q4"}
"""The key of `TOLERANCES` for a file type of llama.cpp, such as `all F32` or `Q4_K - Medium`."""

_NEUTRAL: Mapping[str, Any] = {
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "dry_multiplier": 0,
    "xtc_probability": 0,
    "typical_p": 1,
    "mirostat": 0,
    "n_predict": -1,
    "ignore_eos": False,
}
"""The settings of `/props` that change an answer at temperature 0, or end it, by the value that does not."""

_SHOWN = ("temperature", "top_k", "top_p", "min_p")
"""The settings of `/props` that a client replaces which asks for a greedy answer."""

_DRAFTS, _NO_DRAFTS = "speculative.types", "none"
"""The setting of `/props` that names the ways of drafting tokens, and its value without any."""

_THINK, _END_OF_THOUGHT = "[THINK]", "[/THINK]"

_NOT_PASSED = (404, 405)
"""The statuses of an endpoint that a gateway before the server does not have."""

_LARGEST = 1 << 40
"""What a setting that is a whole number is below."""

_CERTAIN = 100.0
"""The bias of a token that a model shall say."""


class LlamaCpp(Server):
    """llama.cpp: two endpoints render and tokenize as the chat does; the chat itself shows the number of tokens."""

    name, title, strength = "llamacpp", "llama.cpp", "preview"
    words, deviations = Path(__file__).parent / "fixes.toml", Path(__file__).parent / "deviations.toml"
    version_at = ("/props", "build_info")
    exporter = "pytest_mistral_lora.field.servers.llamacpp.export:EXPORT"
    reads_rendered_text = True
    # a stream leaves out what the request gives of the answer
    streams_forced = False
    no_grammar: ClassVar[Mapping[str, Any]] = {"grammar": ""}
    greedy: ClassVar[Mapping[str, Any]] = {
        **Server.greedy,
        # this sampler alone: penalties, DRY, XTC, top-k, min-p and future ones are left out
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

    def remark_on_merged(self, folder: Path) -> str:
        """Return the command for a folder that its converter reads, if the converter stops at a file of this one."""
        if not (folder / TEKKEN).is_file():
            return ""
        # the file stays, byte for byte, and transformers 5 loads it in place of tokenizer.json, for the converter, too
        command = shlex.join(["mistral-lora", "export", str(folder), "--to", self.name, "--output", f"{folder}-gguf"])
        return f"llama.cpp's converter stops at tekken.json. For a GGUF file, convert the folder of: {command}"

    def gguf_faults(self, file: GgufFile, oracle: Oracle) -> Iterator[ProgramFault]:
        """Yield ML915 and ML920."""
        from pytest_mistral_lora.field.servers.llamacpp.gguf_faults import gguf_faults

        yield from gguf_faults(file, oracle)

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the build, the models, the precision and the adapters of a server."""
        facts = await super().facts(client)
        shown = await client.get("/props")
        props = read_form(Properties, shown, client.place_of("/props")) if shown.is_ok else Properties()
        named = props.model_ftype or ""
        precision = next((found for kind, found in _PRECISIONS.items() if re.search(rf"\b{kind}(_|\b)", named)), named)
        loaded = await _adapters(client)
        scales = None if loaded is None else tuple((adapter.path, adapter.scale) for adapter in loaded)
        settings = props.default_generation_settings
        given = {name: _setting(settings.params.get(name)) for name in (*_SHOWN, *_NEUTRAL)}
        given = {name: value for name, value in given.items() if value is not None}
        changed = tuple(name for name, value in _NEUTRAL.items() if given.get(name, value) != value)
        shown_defaults = [(name, given[name]) for name in (*_SHOWN, *changed) if name in given]
        defaults = (*shown_defaults, *((("n_ctx", settings.n_ctx),) if settings.n_ctx else ()))
        drafts = settings.params.get(_DRAFTS, _NO_DRAFTS) != _NO_DRAFTS
        return replace(facts, precision=precision, scales=scales, defaults=defaults, changed=changed, drafts=drafts)

    async def version(self, client: ServerClient) -> str:
        """Return the build of the server; empty if it was built outside of Git, and has no number."""
        build = await super().version(client)
        return "" if build.startswith("b0-") else build

    async def complete(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a prompt given as ids."""
        data = {"prompt": list(ids), "n_predict": limit, "n_probs": LISTED, "return_tokens": True, **settings}
        answer, place = await client.post("/completion", data), client.place_of("/completion")
        if not answer.is_ok:
            return ServedAnswer(**unanswered(answer, place))
        completion = read_form(PromptCompletion, answer, place)
        made, listed = tuple(completion.tokens), completion.completion_probabilities or []
        # the list leaves out tokens that end within a character; `tokens` has all
        numbers = logprobs_of(listed) if len(listed) == len(made) else ()
        is_drafted = bool(completion.timings.draft_n)
        ended = completion.stop_type != "limit"
        return ServedAnswer(completion.content, made, numbers, ended=ended, is_drafted=is_drafted)

    def shown_ids(self, *, is_stream: bool) -> Mapping[str, Any]:
        """Return the fields that make the server list the tokens of an answer: it refuses them in a stream of calls."""
        return {} if is_stream else {"logprobs": True}

    def without_grammar(self, row: Row, oracle: Oracle) -> Mapping[str, Any] | None:
        """Return the field that switches the grammar of tool calls off: the tools stay in the prompt."""
        return {"tool_choice": "none"} if row.tools else None

    def forced_request(self, request: Mapping[str, Any], answer: SpokenAnswer) -> Mapping[str, Any] | None:
        """Return a request that begins with the whole answer, and leaves EOS as the only token to add.

        The server reads answer and token together. It then neither constrains the answer nor streams it in parts, and
        refuses the request if it would constrain it. It reads the answer as text, so letters that spell a marker would
        not be letters any more; and calls of versions before the marker `[ARGS]` stay text, unlike generated ones.
        """
        oracle, text = answer.oracle, answer.text
        has_calls = oracle.tool_calls_id in answer.ids
        if oracle.kind == "spm" or answer.spells_a_marker or (has_calls and oracle.facts.calls_as != "markers"):
            return None
        if request.get("response_format") or request.get("tool_choice", "auto") not in ("auto", "none"):
            return None
        message = {"role": "assistant", "content": text}
        if text.startswith(_THINK):
            thinking, closed, rest = text.removeprefix(_THINK).partition(_END_OF_THOUGHT)
            if not closed:
                return None
            message = {"role": "assistant", "content": rest, "reasoning_content": thinking}
        eos = [[oracle.eos_id, _CERTAIN]]
        # the one token is listed, and the rest of the answer is not
        last = {"max_tokens": 1, "logit_bias": eos, "logprobs": False}
        return {**request, "messages": [*request["messages"], message], **last}

    async def complete_as(self, client: ServerClient, ids: Sequence[int], name: str, limit: int) -> ServedAnswer | None:
        """Return the answer with the scale 1 for the adapter whose file has a name, and 0 for the others.

        Raises:
            InputError: If no such adapter is loaded.
        """
        loaded = await _adapters(client) or []
        if name not in [PurePath(adapter.path).stem for adapter in loaded]:
            names = ", ".join(PurePath(adapter.path).stem for adapter in loaded)
            place, expected = client.place_of("/lora-adapters"), f"one of: {names or 'none'}"
            raise InputError("no adapter is loaded from a file of this name", place=place, expected=expected)
        scales = [{"id": adapter.id, "scale": int(PurePath(adapter.path).stem == name)} for adapter in loaded]
        return await self.complete(client, ids, name, limit, {**self.greedy, "lora": scales})

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the answer with the scale 0 for each adapter; None if no adapter is loaded."""
        loaded = await _adapters(client)
        if not loaded:
            return None
        off = {"lora": [{"id": adapter.id, "scale": 0} for adapter in loaded]}
        answer = await self.complete(client, ids, model, limit, {**self.greedy, **off})
        # computed again: else the cache would give the base's result to the next request with this prompt
        await client.post("/completion", {"prompt": list(ids), "n_predict": 0, "cache_prompt": False})
        return answer

    async def plain_ids(self, client: ServerClient, text: str) -> tuple[int, ...] | None:
        """Return the ids of a text that the server encodes without parsing control tokens."""
        data = {"content": text, "add_special": False, "parse_special": False}
        tokenized, place = await client.post("/tokenize", data), client.place_of("/tokenize")
        return tuple(read_form(Tokens, tokenized, place).tokens) if tokenized.is_ok else None

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return the ids of the rendered prompt, and the number that the chat reports."""
        rendered = await client.post("/apply-template", chat_request(row))
        place = client.place_of("/apply-template")
        if rendered.status in _NOT_PASSED:
            # a gateway passes the chat on, and not the endpoints of the server behind it
            return served_prompt(await self.chat(client, row, model), client)
        if not rendered.is_ok:
            return ServedPrompt(**unanswered(rendered, place))
        text = read_form(RenderedPrompt, rendered, place).prompt
        # the rendering leaves the first token out, and the chat adds it
        data = {"content": text, "add_special": True, "parse_special": True}
        tokenized, place = await client.post("/tokenize", data), client.place_of("/tokenize")
        if not tokenized.is_ok:
            return ServedPrompt(**unanswered(tokenized, place))
        ids = read_form(Tokens, tokenized, place).tokens
        return served_prompt(await self.chat(client, row, model), client, lambda _: ids)


def _setting(value: Any) -> int | float | bool | None:
    """Return a setting that is a number or a switch; None for anything else."""
    if isinstance(value, float):
        # in float32: 0.8 is shown as 0.800000011920929
        return float(f"{value:.6g}")
    return value if isinstance(value, int) and abs(value) < _LARGEST else None


async def _adapters(client: ServerClient) -> list[LoadedAdapter] | None:
    """Return each loaded adapter; None for a build without a list of adapters."""
    answer, place = await client.get("/lora-adapters"), client.place_of("/lora-adapters")
    return read_form(LoadedAdapters, answer, place, key="adapters").adapters if answer.is_ok else None


LLAMACPP = LlamaCpp()
