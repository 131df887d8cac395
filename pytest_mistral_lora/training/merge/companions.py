"""The files beside merged weights: such that transformers, vLLM and llama.cpp's converter read the same model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.architectures import TIE
from pytest_mistral_lora.checkpoint.base_model import read_config
from pytest_mistral_lora.checkpoint.fp8 import without_quantization
from pytest_mistral_lora.checkpoint.pins import TEXT_FILES
from pytest_mistral_lora.checkpoint.tokenizer_folder import TOKENIZER_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import TEKKEN, TOKENIZER_JSON, convert, oracle_file
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.training.generate.model_spec import ModelSpec
from pytest_mistral_lora.training.merge.source import weights_of

_KEPT = ("*_config.json", "chat_template.json", "SYSTEM_PROMPT.txt")
_NOT_KEPT = ("tokenizer_config.json", "adapter_config.json", "*quant*")
"""Files of the base beside its weights that a merged model keeps, and those among them that it has of its own."""

PLAIN = "tokenizer.model"
"""The name under which llama.cpp's converter looks for a SentencePiece model."""


def write_companions(folder: Path, spec: ModelSpec, dtype: str) -> None:
    """Write the files that a model needs beside its weights: the base's configuration, and the adapter's tokenizer."""
    adapter, base = spec.folder.path, spec.base
    config = with_ties(without_quantization(read_config(base)), weights_of(folder))
    write_json(folder / "config.json", _with_dtype(config, dtype))
    # the processor of images, generation, a system prompt: as they are; the adapter's own tokenizer files come after
    kept = (file for pattern in _KEPT for file in sorted(base.glob(pattern)) if file.is_file())
    listed = (
        name for name in spec.folder.require_manifest().data["files"] if any(fnmatch(name, one) for one in TEXT_FILES)
    )
    own = (file for file in kept if not any(fnmatch(file.name, one) for one in _NOT_KEPT))
    for file in (*own, *(adapter / name for name in listed)):
        shutil.copyfile(file, folder / file.name)
    tokenizer, plain = oracle_file(folder), base / PLAIN
    if tokenizer is not None and tokenizer.name != TEKKEN:
        _write_sentencepiece_companions(folder, tokenizer)
    elif tokenizer is None and plain.is_file() and (folder / TOKENIZER_CONFIG).is_file():
        _write_sentencepiece_companions(folder, plain)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # transformers 4 named it torch_dtype, and its older versions read nothing else
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    parts = {name: part for name, part in config.items() if isinstance(part, dict)}
    nested = {
        name: {**part, **{one: dtype for one in ("torch_dtype", "dtype") if part.get(one)}}
        for name, part in parts.items()
    }
    return {**config, **nested, key: dtype}


def with_ties(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return a configuration whose flags about tied embeddings are true to the weights, at every level."""
    # vLLM drops the head of a file whose configuration has a tie at any level (vllm-project/vllm#51063)
    key, text = TIE, config.get("text_config")
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    embeddings = [name for name in weights if name.endswith("embed_tokens.weight")]
    asked = any(part.get(key) for part in (config, text if isinstance(text, dict) else {}))
    equal = bool(heads and embeddings) and torch.equal(weights[heads[0]], weights[embeddings[0]])
    tied = not heads or (asked and equal)
    nested = {"text_config": {**text, key: tied}} if isinstance(text, dict) else {}
    return {**config, **nested, key: tied}


def _write_sentencepiece_companions(folder: Path, tokenizer: Path) -> None:
    """Write the two files without which llama.cpp's converter makes other ids of a SentencePiece tokenizer.

    Without `tokenizer.model` it takes a vocabulary without scores; without a value of `add_prefix_space` the GGUF file
    has a space more after every control token. It warns of neither.
    """
    plain, config = folder / PLAIN, folder / TOKENIZER_CONFIG
    if not plain.exists():
        shutil.copyfile(tokenizer, plain)
    data = read_json(config) if config.is_file() else {}
    if not config.is_file():
        # with `tokenizer.model` alone, transformers would build a tokenizer of its own, by the rules of its version
        fast = convert(Oracle(tokenizer))
        if not (folder / TOKENIZER_JSON).exists():
            write_text(folder / TOKENIZER_JSON, fast.backend_tokenizer.to_str(pretty=True) + "\n")
        data = {f"{name}_token": getattr(fast, f"{name}_token") for name in ("bos", "eos", "unk")}
        data |= {"clean_up_tokenization_spaces": False, "legacy": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if data.get("add_prefix_space") is None:
        write_json(config, {**data, "add_prefix_space": False})
