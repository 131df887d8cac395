"""A base folder reads each file once, and gives transformers the configuration that transformers would read itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from cut_sentencepiece import cut_v3
from transformers import AutoConfig, GenerationConfig

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.tiny_model import tiny_config, write_tiny_base
from pytest_mistral_lora.errors import PinError

ARCHITECTURES = [
    *(Architecture(text) for text in TEXT_MODELS.values() if text.has_oracle),
    *(Architecture(TEXT_MODELS[name], is_wrapped=True) for name in ("mistral", "ministral3")),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", cut_v3())


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


def changed(folder: Path, **keys: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.title)
def test_the_configuration_is_the_one_that_transformers_reads(architecture: Architecture, tmp_path: Path) -> None:
    if not hasattr(transformers, architecture.text.name):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.title}")
    tiny_config(Oracle(shipped_tokenizer("spm-v3")), architecture).save_pretrained(tmp_path)
    base = BaseFolder(tmp_path)
    read = architecture.model_class().config_class.from_pretrained(tmp_path)
    read._attn_implementation = None
    assert base.model_config().to_dict() == read.to_dict()
    automatic = AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert base.canonical_config["model_type"] == automatic.model_type
    assert base.canonical_config["hidden_size"] == automatic.hidden_size


def test_a_mistral_with_layer_types_is_a_ministral_as_for_transformers(base: Path) -> None:
    folder = BaseFolder(changed(base, layer_types=["sliding_attention", "full_attention"], sliding_window=8))
    assert folder.canonical_config["model_type"] == AutoConfig.from_pretrained(base).model_type == "ministral"


def test_another_file_that_transformers_reads_in_its_place_is_read(base: Path) -> None:
    (base / "config.4.0.0.json").write_text((base / "config.json").read_text())
    changed(base, configuration_files=["config.4.0.0.json"], rms_norm_eps=0.5)
    folder = BaseFolder(base)
    assert folder.config["rms_norm_eps"] == 0.5
    assert folder.model_config().rms_norm_eps == folder.canonical_config["rms_norm_eps"] == 1e-6


def test_a_file_that_changes_later_changes_no_answer(base: Path) -> None:
    folder = BaseFolder(base)
    vocab_size = Oracle(cut_v3()).vocab_size
    assert folder.vocab_size == vocab_size
    (base / "config.json").write_text("{}")
    assert folder.tokenizer().files.json("config.json")["vocab_size"] == folder.vocab_size == vocab_size
    assert BaseFolder(base).tokenizer().files.json("config.json") == {}


def test_an_error_is_kept(base: Path) -> None:
    folder = BaseFolder(base)
    content = (base / "config.json").read_text()
    (base / "config.json").unlink()
    for _ in range(2):
        with pytest.raises(PinError, match="cannot be read: No such file"):
            _ = folder.config
        (base / "config.json").write_text(content)


def test_a_change_of_an_empty_model_is_no_change_of_the_next(base: Path) -> None:
    folder = BaseFolder(base)
    del folder.empty_model().model.layers
    assert len(folder.empty_model().model.layers) == 2
    assert {parameter.device.type for parameter in folder.empty_model().parameters()} == {"meta"}


@pytest.mark.parametrize("own_file", [False, True], ids=["config.json", "generation_config.json"])
def test_a_model_ends_its_answers_with_the_ids_of_its_folder(own_file: bool, base: Path) -> None:
    expected = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}
    if own_file:
        GenerationConfig(**expected, repetition_penalty=2.0).save_pretrained(base)
    else:
        changed(base, **expected)
    found = load_base(BaseFolder(base), "fp32", "cpu").generation_config
    assert {key: getattr(found, key) for key in expected} == expected
    assert not found.repetition_penalty or found.repetition_penalty == 1.0
