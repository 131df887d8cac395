"""Layers around frozen weights, on a CPU, with a backward pass of their own: the same mathematics, fewer copies.

What autograd would keep and PEFT would cast for the sake of weights that do not learn is neither kept nor cast, and
LoRA's share is added by the matrix product itself. A layer that is anything else than plain LoRA on a plain matrix is
left as it is, and so is every pass that has no backward pass: generation, and the held-out loss.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch.nn.functional import silu
from transformers.models.mistral.modeling_mistral import MistralMLP


def use_frozen_layers(model: Any) -> None:
    """Let a model's LoRA layers and MLPs compute as this module does, where they can; nothing else of them changes.

    Args:
        model: The base model with its adapter. DeepSpeed must not have divided it: it gathers the weights of a module
            when that module is called, and here they are read.
    """
    for module in model.modules():
        if type(module) is lora.Linear and _is_frozen(module.base_layer):
            module.__class__ = _LoraLinear
        elif (
            type(module) is MistralMLP
            and module.config.hidden_act == "silu"
            and all(map(_is_frozen, _matrices(module)))
        ):
            module.__class__ = _Mlp


def _is_frozen(module: Any) -> bool:
    return type(module) is torch.nn.Linear and module.bias is None and not module.weight.requires_grad


def _matrices(mlp: Any) -> tuple[Any, Any, Any]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _multiplied_in(weight: torch.Tensor) -> torch.dtype | None:
    """Return the dtype in which a weight is multiplied without a cast; None where autocast would make another of it."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype:
        return None
    return weight.dtype


class _LoraLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's layer, as one autograd function where a single plain adapter is at work."""

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's, `(..., out_features)`, in the dtype of `x`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if given or named or len(active) != 1 or not self._is_plain(active[0], x.dtype):
            output: torch.Tensor = super().forward(x, *given, **named)
            return output
        a, b = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        product: Any = _LoraProduct
        output = product.apply(x.flatten(0, -2), self.base_layer.weight, a, b, self.scaling[active[0]])
        return output.view(*x.shape[:-1], -1)

    def _is_plain(self, name: str, dtype: torch.dtype) -> bool:
        """Say whether PEFT would compute `x W' + scaling * x A' B'` in this dtype, and no more."""
        at_work = torch.is_grad_enabled() and not self.disable_adapters and not self.merged
        plain = isinstance(self.lora_dropout[name], torch.nn.Identity) and name not in self.lora_variant
        alike = dtype == self.lora_A[name].weight.dtype or torch.is_autocast_enabled("cpu")
        return (
            at_work and plain and alike and not self.lora_bias[name] and dtype == _multiplied_in(self.base_layer.weight)
        )


class _LoraProduct(torch.autograd.Function):
    """`x W' + scaling * x A' B'`: `x` (tokens, in), W (out, in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scaling: float) -> Any:
        ctx.scaling, ctx.dtype = scaling, a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        narrow = x @ a.T
        ctx.save_for_backward(x, weight, a, b, narrow)
        return (x @ weight.T).addmm_(narrow, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, narrow = ctx.saved_tensors
        slope = upstream[0]
        of_narrow = (slope @ b).mul_(ctx.scaling)
        of_x = (slope @ weight).addmm_(of_narrow, a) if ctx.needs_input_grad[0] else None
        of_a, of_b = (of_narrow.T @ x).to(ctx.dtype), (slope.T @ narrow).to(ctx.dtype)
        return of_x, None, of_a, of_b.mul_(ctx.scaling), None


class _Mlp(MistralMLP):  # type: ignore[misc]
    """transformers' MLP, as one autograd function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`, `(..., hidden size)`."""
        if not torch.is_grad_enabled() or x.dtype != _multiplied_in(self.gate_proj.weight):
            output: torch.Tensor = super().forward(x)
            return output
        product: Any = _MlpProduct
        output = product.apply(x.flatten(0, -2), *(one.weight for one in _matrices(self)))
        return output.view(*x.shape[:-1], -1)


class _MlpProduct(torch.autograd.Function):
    """`(silu(x G') * x U') D'`; of what is computed, `x G'` and `x U'` are kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate: Any, up: Any, down: Any) -> Any:
        gated, upward = x @ gate.T, x @ up.T
        ctx.save_for_backward(gated, upward, gate, up, down)
        return silu(gated).mul_(upward) @ down.T

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        gated, upward, gate, up, down = ctx.saved_tensors
        slope = upstream[0] @ down
        of_x = silu(gated).mul_(slope) @ up
        of_gated = torch.ops.aten.silu_backward(slope.mul_(upward), gated)
        return of_x.addmm_(of_gated, gate), None, None, None
