"""Sound GGUF files pass in each form that a converter gives them; broken ones are in the gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import adapter_fields, adapter_tensors, model_fields, model_tensors, tokenizer_fields, write_gguf
from of_classes import made_adapter
from safetensors.numpy import load_file, save_file
from small_mistral import write_small_mistral

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.gguf.tokenizer import tokenizer_findings
from pytest_mistral_lora.conformance.gguf.weights import ComparedWeights, adapter_findings
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.gguf_file import GgufFile

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("in_folder", [True, False], ids=["head in the folder", "none there"])
@pytest.mark.parametrize("in_file", [True, False], ids=["head in the file", "none there"])
def test_a_tied_head_may_be_in_either_file(in_folder: bool, in_file: bool, tmp_path: Path) -> None:
    base = write_small_mistral(tmp_path / "base")
    config: Any = json.loads((base / "config.json").read_text()) | {"head_dim": 8}
    weights = load_file(base / "model.safetensors")
    tied = {name: tensor for name, tensor in weights.items() if name != HEAD}
    head = {HEAD: weights[EMBEDDINGS].copy()}
    save_file(tied | (head if in_folder else {}), base / "model.safetensors")
    tensors = model_tensors(tied | (head if in_file else {}), config)
    file = write_gguf(tmp_path / "tied.gguf", model_fields(config), tensors)
    assert [one.text() for one in ComparedWeights(GgufFile(file), BaseFolder(base), None).findings()] == []


def test_ids_may_be_left_out_if_readers_take_the_right_ones(tmp_path: Path) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    left_out = ("bos_token_id", "eos_token_id", "unknown_token_id")
    fields = {**tokenizer_fields(oracle), **dict.fromkeys(f"tokenizer.ggml.{name}" for name in left_out)}
    file = GgufFile(write_gguf(tmp_path / "vocabulary.gguf", fields, {}))
    assert [one.text() for one in tokenizer_findings(file, oracle)] == []


PATTERN = r"model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"


def test_an_adapter_of_a_model_with_images_is_held_to_its_file(tmp_path: Path) -> None:
    made = made_adapter("wrapped-mistral", PATTERN)
    config = json.loads((made.base / "config.json").read_text())["text_config"]
    lora = json.loads((made.adapter / "adapter_config.json").read_text())
    numbers = load_file(made.adapter / "adapter_model.safetensors")
    plain = {name.replace("model.language_model.", "model."): tensor for name, tensor in numbers.items()}
    tensors = adapter_tensors(plain, config)
    file, folder = tmp_path / "lora.gguf", AdapterFolder(made.adapter, BaseFolder(made.base))
    write_gguf(file, adapter_fields(lora), tensors)
    assert [one.text() for one in adapter_findings(GgufFile(file), folder)] == []
    name = next(name for name in tensors if "attn_q" in name and name.endswith("lora_b"))
    write_gguf(file, adapter_fields(lora), {**tensors, name: tensors[name][::-1]})
    assert [one.rule for one in adapter_findings(GgufFile(file), folder)] == ["ML914"]


def test_an_adapter_of_another_architecture_is_not_compared(tmp_path: Path) -> None:
    made = made_adapter("wrapped-mistral", PATTERN)
    file = write_gguf(tmp_path / "lora.gguf", {"general.type": "adapter"}, {"a": np.ones((2, 2), dtype=np.float32)})
    content = GgufFile(file)
    content.architecture = "nobody's"
    with pytest.raises(InputError, match='the architecture is "nobody\'s"'):
        list(adapter_findings(content, AdapterFolder(made.adapter, BaseFolder(made.base))))
