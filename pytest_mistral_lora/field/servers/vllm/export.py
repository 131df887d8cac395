"""The files that serve an adapter or a merged model by vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_mistral_lora.chat.oracle.answer_grammar import has_grammar
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.vllm.adapter_faults import RANKS, largest_rank
from pytest_mistral_lora.programs.facts import Fact, fact, works
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.servers import (
    REQUIREMENTS,
    ServedModel,
    ServerExport,
    Written,
    check_command,
    script,
    wrapped,
)

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class VllmExport(ServerExport):
    """Writes the files for vLLM."""

    kind, title, takes_probe = "vllm", "vLLM", True

    def faults(self, served: ServedModel) -> Iterator[str]:
        """Yield each property of an adapter that vLLM refuses or silently ignores."""
        yield from super().faults(served)
        if largest_rank(served.folder) > RANKS[-1]:
            yield f"the rank is {largest_rank(served.folder)}, and vLLM takes at most {RANKS[-1]}"

    def write(self, served: ServedModel, folder: Path) -> Written:
        """Write `serve.sh`, and the versions that the environment of the server needs."""
        options = ["--host", "127.0.0.1", "--port", "8000"]
        if served.has_adapter:
            rank = next(rank for rank in RANKS if rank >= largest_rank(served.folder))
            options += ["--served-model-name", served.base.name, "--enable-lora", "--max-lora-rank", str(rank)]
            options += ["--lora-modules", f"{served.name}={served.folder.path.resolve()}"]
        else:
            options += ["--served-model-name", served.name]
        options += [*_vllm_tokenizer(served), "--enable-auto-tool-choice", "--tool-call-parser", "mistral"]
        if served.dtype in _DTYPES:
            # vLLM's `auto` takes 16 bits for weights of 32
            options += ["--dtype", _DTYPES[served.dtype]]
        # a repetition penalty in generation_config.json also changes greedy answers
        options += ["--generation-config", "vllm"]
        fault, commands, note = _known_fault(served), ["sh serve.sh"], ""
        if fault is not None:
            # servers with the versions that pip resolves do not answer
            pinned = works(fault.works).pinned
            write_text(folder / REQUIREMENTS, "".join(f"{line}\n" for line in (f"# {fault.symptom}", *pinned)))
            note = f"# Install {REQUIREMENTS} in an environment of the server's own: {fault.symptom}\n"
            commands = [f"pip install -r {REQUIREMENTS}", *commands]
        write_text(folder / "serve.sh", script(wrapped(["vllm", "serve", served.weights, *options]), note))
        remarks = (
            () if served.template is None else ("Text that spells a control token becomes that control token (ML906).",)
        )
        return Written(tuple(commands), check_command(served, "vllm", 8000), remarks, fault)


def _known_fault(served: ServedModel) -> Fact | None:
    """Return the fault of the versions that pip resolves for vLLM, if it stops this model."""
    if served.template is not None:
        return None
    return fact("served-grammar") if has_grammar(served.oracle) else None


def _vllm_tokenizer(served: ServedModel) -> list[str]:
    if served.template is not None:
        # vLLM reads only the weights of an adapter's folder
        given = ["--tokenizer-mode", "hf", "--tokenizer", str(served.folder.path.resolve())]
        return [*given, "--chat-template", str(served.template.resolve())]
    if oracle_file(served.base) is not None:
        return ["--tokenizer-mode", "mistral"]
    if oracle_file(served.folder.path) is None:
        raise InputError(
            "no Mistral tokenizer file, without which vLLM renders by the chat template",
            place=str(served.base),
            expected="tekken.json or tokenizer.model.vN",
            next_step="Copy it from the repository of the base.",
        )
    return ["--tokenizer-mode", "mistral", "--tokenizer", str(served.folder.path.resolve())]


EXPORT = VllmExport()
