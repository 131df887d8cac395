"""Faster kernels in place of the model's own: the same mathematics, on a GPU."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.training.recipe import Training


def apply_kernels(model: Any, training: Training) -> None:
    """Put the recipe's kernels into a loaded base model, before its adapter.

    The rotary embedding is a function of transformers' module: it stays replaced for the rest of the process.
    """
    if training.kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_mistral

        # the loss is the trainer's own: Liger's would replace the model's forward pass
        apply_liger_kernel_to_mistral(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )
