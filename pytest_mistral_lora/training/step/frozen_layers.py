"""Hand-written forward and backward passes of layers around frozen weights, on any device.

Autograd keeps the input of a product for the gradient of its weight, which a frozen weight never gets.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
from peft.tuners import lora
from torch.nn.functional import silu
from transformers.activations import ACT2FN
from transformers.models.mistral.modeling_mistral import MistralMLP

_SILU = (type(ACT2FN["silu"]), torch.nn.SiLU)
_MATRICES = ("gate_proj", "up_proj", "down_proj")


def use_frozen_layers(model: Any) -> None:
    """Let a model's LoRA layers and MLPs run the passes of this module if their base weights are frozen and plain.

    The layers keep their parameters, names and state; every other layer, and every call that these passes do not
    support (merged or several adapters, dropout, DoRA), runs the code of PEFT and transformers.

    Args:
        model: The base model with its adapter. DeepSpeed must not have sharded it: DeepSpeed gathers a module's weights
            when that module is called, and here its parent reads them.
    """
    for module in model.modules():
        # The class is swapped in place. A new module would have to take over hooks, parameters' identities (the
        # optimizer's keys), PEFT's registries and names in checkpoints; these subclasses only add a `forward`.
        if type(module) is lora.Linear and _is_frozen(module.base_layer):
            module.__class__ = _FrozenLoraLinear
        elif is_gated_mlp(module) and all(_is_frozen(module.get_submodule(name)) for name in _MATRICES):
            module.__class__ = _frozen_mlp(module.__class__)


def _is_frozen(module: Any) -> bool:
    # the exact type: adapters, 4-bit layers and hooks by subclass compute something else
    return type(module) is torch.nn.Linear and module.bias is None and not module.weight.requires_grad


def is_gated_mlp(module: Any) -> bool:
    """Report whether a module is `down(silu(gate(x)) * up(x))` and nothing else, of any class.

    transformers writes the same forward pass into each class of models; a class that computes more has other code.
    """
    parts = dict(module.named_children())
    return (
        has_code_of(type(module).forward, MistralMLP.forward)
        and parts.keys() == {*_MATRICES, "act_fn"}
        and type(parts["act_fn"]) in _SILU
    )


def has_code_of(function: Any, known: Any) -> bool:
    """Report whether a function computes what a known one does, by the same instructions; decorators do not count."""
    computed, wanted = (_instructions(one) for one in (function, known))
    return computed is not None and computed == wanted


def _instructions(function: Any) -> tuple[Any, ...] | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    # a docstring is a constant, too
    return code and (code.co_code, code.co_names, [one for one in code.co_consts if not isinstance(one, str)])


def _autocasts(x: torch.Tensor) -> bool:
    """Report whether autocast is on for the device of a tensor; `meta` has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _is_cast_free(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Report whether a product with this weight stays in its dtype: autocast may choose another dtype."""
    other = _autocasts(x) and torch.get_autocast_dtype(x.device.type) != weight.dtype
    return x.dtype == weight.dtype and not other


class _FrozenLoraLinear(lora.Linear):
    """PEFT's layer, as one autograd function if a single plain adapter is active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's, `(..., out_features)`, in the dtype of `x`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        name = active[0] if len(active) == 1 and not args and not kwargs else None
        # whether PEFT would compute just `x W' + scaling * x A' B'`, in the dtype of x
        if (
            name is not None
            and torch.is_grad_enabled()
            and not self.disable_adapters
            and not self.merged
            and isinstance(self.lora_dropout[name], torch.nn.Identity)
            and name not in self.lora_variant  # such as DoRA
            and not self.lora_bias[name]
            # without autocast, PEFT casts x to the dtype of A
            and (x.dtype == self.lora_A[name].weight.dtype or _autocasts(x))
            and _is_cast_free(x, self.base_layer.weight)
        ):
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            product: Any = _LoraProduct
            output: torch.Tensor = product.apply(x.flatten(0, -2), self.base_layer.weight, a, b, self.scaling[name])
            return output.view(*x.shape[:-1], -1)
        plain: torch.Tensor = super().forward(x, *args, **kwargs)
        return plain


class _LoraProduct(torch.autograd.Function):
    """`y = x W' + s * h B'` with `h = x A'`: x (tokens, in), W (out, in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scaling: float) -> Any:
        ctx.scaling, ctx.dtype = scaling, a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        lora_hidden = x @ a.T
        ctx.save_for_backward(x, weight, a, b, lora_hidden)
        return (x @ weight.T).addmm_(lora_hidden, b.T, alpha=scaling)

    # dh = s * dy B     dx = dy W + dh A     dA = dh' x     dB = s * dy' h     (W is frozen: no dW)
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, lora_hidden = ctx.saved_tensors
        grad_output = grad_outputs[0]
        grad_hidden = (grad_output @ b).mul_(ctx.scaling)
        # the first layer's input needs no gradient: embeddings are frozen
        grad_x = (grad_output @ weight).addmm_(grad_hidden, a) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = (grad_hidden.T @ x).to(ctx.dtype), (grad_output.T @ lora_hidden).to(ctx.dtype)
        return grad_x, None, grad_a, grad_b.mul_(ctx.scaling), None


class _FrozenMlp:
    """An MLP of transformers, as one autograd function; mixed into the class of the MLP."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`, `(..., hidden size)`."""
        if not torch.is_grad_enabled() or not _is_cast_free(x, self.gate_proj.weight):
            plain: torch.Tensor = cast(Any, super()).forward(x)  # of the class that it is mixed into
            return plain
        product: Any = _MlpProduct
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        output: torch.Tensor = product.apply(x.flatten(0, -2), *weights)
        return output.view(*x.shape[:-1], -1)


@cache
def _frozen_mlp(kind: type) -> type:
    return type(_FrozenMlp.__name__, (_FrozenMlp, kind), {})


class _MlpProduct(torch.autograd.Function):
    """`y = (silu(g) * u) D'` with `g = x G'` and `u = x U'`: only g and u are kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate_weight: Any, up_weight: Any, down_weight: Any) -> Any:
        gate, up = x @ gate_weight.T, x @ up_weight.T
        ctx.save_for_backward(gate, up, gate_weight, up_weight, down_weight)
        return silu(gate).mul_(up) @ down_weight.T

    # With m = silu(g) * u:  dm = dy D     du = dm * silu(g)     dg = dm * u * silu'(g)     dx = du U + dg G
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        grad_product = grad_outputs[0] @ down_weight
        grad_x = silu(gate).mul_(grad_product) @ up_weight
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_x.addmm_(grad_gate, gate_weight), None, None, None
