"""The norm of the gradients: measured once a step, and read on the host together with the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeRecipe, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from pytest_mistral_lora.errors import NonFiniteError

STEPS = 3


class HostReads(TorchDispatchMode):
    """Counts how often the host reads numbers that a device computes: losses, norms, scales, and comparisons of them.

    Ids, lengths and counts are integers, and are on the host from the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.see(args[0])
        return function(*args, **(kwargs or {}))

    def see(self, tensor: torch.Tensor) -> None:
        self.count += tensor.is_floating_point() or tensor.dtype == torch.bool


class Between(TrainerCallback):
    """What is counted from the start of each step to just before the optimizer."""

    def __init__(self, counts: Callable[[], tuple[int, ...]]) -> None:
        self.counts, self.steps = counts, list[tuple[int, ...]]()
        self.begin: tuple[int, ...] = ()

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self.begin = self.counts()

    def on_pre_optimizer_step(self, *given: Any, **named: Any) -> None:
        self.steps.append(tuple(now - before for now, before in zip(self.counts(), self.begin, strict=True)))


@pytest.mark.parametrize(
    "training",
    [{}, {"max_grad_norm": 1e-3}, {"stop_at_grad_norm": 1e9}, {"max_grad_norm": 0, "stop_at_grad_norm": 1e9}],
)
def test_a_step_measures_one_norm_and_reads_once(
    training: dict[str, Any],
    make_recipe: MakeRecipe,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the look at each layer of the first step is no part of a step
    settings = {"steps": STEPS, "micro_batch_tokens": 30, "logging_steps": 1000, "dry_run": False, **training}
    trainer = trainer_of(make_recipe(training=settings), base, tmp_path)
    norms, reads = list[Any](), HostReads()
    for module, name in ((torch.nn.utils, "get_total_norm"), (torch.nn.utils.clip_grad, "_get_total_norm")):
        measure = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, measure=measure, **named: norms.append(1) or measure(*given, **named)
        )
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.see(tensor) or to_list(tensor))
    between = Between(lambda: (len(norms), reads.count))
    trainer.add_callback(between)
    with reads:
        trainer.train()
    assert between.steps == [(1, 1)] * STEPS
    assert trainer.gradient_norm > 1


def test_the_norm_is_of_the_gradients_before_they_are_scaled_down(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 2, "max_grad_norm": 0.25}), base, tmp_path)
    found = []

    class Measure(TrainerCallback):
        def on_pre_optimizer_step(self, *given: Any, model: Any = None, **named: Any) -> None:
            gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
            found.append((trainer.gradient_norm, torch.cat(gradients).norm().item()))

    trainer.add_callback(Measure())
    trainer.train()
    for before, after in found:
        assert before > 1
        assert after == pytest.approx(0.25, rel=1e-4)


@pytest.fixture
def scaled(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Make a trainer with fp16's scaler, which takes its scale out of the gradients as accelerate does on a GPU."""

    def make(scale: float | None, **training: Any) -> Any:
        settings = {"steps": STEPS, "logging_steps": 1, **training}
        trainer = trainer_of(make_recipe(training=settings), base, tmp_path)
        trainer.args.optim = "adamw_torch"
        if scale is not None:
            scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
        return trainer

    return make


def test_the_scale_of_fp16_is_in_no_norm(scaled: Callable[..., Any]) -> None:
    norms, weights = [], []
    for scale in (None, 1024.0):
        trainer = scaled(scale, max_grad_norm=0.5, stop_at_grad_norm=50.0)
        trainer.train()
        norms.append([line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line])
        weights.append([one.detach().clone() for one in trainer.model.parameters() if one.requires_grad])
    assert len(norms[0]) == STEPS
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_the_bound_holds_under_the_scale_of_fp16(scaled: Callable[..., Any]) -> None:
    with pytest.raises(NonFiniteError, match=r"norm is [1-9]\.\d+ at step 1"):
        scaled(1024.0, stop_at_grad_norm=0.5).train()
