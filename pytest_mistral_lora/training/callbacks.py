"""How large the gradients are, over all of a model's shards."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.errors import NonFiniteError, TrainingError
from pytest_mistral_lora.training.devices import engine


def gradient_norm(model: Any) -> float:
    """Return the L2 norm of all gradients of a model together; 0 where there is none.

    Args:
        model: The model, as it is wrapped. DeepSpeed keeps its gradients to itself, and tells the norm of its step.
    """
    if engine() == "deepspeed":
        return float(model.get_global_grad_norm())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # of sharded gradients, each process has a part of the sum
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


_LOG = logging.getLogger(__name__)
FORMAT = "eval_format/"
"""How the names of format rates begin in the log."""
_FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate")


class StopAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Refuse an optimizer step whose gradients are not finite: the adapter stays as it was.

    Where a gradient scaler skips such a step, `OverflowWatch` decides.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Check every gradient.

        DeepSpeed keeps them to itself and has made its step already: there, LoraTrainer looks at their norm.

        Raises:
            NonFiniteError: If one holds NaN or infinity.
            TrainingError: If there is none.
        """
        if engine() == "deepspeed":
            return
        if all(parameter.grad is None for parameter in model.parameters()):
            raise TrainingError(f"no tensor has a gradient at step {state.global_step + 1}")
        if _scaler(optimizer) is None and not math.isfinite(gradient_norm(model)):
            raise gradient_error(state.global_step + 1)


def gradient_error(step: int) -> NonFiniteError:
    """Return the error for a gradient that holds NaN or infinity."""
    return NonFiniteError(
        f"a gradient is not finite at step {step}",
        next_step="Nothing is saved. Lower training.learning_rate, or use precision: fp32.",
    )


class OverflowWatch(TrainerCallback):  # type: ignore[misc]
    """Note each step that a gradient scaler skips because fp16 overflowed, and stop after a run of them.

    A note is a line of the Trainer's log, with `step` and the `loss_scale` that was too large; so checkpoints keep it.

    Args:
        most: Skipped steps, one after another, that stop the run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._scale = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note the scale; a scaler lowers it where it skips the step."""
        scaler = _scaler(optimizer)
        self._scale = scaler.get_scale() if scaler is not None else 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Look whether the step was skipped.

        Raises:
            TrainingError: If it was, and as many before it as the recipe allows.
        """
        scaler = _scaler(optimizer)
        if scaler is None or scaler.get_scale() >= self._scale:
            return
        step = state.global_step + 1
        state.log_history.append({"step": step, "loss_scale": self._scale})
        _LOG.warning("step %d overflowed in fp16 and was skipped; the loss scale was %g", step, self._scale)
        skipped = set(skipped_steps(state.log_history))
        if skipped.issuperset(range(step - self._most + 1, step + 1)):
            raise TrainingError(
                f"{self._most} steps one after another overflowed in fp16, the last is step {step}",
                next_step="Nothing is saved. Use precision: bf16 or fp32, or lower training.learning_rate.",
            )


def skipped_steps(log: Sequence[Any]) -> list[int]:
    """Return the optimizer steps that were skipped because fp16 overflowed, of a Trainer's log."""
    return [line["step"] for line in log if "loss_scale" in line]


def _scaler(optimizer: Any) -> Any:
    """Return the gradient scaler that accelerate put around an optimizer, or None."""
    return getattr(optimizer, "scaler", None)


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Write a line to standard error for each line of the log: for CI and log files, where a bar is of no use."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the step and its figures; one process of a distributed run writes."""
        figures = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if _is_shown(name)]
        if figures and state.is_world_process_zero:
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}: {', '.join(figures)}\n")
            sys.stderr.flush()


def _is_shown(name: str) -> bool:
    return name in _FIGURES or name.startswith(FORMAT)


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc]
    """Measure the held-out loss of the last step inside the loop, where loggers still listen."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation if this is the last step."""
        if control.should_training_stop:
            control.should_evaluate = True


class DryRun(TrainerCallback):  # type: ignore[misc]
    """Tries the largest possible micro-batch before the first step, so that a run fails at once and not after hours."""

    def __init__(self, trainer: Any) -> None:
        """Make it for a trainer."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the pass; weights, gradients and random state are as before.

        Raises:
            MemoryShortageError: If there is not enough memory for it.
        """
        # DeepSpeed's engine would take the gradient for that of a step
        if engine() != "deepspeed":
            self._trainer.try_largest()
