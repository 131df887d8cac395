"""Liger's kernels for the norms, the rotary embedding and the gated MLPs of one model, on a GPU.

Each layer of the model gets a subclass of its class. Liger's own function replaces classes and functions of
transformers' modules, for every model of the process, and only for some classes of models.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import CellType, FunctionType
from typing import Any, cast

import torch
from transformers.models.mistral import modeling_mistral

from pytest_mistral_lora.errors import MachineError
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.training.step.frozen_layers import has_code_of, is_gated_mlp

_ROTARY = "apply_rotary_pos_emb"


def use_liger(model: Any) -> None:
    """Let the layers of a model run Liger's kernels if they compute what Mistral's layers do, of any class.

    Call it after `use_frozen_layers`, whose MLPs keep less than Liger's: they stay.

    Args:
        model: The base model with its adapter, on a GPU.

    Raises:
        MachineError: If this version of transformers has no norm for them.
    """
    for module in model.modules():
        kind: Any = type(module)
        if has_code_of(kind.forward, modeling_mistral.MistralRMSNorm.forward):
            module.__class__ = _with_base(_LigerNorm, kind)
        elif is_gated_mlp(module):
            module.__class__ = _with_base(_LigerMlp, kind)
        elif has_code_of(_rotary_of(kind.forward), _rotary_of(modeling_mistral.MistralAttention.forward)):
            module.__class__ = _with_liger_rotary(kind)
    if not any(isinstance(module, _LigerNorm) for module in model.modules()):
        raise MachineError(
            "this version of transformers computes norms otherwise than Liger",
            place=NOWHERE.within("training", "kernels"),
            expected="the norm of Mistral and Llama",
            next_step="Leave kernels out.",
        )


@cache
def _with_base(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})


class _LigerNorm:
    """An RMS norm of transformers; mixed into its class."""

    weight: Any
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the norm, `(..., hidden size)`, in the dtype of `hidden_states`."""
        if hidden_states.dtype != self.weight.dtype:  # transformers returns the wider of the two
            plain: torch.Tensor = cast(Any, super()).forward(hidden_states)
            return plain
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # not in place: the gradient that autograd passes in may have another reader
        given = (hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)
        normed: torch.Tensor = LigerRMSNormFunction.apply(*given)
        return normed


class _LigerMlp:
    """An MLP of transformers whose matrices are adapted or quantised; mixed into its class."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`, `(..., hidden size)`."""
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        product: torch.Tensor = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
        return product


def _rotary_of(forward: Any) -> Any:
    """Return the function of a module of transformers that an attention layer's pass rotates with; None without."""
    inner: Any = inspect.unwrap(forward)
    code = getattr(inner, "__code__", None)
    rotary: Any = inner.__globals__.get(_ROTARY) if code is not None and _ROTARY in code.co_names else None
    # the package kernels, which transformers 5.25 requires, makes a module of the function, which its pass calls
    is_module = isinstance(rotary, torch.nn.Module)
    return inspect.getclosurevars(type(rotary).forward).nonlocals.get("func") if is_module else rotary


@cache
def _with_liger_rotary(kind: Any) -> type:
    return type(kind.__name__, (kind,), {"forward": _rotating(kind.forward)})


def _rotating(forward: Any) -> Any:
    """Return a copy of an attention layer's pass, and of its decorators, that finds Liger's function by the name."""
    inner = getattr(forward, "__wrapped__", None)
    names, cells, attributes = forward.__globals__, forward.__closure__, {**vars(forward)}
    if inner is None:
        names = {**names, _ROTARY: _rotate}
    else:
        attributes["__wrapped__"] = copied = _rotating(inner)
        cells = tuple(CellType(copied) if cell.cell_contents is inner else cell for cell in cells)
    found = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    found.__kwdefaults__ = forward.__kwdefaults__
    vars(found).update(attributes)
    return found


def _rotate(query: Any, key: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key with rotary positions applied, `(1, heads, tokens, head size)` each."""
    from liger_kernel.ops.rope import LigerRopeFunction

    rotated: tuple[torch.Tensor, torch.Tensor] = LigerRopeFunction.apply(query, key, cos, sin, None, 1)
    return rotated
