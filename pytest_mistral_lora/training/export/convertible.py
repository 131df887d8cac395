"""Folders that llama.cpp's converters take without losing scores, spaces, or the scale of an adapter."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.base_model import weight_files
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
        template: The chat template; None for the one that mistral-common generates.

    Raises:
        NoOracleError: If the tokenizer is not one of Mistral's.
    """
    folder.mkdir()
    for file in (*weight_files(base), *base.glob("model*.safetensors.index.json")):
        _link(folder / file.name, file)
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
        # without tokenizer.model a vocabulary has no scores; without a false here, each control token gets a space
        shutil.copyfile(oracle.path, folder / SPM_MODEL)
        config["add_prefix_space"] = False
    write_json(folder / TOKENIZER_CONFIG, config)
    text = template.read_bytes().decode() if template is not None else oracle.chat_template()
    write_text(folder / TEMPLATE, text)


def _link(link: Path, file: Path) -> None:
    try:
        link.symlink_to(file.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(file, link)


def write_adapter(folder: Path, adapter: AdapterFolder) -> None:
    """Write an adapter whose scale is alpha / rank, which is the only one that llama.cpp computes."""
    folder.mkdir()
    config = dict(adapter.config)
    if config.get("use_rslora"):
        # alpha / sqrt(rank), as the quotient of an alpha and the rank
        config |= {"lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]), "use_rslora": False}
    write_json(folder / CONFIG, config)
    shutil.copyfile(adapter.tensors_file, folder / ADAPTER_TENSORS)
