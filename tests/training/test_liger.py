"""Liger's kernels in the layers of one model: a stand-in computes what they promise, since they run on a GPU alone."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from class_models import Case, gradients, step_rows
from tiny_runs import MakeRecipe, trainer_of
from transformers.models.mistral import modeling_mistral

from pytest_mistral_lora.errors import MachineError
from pytest_mistral_lora.training.step import liger
from pytest_mistral_lora.training.step.forward import attend_in_segments, supervised_losses
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.liger import use_liger

LAYERS = 2


def rms_norm(x: Any, weight: Any, eps: float, offset: float, casting: str, in_place: bool) -> torch.Tensor:
    assert (offset, casting, in_place) == (0.0, "llama", False)
    wide = x.float()
    return (wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(q: Any, k: Any, cos: Any, sin: Any, position_ids: None, unsqueeze_dim: int) -> tuple[torch.Tensor, ...]:
    """Rotate by complex numbers: Liger reads the first half of the angles, and the second half repeats them."""
    assert (position_ids, unsqueeze_dim) == (None, 1)
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[:, None, :, :half], sin[:, None, :, :half])

    def rotated(heads: Any) -> torch.Tensor:
        turned = torch.complex(heads[..., :half], heads[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    return rotated(q), rotated(k)


def silu_mul(gate: Any, up: Any) -> torch.Tensor:
    return gate * torch.sigmoid(gate) * up


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Stand-ins for the three modules of liger-kernel, and how often each was called."""
    found: Counter[str] = Counter()
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    for name, function, compute in (
        ("rms_norm", "LigerRMSNormFunction", rms_norm),
        ("rope", "LigerRopeFunction", rope),
        ("swiglu", "LigerSiLUMulFunction", silu_mul),
    ):

        def apply(*given: Any, name: str = name, compute: Any = compute) -> Any:
            found[name] += 1
            return compute(*given)

        module: Any = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, function, type(function, (), {"apply": staticmethod(apply)}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = supervised_losses(model, step_rows())[0].mean()
    return loss.item(), gradients(loss, model)


# norms, rotary embeddings and MLPs of a pass through two layers, and the last norm
ALL = {"rms_norm": 2 * LAYERS + 1, "rope": LAYERS}
MLP = {"swiglu": LAYERS}
COVERED = {
    Case("mistral"): ALL,
    Case("mistral", with_mlp=True): ALL | MLP,
    Case("ministral", with_mlp=True): ALL | MLP,
    Case("ministral3", tied=True, with_mlp=True): ALL | MLP,
    Case("mixtral"): ALL,
    Case("llama", with_mlp=True): ALL | MLP,
    Case("qwen2", with_mlp=True): ALL | MLP,
    # a norm of the queries, and one of the keys
    Case("qwen3", with_mlp=True): ALL | MLP | {"rms_norm": 4 * LAYERS + 1},
    # a norm of each latent state; the rotary embedding is interleaved, which Liger has not, and the MLP is experts
    Case("mistral4"): {"rms_norm": 4 * LAYERS + 1},
    Case("mistral", wrapped=True, with_mlp=True): ALL | MLP,
    Case("ministral3", wrapped=True): ALL,
    Case("mistral4", wrapped=True): {"rms_norm": 4 * LAYERS + 1},
}


@pytest.mark.parametrize("case", COVERED, ids=lambda case: f"{case}{'-mlp' * case.with_mlp}")
def test_the_step_of_each_class_is_equal_with_each_kernel_that_it_can_have(case: Case, calls: Counter[str]) -> None:
    plain = case.model()
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        attend_in_segments(model)
        use_frozen_layers(model)
    names = [name for name, _ in fused.named_parameters()]
    use_liger(fused)
    assert [name for name, _ in fused.named_parameters()] == names
    exact, truth = loss_and_gradients(plain)
    assert calls == {}
    loss, found = loss_and_gradients(fused)
    assert calls == COVERED[case]
    assert loss == pytest.approx(exact, rel=1e-7)  # norms are computed in float32, in any model
    for name, gradient in truth.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_answers_are_equal_with_a_cache(calls: Counter[str]) -> None:
    """Generation passes the cache on through the decorators of transformers."""
    model = Case("ministral", with_mlp=True).model()
    ids = torch.arange(3, 12)[None]
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    use_liger(model)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert calls["rope"] == 5 * LAYERS
    assert found.tolist() == wanted.tolist()


def test_other_models_of_the_process_keep_their_layers(calls: Counter[str]) -> None:
    before = [(name, one) for name, one in vars(modeling_mistral).items() if inspect.isclass(one) or callable(one)]
    passes = {name: one.forward for name, one in before if hasattr(one, "forward")}
    other = Case("mistral", with_mlp=True).model()
    model = copy.deepcopy(other)
    use_liger(model)
    use_liger(model)  # again, as a second trainer of the same model would
    assert [(name, getattr(modeling_mistral, name)) for name, _ in before] == before
    assert {name: getattr(modeling_mistral, name).forward for name in passes} == passes
    attend_in_segments(other)
    loss_and_gradients(other)
    later = Case("mistral", with_mlp=True).model()
    attend_in_segments(later)
    loss_and_gradients(later)
    assert calls == {}


@pytest.mark.parametrize("training", [{}, {"activation_checkpointing": True}])
def test_a_run_has_the_kernels_and_the_losses_of_one_without(
    training: dict[str, Any], calls: Counter[str], make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    losses = []
    for kernels in ({}, {"kernels": "liger"}):
        settings = {"steps": 3, "logging_steps": 1, "dry_run": False, **training, **kernels}
        recipe = make_recipe(training=settings, lora={"target_modules": ["q_proj", "up_proj"]})
        trainer = trainer_of(recipe, base, tmp_path)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    passes = 6 if training else 3
    assert calls == {"rms_norm": 2 * LAYERS * passes + 3, "rope": LAYERS * passes, "swiglu": LAYERS * passes}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_mlp_of_frozen_matrices_keeps_the_pass_that_keeps_less(calls: Counter[str]) -> None:
    model = Case("mistral").model()
    use_frozen_layers(model)
    frozen = {name: type(one) for name, one in model.named_modules() if name.endswith(".mlp")}
    use_liger(model)
    assert {name: type(model.get_submodule(name)) for name in frozen} == frozen


def test_a_norm_that_is_trained_in_full_gets_its_gradient(calls: Counter[str]) -> None:
    """Its weight is float32 beside a base in bf16: transformers returns the wider of the two, and Liger would not."""
    model = Case("mistral").model()
    use_liger(model)
    norm = model.get_base_model().model.norm
    x = torch.randn(1, 3, norm.weight.shape[0], dtype=torch.bfloat16)
    norm.float()
    assert norm(x).dtype == torch.float32
    assert calls == {}
    norm.to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert calls == {"rms_norm": 1}


def test_a_model_without_a_norm_that_liger_has_is_refused(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "has_code_of", lambda function, known: False)
    with pytest.raises(MachineError, match=r"training\.kernels.*computes norms otherwise"):
        use_liger(Case("mistral").model())
