from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.errors import PinError, RecipeError, TrainingError
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter, expected_names
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.run import RunResult
from pytest_mistral_lora.training.save import Adapter, check_adapter


def test_every_layer_gets_a_float32_pair_and_nothing_else_trains(base: Path) -> None:
    folder = BaseFolder(base)
    model = attach_adapter(load_base(folder, "fp32", "cpu"), Lora(r=4), adapted_layers(folder, ("attention",)), seed=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 16
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert adapter_tensors(model).keys() == expected_names(adapted_layers(BaseFolder(base), ("attention",)))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "kproj"], "'kproj' matches nothing"),
        (["q_proj", "v_proj", "oproj"], "'oproj' matches nothing"),
        (["q_proj", "lm_head"], "'lm_head' matches nothing"),
        (["embed_tokens"], "'embed_tokens' matches nothing"),
        (["proj"], "'proj' matches nothing"),
    ],
)
def test_a_target_that_is_not_in_every_layer_is_an_error_before_weights_are_loaded(
    base: Path, tmp_path: Path, targets: list[str], named: str
) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(RecipeError, match=named) as caught:
        adapted_layers(BaseFolder(tmp_path), targets)
    assert str(caught.value.place) == "lora.target_modules"
    assert "q_proj" in caught.value.expected
    assert len(adapted_layers(BaseFolder(tmp_path), ["q_proj", "gate_proj"])) == 4


def test_an_adapter_on_other_layers_than_those_listed_is_refused(base: Path) -> None:
    layers = adapted_layers(BaseFolder(base), ("attention",))[:-1]
    with pytest.raises(TrainingError, match=r"not the adapter's: .*layers\.1\.self_attn\.o_proj"):
        attach_adapter(load_base(BaseFolder(base), "fp32", "cpu"), Lora(), layers, seed=0)


def test_weights_that_are_missing_in_the_file_are_an_error(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(PinError, match="no weights"):
        load_base(BaseFolder(tmp_path), "fp32", "cpu")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PinError, match="missing keys"):
        load_base(BaseFolder(tmp_path), "fp32", "cpu")


def mutant(run: RunResult, change: Any) -> Adapter:
    tensors = {name: tensor.clone() for name, tensor in run.adapter.tensors.items()}
    change(tensors)
    return Adapter(tensors, run.adapter.initial, run.adapter.layers, run.adapter.config)


_B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[_B].zero_(), "lora_B.weight did not move"),
        (lambda tensors: tensors[_A].view(-1)[3].fill_(float("nan")), "lora_A.weight is not finite"),
        (lambda tensors: tensors[_B].view(-1)[0].fill_(float("inf")), "lora_B.weight is not finite"),
        (lambda tensors: tensors.pop(_A), "lora_A.weight is missing"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)}), "lm_head.weight is not a tensor of"),
        (lambda tensors: tensors.update({_A: tensors[_A].half()}), "is torch.float16; expected float32"),
        (lambda tensors: tensors.clear(), "is missing"),
    ],
)
def test_unsound_adapters_are_not_saved(run: RunResult, change: Any, message: str) -> None:
    check_adapter(run.adapter)
    with pytest.raises(TrainingError, match=message):
        check_adapter(mutant(run, change))


def test_resumed_layer_that_did_not_move_further_is_caught(run: RunResult) -> None:
    still = Adapter(run.adapter.tensors, run.adapter.tensors, run.adapter.layers, run.adapter.config)
    with pytest.raises(TrainingError, match="did not move"):
        check_adapter(still)
