"""Folders for llama.cpp's converters, which keep every score, every space and the scale of an adapter."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    SPECIAL_TOKENS,
    SPM_MODEL,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, convert
from pytest_mistral_lora.checkpoint.weights import weight_files
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS

MODEL, ADAPTER = "model", "adapter"
"""The folders that the two converters read."""


def write_model(folder: Path, base: Path, tokenizer: Path, template: Path | None) -> None:
    """Write a folder with the weights of a base, as links, and the tokenizer and template of training.

    Args:
        folder: The folder to make.
        base: The folder of the weights.
        tokenizer: The folder of the tokenizer.
        template: The chat template; None for mistral-common's own.

    Raises:
        NoOracleError: If the tokenizer is not Mistral's.
    """
    folder.mkdir()
    home = folder.parent.resolve()
    for file in (*weight_files(base), *base.glob("model*.safetensors.index.json")):
        target = file.resolve()
        # weights within the export move with it
        link = Path("..") / target.relative_to(home) if target.is_relative_to(home) else target
        try:
            (folder / file.name).symlink_to(link)
        except OSError:  # a file system without links
            shutil.copyfile(file, folder / file.name)
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    # not tekken.json: transformers 5 would choose mistral-common's backend, whose vocabulary the converter cannot list
    for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    oracle = CheckpointTokenizer(tokenizer).oracle
    converted = convert(oracle)
    if not ((folder / TOKENIZER_JSON).is_file() and (folder / TOKENIZER_CONFIG).is_file()):
        converted.save_pretrained(folder)
    config = read_json(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    # a class that transformers 4 and 5 both have: converters are pinned to either
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if oracle.kind == "spm":
        # without tokenizer.model a vocabulary has no scores; without `false`, each control token gets a space
        shutil.copyfile(oracle.path, folder / SPM_MODEL)
        config["add_prefix_space"] = False
    write_json(folder / TOKENIZER_CONFIG, config)
    text = template.read_bytes().decode() if template is not None else oracle.chat_template()
    write_text(folder / TEMPLATE, text)


def write_adapter(folder: Path, adapter: AdapterFolder) -> None:
    """Write an adapter whose scale is alpha / rank, the only scale that llama.cpp computes."""
    folder.mkdir()
    config = dict(adapter.config)
    if config.get("use_rslora"):
        # alpha / sqrt(rank), as the quotient of an alpha and the rank
        config |= {"lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]), "use_rslora": False}
    write_json(folder / CONFIG, config)
    shutil.copyfile(adapter.tensors_file, folder / ADAPTER_TENSORS)
