"""The files that serve an adapter or a merged model by vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.oracle.answer_grammar import has_grammar
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.chat.reading import read_json
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
    remark_on_calls,
    script,
    wrapped,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""The precision of a dtype as `serve-check` takes it: vLLM reports none."""

_SETTINGS = {"reasoning_effort": ("none", "high")}
"""The settings of a tokenizer file, each with its values, that the mistral-common of `vllm-answers-from-v11-on` reads;
it refuses a file with any other one (`ModelSettingsBuilder`, `ReasoningEffort`)."""


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
        if served.oracle.features.thinking:
            # else a thought comes as text: [THINK]…[/THINK]
            options += ["--reasoning-parser", "mistral"]
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
        precision = _PRECISIONS.get(served.dtype, "")
        check = check_command(served, f"vllm:{precision}" if precision else "vllm", 8000)
        return Written(tuple(commands), check, tuple(_remarks(served, fault)), fault)


def _remarks(served: ServedModel, fault: Fact | None) -> Iterator[str]:
    """Yield what differs from training, or keeps the server from starting."""
    if served.template is not None:
        yield "Text that spells a control token becomes that control token (ML906)."
    if fault is not None and (refused := _refused_settings(served.oracle)):
        pinned = " and ".join(works(fault.works).pinned)
        yield (
            f"The server does not start with this tokenizer: it has {refused}, which the mistral-common of {pinned} "
            "refuses, and beside a newer one this vLLM answers no chat. No versions are known that serve it: use "
            "another server, or a vLLM that is newer than these facts."
        )
    if served.oracle.facts.writes_call_ids and served.oracle.facts.calls_as == "markers":
        yield remark_on_calls("served-call-ids-in-names", served)
    if served.oracle.features.thinking:
        yield (
            "With the parser of thinking, a response_format or a grammar of a request holds only after a thought: an "
            "answer without one is free."
        )


def _refused_settings(oracle: Oracle) -> str:
    """Return the settings of a tokenizer file that the pinned mistral-common refuses, as words; empty for none."""
    if oracle.kind != "tekken":
        return ""
    settings = read_json(oracle.path).get("model_settings_builder") or {}
    refused = [f"the setting {name}" for name in settings if name not in _SETTINGS]
    for name, known in _SETTINGS.items():
        values = (settings.get(name) or {}).get("values") or ()
        refused += [f"the {name} {value!r}" for value in values if value not in known]
    return ", ".join(refused)


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
