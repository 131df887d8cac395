"""The class of a base by its config.json, its layers by name, and the refusal of every class that is not trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from of_classes import tiny_base
from safetensors.torch import save_file

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.checkpoint.architectures import (
    SUPPORTED,
    TEMPLATE_ALONE,
    TEXT_MODELS,
    WRAPPER,
    Architecture,
    TextModel,
    architecture_of,
    spelled_name,
)
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import require_trainable
from pytest_mistral_lora.checkpoint.weights import weight_files
from pytest_mistral_lora.errors import PinError, RecipeError, RowError
from pytest_mistral_lora.places import Place

_WRAPPED = {"architectures": [WRAPPER], "model_type": "mistral3", "vision_config": {}}


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "mistral"}, "MistralForCausalLM"),
        # Ministral 8B 2410 in the copies that fine-tunes leave: AutoModel goes by layer_types
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "layer_types": ["full_attention"] * 2},
            "MinistralForCausalLM",
        ),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": ["full_attention"]}, "MistralForCausalLM"),
        ({"architectures": ["MinistralForCausalLM"], "model_type": "ministral"}, "MinistralForCausalLM"),
        ({**_WRAPPED, "text_config": {"model_type": "mistral"}}, f"{WRAPPER} (mistral)"),
        ({**_WRAPPED, "text_config": {}}, f"{WRAPPER} (mistral)"),
        ({**_WRAPPED, "text_config": {"model_type": "ministral3"}}, f"{WRAPPER} (ministral3)"),
        # in a wrapper, layer_types do not make a Ministral of a Mistral: AutoModel goes by the type alone
        ({**_WRAPPED, "text_config": {"model_type": "mistral", "layer_types": ["x"]}}, f"{WRAPPER} (mistral)"),
        ({"model_type": "mistral3"}, f"{WRAPPER} (mistral)"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "Qwen3ForCausalLM"),
    ],
)
def test_a_configuration_has_the_class_that_automodel_takes(config: dict[str, Any], title: str) -> None:
    assert architecture_of(config).title == title


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"architectures": ["MistralLarge4ForConditionalGeneration"], "model_type": "mistral_large4"},
            "MistralLarge4.*:",
        ),
        (
            {"architectures": ["VoxtralForConditionalGeneration"], "model_type": "voxtral"},
            "Voxtral.*: it is a model of audio",
        ),
        ({"architectures": ["Mistral5ForCausalLM"], "model_type": "mistral5"}, "Mistral5ForCausalLM"),
        ({"architectures": ["MistralForSequenceClassification"], "model_type": "mistral"}, "SequenceClassification"),
        ({"architectures": ["MistralForCausalLM", "X"], "model_type": "mistral"}, "MistralForCausalLM, X"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mixtral"}, "of model_type 'mixtral'"),
        ({**_WRAPPED, "text_config": {"model_type": "qwen2"}}, "around a text model of type 'qwen2'"),
        ({**_WRAPPED, "text_config": {"model_type": ["mistral"]}}, r"of type \['mistral'\]"),
        ({"architectures": "MistralForCausalLM"}, "of architectures 'MistralForCausalLM'"),
        ({"architectures": [1], "model_type": "mistral"}, r"of architectures \[1\]"),
        ({"model_type": {"a": 1}}, "'a': 1"),
        ({}, "None"),
        ({"model_type": "x" * 10_000}, "x{200}$"),
    ],
)
def test_any_other_class_is_refused_by_name(config: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=found):
        architecture_of(config)
    with pytest.raises(RecipeError, match="the base model is") as caught:
        require_trainable(BaseFolder(written(tmp_path, config)))
    assert all(name in caught.value.expected for name in (*SUPPORTED, *TEMPLATE_ALONE))


def test_a_class_without_an_oracle_is_trained_by_its_template_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    require_trainable(BaseFolder(folder), "chat-template")
    with pytest.raises(RecipeError, match="LlamaForCausalLM, which no tokenizer") as caught:
        require_trainable(BaseFolder(folder))
    assert caught.value.expected == "backend: chat-template"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\..* is not in the weights"),
        ({"num_attention_heads": 2, "head_dim": 3}, "would have shape"),
        ({"model_type": None}, "no model_type"),
        (
            {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": None},
            "no sliding",
        ),
        ({"num_hidden_layers": 1}, ""),
        ({"rope_theta": 5.0}, ""),
    ],
)
def test_a_configuration_that_its_weights_do_not_have_is_refused_before_they_are_loaded(
    change: dict[str, Any], found: str, tmp_path: Path
) -> None:
    base = tiny_base("mistral")
    for file in base.glob("model*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    folder = written(tmp_path, json.loads((base / "config.json").read_text()) | change)
    if not found:
        require_trainable(BaseFolder(folder))
        return
    with pytest.raises(PinError, match=found):
        require_trainable(BaseFolder(folder))


def test_an_adapter_in_the_folder_of_a_base_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = written(tmp_path, json.loads((tiny_base("mistral") / "config.json").read_text()))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PinError, match="has an adapter"):
        require_trainable(BaseFolder(folder))


def test_a_class_of_a_newer_transformers_names_the_version() -> None:
    newer = TextModel("Mistral9ForCausalLM", "mistral9", since="9.0")
    for architecture in (Architecture(newer), Architecture(newer, is_wrapped=True)):
        with pytest.raises(PinError, match=re.escape(architecture.title)) as caught:
            architecture.model_class()
        assert caught.value.expected == "transformers 9.0 or later"
        assert "pip install 'transformers>=9.0'" in caught.value.next_step


def test_a_checkpoint_in_mistrals_own_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(PinError, match=r"params\.json, and no config\.json") as caught:
        _ = BaseFolder(tmp_path).config
    assert "transformers' format" in caught.value.next_step
    with pytest.raises(PinError, match=r"no weights but consolidated\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a.png"], "messages": []},
        {"audio": {"path": "a.wav"}, "messages": []},
        {"videos": ["a.mp4"], "messages": []},
    ],
)
def test_media_beside_the_messages_are_refused(row: dict[str, Any]) -> None:
    row["messages"] = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]
    name = next(iter(row))
    with pytest.raises(RowError, match=rf"rows:1, {name}: a row with {name}"):
        parse_row(row, place=Place.of("rows", 1))
    assert parse_row({**row, name: None}, place=Place.of("rows", 1))


def test_groups_of_targets() -> None:
    mistral, small4 = Architecture(TEXT_MODELS["mistral"]), Architecture(TEXT_MODELS["mistral4"], is_wrapped=True)
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert mistral.targets(["attention"]) == attention
    assert mistral.targets(["attention+mlp"]) == mistral.targets(["all-linear"]) == (*attention, *mlp)
    assert mistral.targets(["o_proj", "attention", "any"]) == ("o_proj", "q_proj", "k_proj", "v_proj", "any")
    assert small4.targets(["attention"]) == ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    with pytest.raises(ValueError, match="experts behind a router"):
        small4.targets(["all-linear"])
    assert (mistral.layers, small4.layers) == ("model.layers", "model.language_model.layers")


def test_names_on_disk_and_in_memory_are_one() -> None:
    pairs = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.ln_pre.weight": "model.vision_tower.ln_pre.weight",
        "multi_modal_projector.norm.weight": "model.multi_modal_projector.norm.weight",
    }
    for disk, memory in pairs.items():
        assert spelled_name(disk, pairs) == spelled_name(memory, pairs.values())
    assert spelled_name("lm_head.weight", ["model.embed_tokens.weight"]) == "lm_head.weight"


@pytest.mark.parametrize(
    ("keys", "head", "tied"),
    [
        ({}, True, False),  # Small 3.1, Ministral 3 8B: no flag, and transformers' own default is a tie
        ({}, False, True),
        ({"tie_word_embeddings": True}, True, False),
        ({"tie_word_embeddings": False}, False, True),
    ],
)
def test_the_file_of_a_wrapper_decides_whether_it_is_tied(
    keys: dict[str, Any], head: bool, tied: bool, tmp_path: Path
) -> None:
    import torch

    names = ["language_model.model.embed_tokens.weight", *(["language_model.lm_head.weight"] if head else [])]
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    assert BaseFolder(written(tmp_path, {**_WRAPPED, "text_config": {}, **keys})).is_tied is tied
