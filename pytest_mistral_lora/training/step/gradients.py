"""How large the gradients are, over all of a model's shards."""

from __future__ import annotations

from typing import Any

import torch

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
