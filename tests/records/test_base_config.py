from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.base_location import RecordedBase, changed_config

# the base of Mistral 7B v0.3, as transformers 4 wrote it
OLD = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}


def written(folder: Path, data: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_the_form_of_another_version_is_the_same_configuration(tmp_path: Path) -> None:
    old = BaseFolder(written(tmp_path / "old", OLD)).canonical_config
    MistralConfig(**OLD).save_pretrained(tmp_path / "new")
    assert BaseFolder(tmp_path / "new").canonical_config == old
    assert (old["rms_norm_eps"], old["rope"], old["head_dim"]) == (
        1e-05,
        {"rope_theta": 1000000.0, "rope_type": "default"},
        128,
    )
    assert json.loads(json.dumps(old)) == old


@pytest.mark.parametrize(
    "change",
    [
        {"torch_dtype": "float16"},
        {"transformers_version": "5.1.0"},
        {"use_cache": False},
        {"max_position_embeddings": 4096},
        {"a_key_of_a_trainer": 1},
        {"head_dim": 128},
    ],
    ids=str,
)
def test_what_decides_no_number_is_not_compared(change: dict[str, Any], tmp_path: Path) -> None:
    recorded = BaseFolder(written(tmp_path / "one", OLD)).canonical_config
    RecordedBase("a", config=recorded).require_config(BaseFolder(written(tmp_path / "other", {**OLD, **change})))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rms_norm_eps": 1e-06}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": 10000.0}, "rope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope"),
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 32}, "num_key_value_heads"),
        ({"head_dim": 64}, "head_dim"),
    ],
    ids=str,
)
def test_what_decides_a_number_is_named_with_both_values(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    recorded = BaseFolder(written(tmp_path / "one", OLD)).canonical_config
    other = written(tmp_path / "other", {**OLD, **change})
    now = changed_config(recorded, BaseFolder(other).canonical_config)
    assert now[key] != recorded[key]
    with pytest.raises(InputError, match=r"config\.json: .* is .*the adapter was trained"):
        RecordedBase("a", config=recorded).require_config(BaseFolder(other))


def test_another_class_is_another_configuration(tmp_path: Path) -> None:
    recorded = BaseFolder(written(tmp_path / "one", OLD)).canonical_config
    llama = written(tmp_path / "other", {**OLD, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert changed_config(recorded, BaseFolder(llama).canonical_config)["model_type"] == "llama"
    with pytest.raises(InputError, match='model_type is "llama"'):
        RecordedBase("a", config=recorded).require_config(BaseFolder(llama))


def test_a_default_counts_as_much_as_a_key(tmp_path: Path) -> None:
    recorded = BaseFolder(written(tmp_path / "one", OLD)).canonical_config
    without = {key: value for key, value in OLD.items() if key != "rms_norm_eps"}
    now = changed_config(recorded, BaseFolder(written(tmp_path / "other", without)).canonical_config)
    assert now == {**recorded, "rms_norm_eps": 1e-06}


def test_a_key_that_another_version_does_not_have_is_no_difference(tmp_path: Path) -> None:
    found = BaseFolder(written(tmp_path / "one", OLD)).canonical_config
    assert changed_config({**found, "a_key_of_tomorrow": 1}, found) == {**found, "a_key_of_tomorrow": 1}
    RecordedBase("a").require_config(BaseFolder(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "data",
    [[], {"num_hidden_layers": 10**9}, {"model_type": 1}, {**OLD, "rope_scaling": "x"}, {**OLD, "hidden_size": {}}],
)
def test_a_configuration_that_is_none_is_an_error(data: Any, tmp_path: Path) -> None:
    with pytest.raises(PinError, match=r"config\.json"):
        _ = BaseFolder(written(tmp_path / "one", data)).canonical_config
