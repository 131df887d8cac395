"""Layers around frozen weights: what PEFT and transformers compute, with less kept; and everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from tiny_runs import MakeRecipe, trainer_of
from transformers.models.mistral.modeling_mistral import MistralMLP

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.step import frozen_layers as frozen
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers

IDS = torch.arange(5, 45)[None]


def model_of(base: Path, precision: Any = "fp32", **settings: Any) -> Any:
    """Return a model whose adapter has moved away from its start, where B is zero."""
    given = Lora(**{"r": 4, **settings})
    model = attach_adapter(
        load_base(BaseFolder(base), precision, "cpu"),
        given,
        adapted_layers(BaseFolder(base), given.target_modules),
        seed=0,
    )
    move_away(model)
    return model


def move_away(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with autocast:
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def apart(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert found.keys() == right.keys()
    return max(float((found[name].double() - one.double()).norm() / one.double().norm()) for name, one in right.items())


MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), MLP, ("v_proj", "up_proj")])
def test_gradients_are_as_near_to_fp64_as_those_of_peft(targets: tuple[str, ...], base: Path) -> None:
    exact, plain, ours = (model_of(base, target_modules=targets) for _ in range(3))
    use_frozen_layers(ours)
    truth = gradients(exact.double())
    errors = {"ours": apart(gradients(ours), truth), "peft": apart(gradients(plain), truth)}
    assert errors["ours"] <= 1.5 * errors["peft"]
    assert errors["ours"] < 1e-4


def test_in_bf16_gradients_are_as_near_to_fp64_as_those_of_peft(tmp_path: Path) -> None:
    # the logits of few tokens have few errors to average
    base = write_tiny_base(tmp_path / "base", shipped_tokenizer("spm-v3"))
    exact, plain, ours = (model_of(base, "bf16") for _ in range(3))
    use_frozen_layers(ours)
    truth = gradients(exact.double())
    assert apart(gradients(ours), truth) <= 1.2 * apart(gradients(plain), truth)


@pytest.mark.parametrize(
    ("settings", "replaced"),
    [
        ({}, {"_FrozenLoraLinear": 8, "_FrozenMlp": 2}),
        ({"target_modules": ("up_proj",)}, {"_FrozenLoraLinear": 2}),
        ({"modules_to_save": ("lm_head",)}, {"_FrozenLoraLinear": 8, "_FrozenMlp": 2}),
    ],
)
def test_layers_of_frozen_matrices_are_replaced_and_no_others(
    settings: dict[str, Any], replaced: dict[str, int], base: Path
) -> None:
    model = model_of(base, **settings)
    names = set(model.state_dict())
    use_frozen_layers(model)
    kinds = [type(one).__name__ for one in model.modules() if type(one).__module__ == frozen.__name__]
    assert {kind: kinds.count(kind) for kind in kinds} == replaced
    assert set(model.state_dict()) == names
    assert all(isinstance(one, lora.Linear | MistralMLP) for one in model.modules() if type(one).__name__ in replaced)


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def two_adapters(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    move_away(model)


@pytest.mark.parametrize("change", [merged, disabled, two_adapters])
def test_an_adapter_in_another_state_is_left_to_peft(change: Callable[[Any], None], base: Path) -> None:
    plain, ours = model_of(base), model_of(base)
    use_frozen_layers(ours)
    for model in (plain, ours):
        torch.manual_seed(0)
        change(model)
    # with autograd: without it, PEFT's own forward pass would be taken anyway
    logits = [model(input_ids=IDS).logits for model in (plain, ours)]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"dora": True}])
def test_a_variant_of_lora_is_left_to_peft(settings: dict[str, Any], base: Path) -> None:
    plain, ours = model_of(base, **settings), model_of(base, **settings)
    use_frozen_layers(ours)
    found = []
    for model in (plain, ours):
        torch.manual_seed(7)
        found.append(gradients(model.train()))
    assert apart(*found) < 1e-4


def test_what_has_no_backward_pass_is_left_as_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = model_of(base), model_of(base)
    use_frozen_layers(ours)
    for name in ("_LoraProduct", "_MlpProduct"):
        monkeypatch.setattr(frozen, name, None)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_less_is_kept_for_the_backward_pass(base: Path) -> None:
    kept = []
    for use in (False, True):
        model = model_of(base)
        if use:
            use_frozen_layers(model)
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        found: dict[int, int] = {}

        def note(one: torch.Tensor, found: dict[int, int] = found, weights: set[int] = weights) -> torch.Tensor:
            place = one.untyped_storage().data_ptr()
            if place not in weights:
                found[place] = one.untyped_storage().nbytes()
            return one

        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
            model(input_ids=IDS, labels=IDS)
        kept.append(sum(found.values()))
    model = model_of(base)
    layers, width = model.config.num_hidden_layers, model.config.intermediate_size
    assert kept[1] <= kept[0] - 4 * layers * IDS.numel() * width
    assert adapter_tensors(model)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that is taken for one of a GPU, so that the choice of the passes can be seen anywhere."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 7, 128, dtype=torch.bfloat16).as_subclass(kind) for kind in (torch.Tensor, OnCuda)]
)
@pytest.mark.parametrize("autocasts", [None, torch.bfloat16, torch.float16])
def test_autocast_of_the_device_decides(
    x: torch.Tensor, autocasts: torch.dtype | None, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(base, "bf16")
    use_frozen_layers(model)
    kind = x.device.type
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == kind and autocasts is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocasts if device == kind else None)
    run: list[str] = []
    for name in ("_LoraProduct", "_MlpProduct"):
        product = SimpleNamespace(apply=lambda x, *given, name=name: run.append(name) or x)
        monkeypatch.setattr(frozen, name, product)
    block = model.get_submodule("base_model.model.model.layers.0")
    with suppress(RuntimeError):  # of PEFT's own passes, without the autocast that is pretended
        block.mlp(x)
    with suppress(RuntimeError):
        block.self_attn.q_proj(x)
    # without autocast, PEFT casts the input to the dtype of the adapter
    expected = {None: ["_MlpProduct"], torch.bfloat16: ["_MlpProduct", "_LoraProduct"], torch.float16: []}
    assert run == expected[autocasts]


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.5}, {"rslora": True, "target_modules": "all-linear"}])
def test_without_pefts_cast_a_step_under_autocast_is_equal_bit_for_bit(settings: dict[str, Any], base: Path) -> None:
    found = []
    for is_left_out in (False, True):
        model = model_of(base, "bf16", **settings).train()
        torch.manual_seed(7)
        with disable_input_dtype_casting(model, active=is_left_out):
            found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("settings", "dtype"), [({"dropout": 0.1}, torch.bfloat16), ({"dora": True, "dropout": 0.1}, torch.float32)]
)
def test_a_trainer_leaves_pefts_cast_out_of_its_passes_alone(
    settings: dict[str, Any], dtype: torch.dtype, make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    """DoRA takes the norm of each output in the dtype of its input."""
    recipe = make_recipe(training={"steps": 2, "precision": "bf16"}, lora=settings)
    trainer = trainer_of(recipe, base, tmp_path, lambda model: model.bfloat16())
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    dtypes: list[torch.dtype] = []
    layer.lora_dropout["default"].register_forward_pre_hook(lambda module, given: dtypes.append(given[0].dtype))
    trainer.train()
    trainer.evaluate(RowDataset(trainer.train_dataset.encoded))
    assert {*dtypes} == {dtype}
    assert layer.cast_input_dtype_enabled
