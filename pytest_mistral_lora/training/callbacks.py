"""What the loop calls at each step: the stop at non-finite gradients, and the lines of the log."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.errors import NonFiniteError, TrainingError

_FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate")


class StopAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Refuse an optimizer step whose gradients are not finite: the adapter stays as it was."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check every gradient.

        Raises:
            NonFiniteError: If one holds NaN or infinity.
            TrainingError: If there is none.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            raise TrainingError(f"no tensor has a gradient at step {state.global_step + 1}")
        if not torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()):
            raise NonFiniteError(
                f"a gradient is not finite at step {state.global_step + 1}",
                next_step="Nothing is saved. Lower training.learning_rate, or use precision: fp32.",
            )


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Write a line to standard error for each line of the log: for CI and log files, where a bar is of no use."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the step and its figures; one process of a distributed run writes."""
        figures = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if name in _FIGURES]
        if figures and state.is_world_process_zero:
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}: {', '.join(figures)}\n")
            sys.stderr.flush()
