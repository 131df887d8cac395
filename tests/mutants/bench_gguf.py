"""The bench of the subject `gguf`: the GGUF files of a merged model and of its adapter."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from bench_merged import plain_merge
from gallery import Artifact
from gguf_files import (
    adapter_fields,
    adapter_tensors,
    model_fields,
    model_tensors,
    tokenizer_fields,
    write_gguf,
)
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import GgufTarget, ModelFileTarget
from pytest_mistral_lora.field.servers.ollama.go_template import go_template
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

FIELD = "tokenizer.ggml."


@cache
def oracle(name: str = "spm-v3") -> Oracle:
    return Oracle(shipped_tokenizer(name))


@cache
def tokenizer(name: str = "spm-v3") -> dict[str, Any]:
    return {**tokenizer_fields(oracle(name)), "tokenizer.chat_template": oracle(name).chat_template()}


def numbers(folder: Path, name: str = WEIGHTS) -> dict[str, Any]:
    """Return the tensors of a safetensors file in float32."""
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / name).items()}


class GgufBench:
    """Makes the GGUF files of a merged model and of its adapter, and judges them."""

    subject = "gguf"

    def make(self, folder: Path) -> Artifact:
        """Copy base, adapter and merged model below a folder, with what a converter writes of them."""
        source = plain_merge()
        for name in ("base", "lora", "merged"):
            copied(source / name, folder / name)
        config = json.loads((folder / "merged" / "config.json").read_text())
        lora = json.loads((folder / "lora" / "adapter_config.json").read_text())
        return {
            "folder": folder,
            "config": config,
            "fields": {**model_fields(config), **tokenizer()},
            "tensors": model_tensors(numbers(folder / "merged"), config),
            "before": model_tensors(numbers(folder / "base"), config),
            "kind": "F32",
            "compared": True,
            "adapter_config": lora,
            "adapter_fields": adapter_fields(lora),
            "adapter_tensors": adapter_tensors(numbers(folder / "lora", "adapter_model.safetensors"), config),
            "bytes": lambda data: data,
            "modelfile": None,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Write both files, and run every check of the subject on them."""
        folder = artifact["folder"]
        kind = gguf.GGMLQuantizationType[artifact["kind"]]
        model = write_gguf(folder / "merged.gguf", artifact["fields"], artifact["tensors"], kind=kind)
        model.write_bytes(artifact["bytes"](model.read_bytes()))
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(artifact["adapter_config"]))
        adapter = write_gguf(folder / "lora.gguf", artifact["adapter_fields"], artifact["adapter_tensors"])
        base = BaseFolder(folder / "base")
        folders = [AdapterFolder(folder / name, base) for name in ("lora", "merged")]
        targets = [GgufTarget(one.name, one, base=base, folders=folders) for one in (model, adapter)]
        if not artifact["compared"]:
            targets = [GgufTarget(model.name, model)]
        if artifact["modelfile"] is not None:
            (folder / "Modelfile").write_text("\n".join(artifact["modelfile"]) + "\n")
            targets = [ModelFileTarget("Modelfile", folder / "Modelfile", base=BaseFolder(folder / "merged"))]
        settings = Settings(20, None, "cpu", True, (), False, folder)
        return [finding for check in collect(targets, settings) for finding in check.run().findings]


BENCH = GgufBench()


def setting(artifact: Artifact, name: str, value: Any) -> None:
    """Change a field of the tokenizer; None leaves it out."""
    artifact["fields"] = {**artifact["fields"], FIELD + name: value}


def take_tekken(artifact: Artifact) -> None:
    """Put a Tekken tokenizer in place of SentencePiece's: the vocabulary is no longer the folder's."""
    plain = {key: value for key, value in artifact["fields"].items() if not key.startswith(FIELD)}
    artifact["fields"] = {**plain, **tokenizer("tekken-240718")}


def small_change(artifact: Artifact) -> None:
    """Merge a hundredth of the adapter, and store all numbers in 8 bits, whose error is as large as the change."""
    folder, config = artifact["folder"], artifact["config"]
    before, after = (load_file(folder / name / WEIGHTS) for name in ("base", "merged"))
    merged = {name: before[name].float() + 0.01 * (one.float() - before[name].float()) for name, one in after.items()}
    (folder / "merged" / WEIGHTS).unlink()
    save_file(merged, folder / "merged" / WEIGHTS)
    artifact["tensors"] = model_tensors({name: one.numpy() for name, one in merged.items()}, config)
    artifact["kind"] = "Q8_0"


def take_modelfile(artifact: Artifact, **commands: str | None) -> None:
    """Judge a Modelfile of the merged model, as the export writes it, in place of the GGUF files.

    Args:
        artifact: The bench's artifact.
        commands: Lines to put in place of those of the export, by `source`, `template`, `penalty`, `context`, `more`.
            None leaves a line out.
    """
    lines = {
        "source": "FROM ./merged.gguf",
        "template": f'TEMPLATE """{go_template(oracle())}"""',
        "penalty": "PARAMETER repeat_penalty 1",
        "context": "PARAMETER num_ctx 512",
    }
    artifact["modelfile"] = [line for line in {**lines, **commands}.values() if line is not None]
