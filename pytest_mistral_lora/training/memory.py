"""The memory that a recipe needs, from its base's configuration alone, and the settings that would need less."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.devices import Precision, torch_dtype
from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.training.adapter import lora_config, without_weights
from pytest_mistral_lora.training.devices import device_of, engine, memory_limit, on_gpu, precision_of
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.step.attention_cpu import BLOCK
from pytest_mistral_lora.training.step.forward import flash_takes
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.memory_need import (
    MemoryNeed,
    MemorySaving,
    in_words,
    measure_need,
    memory_savings,
)

_SPARE = 0.06
"""Share of a GPU that PyTorch does not give to tensors: the CUDA context, kernels, and gaps between tensors."""

Kernel = Literal["packed", "rows", "blocks"]
"""A kernel of attention: for packed rows (FlashAttention), for one row after the other (SDPA), or a CPU's blocks."""

_BLOCKS_AT_ONCE = 5
"""Blocks of scores that are alive at a time on a CPU: the probabilities of a block, their gradients and those of the
scores, while the scores and probabilities of the next block are made."""

_EIGHT_BITS = 10 / 16
"""Bytes of a trained value with moments in 8 bits, beside those with moments in float32."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, *, place: Place | str) -> int:
    """Return a size in bytes: `80GB`, `24GiB`, `500 MB`.

    Raises:
        InputError: If the text is not a size, or the size is zero; with the place.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?i?)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise InputError(repr(text[:40]), place=place, expected="a size, such as 80GB or 24GiB")
    return size


class _AttentionNeed(torch.autograd.Function):
    """Attention without values: in each pass it has as many bytes as a device's kernel."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, kernel: Kernel) -> Any:
        heads, tokens = query.shape[1:3]
        output = query.new_empty(1, tokens, heads, value.shape[3])
        wide = _wide(query)
        if kernel == "blocks":
            kept = [tensor.to(wide, copy=True) for tensor in (query, key, value)]
        else:
            # of its own, a float32 for each query and head
            kept = [query, key, value, output, query.new_empty(heads, tokens, dtype=torch.float32)]
        ctx.save_for_backward(*kept)
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in (query, key, value)]
        ctx.kernel, ctx.wide = kernel, wide
        # the outputs of the rows are joined in new memory
        return output.clone() if kernel == "rows" else output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad_output,) = grad_outputs
        if ctx.kernel == "blocks":
            # the gradients of keys and values come once for all rows, and once for a row
            wide = [grad_output.new_empty(shape, dtype=ctx.wide) for shape, _ in (*ctx.like, *ctx.like[1:])]
            (_, heads, tokens, _), _ = ctx.like[0]
            blocks = grad_output.new_empty(_BLOCKS_AT_ONCE, heads, BLOCK, tokens, dtype=ctx.wide)
            copy = grad_output.to(ctx.wide, copy=True)
            del blocks, copy
            return *(one.to(dtype) for one, (_, dtype) in zip(wide, ctx.like, strict=False)), None
        return *(grad_output.new_empty(shape, dtype=dtype) for shape, dtype in ctx.like), None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, *, kernel: Kernel, **settings: Any) -> Any:
    # the kernels for packed rows take heads of one size only
    if kernel == "packed" and query.shape[3] != value.shape[3]:
        kernel = "rows"
    if kernel == "rows":
        # the kernel takes as many key heads as query heads
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    need: Any = _AttentionNeed
    return need.apply(query, key, value, kernel), None


class FourBitLinear(torch.nn.Linear):
    """A linear layer that needs as much memory as bitsandbytes' layer of a frozen matrix in 4 bits, without numbers.

    It keeps nothing for the backward pass, and makes the full matrix again for each product.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the product's shape, in the dtype of the weight."""
        product: Any = _FourBitProduct
        return torch.as_tensor(product.apply(x.to(self.weight.dtype), self.weight))


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.weight = weight
        return x @ x.new_zeros(weight.shape).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad_output,) = grad_outputs
        return grad_output @ grad_output.new_zeros(ctx.weight.shape), None


def in_four_bits(model: Any) -> list[Any]:
    """Let the layers that bitsandbytes would put into 4 bits be `FourBitLinear`, and return them."""
    found = [
        module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and not module.weight.requires_grad and not name.endswith("lm_head")
    ]
    for module in found:
        module.__class__ = FourBitLinear
    return found


def _run_without_numbers(model: Any) -> None:
    """Let a model run on `meta`: rotations have no values, and each token runs through the right number of experts.

    A router's choice of experts depends on values. transformers 4 turns autocast off in a rotary embedding, which
    torch does not know for `meta`.
    """
    for module in model.modules():
        if hasattr(module, "inv_freq"):

            def rotate(x: Any, position_ids: Any, *given: Any, rotary: Any = module, **named: Any) -> Any:
                return tuple(x.new_empty(1, position_ids.shape[-1], 2 * len(rotary.inv_freq)) for _ in ("cos", "sin"))

            module.forward = rotate
        weights = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
        if weights.get("gate_up_proj") != 3 or weights.get("down_proj") != 3:
            continue

        # as transformers computes the products of all experts at once: by expert, and then in the order of the tokens
        def forward(hidden: Any, chosen: Any, weight: Any, experts: Any = module) -> Any:
            by_expert = chosen.reshape(-1)
            taken = hidden[by_expert // chosen.shape[-1]]
            gate, up = torch.nn.functional.linear(taken, experts.gate_up_proj[0]).chunk(2, dim=-1)
            down = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[0])
            in_order = (down * weight.reshape(-1)[by_expert, None])[by_expert]
            return in_order.view(len(hidden), chosen.shape[-1], -1).sum(1).to(hidden.dtype)

        module.forward = forward


def _cast_twice(model: Any) -> None:
    """Let each adapted layer have its input in float32, as PEFT does, and keep it as autocast casts it back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._cast_input_dtype = lambda x, dtype: x.float().to(dtype)


def kernel_of(precision: Precision, *, on_gpu: bool) -> Kernel:
    """Return the kernel of attention that packed rows get.

    Args:
        precision: The dtype of the base's weights.
        on_gpu: Whether the model is on a GPU.
    """
    if not on_gpu:
        return "blocks"
    if torch.cuda.is_available():
        is_taken = flash_takes(torch_dtype(precision), torch.cuda.get_device_capability())
    else:
        # fp16 is for the GPUs that the kernels for packed rows refuse
        is_taken = precision == "bf16"
    return "packed" if is_taken else "rows"


def estimate_need(
    base: BaseFolder,
    recipe: Recipe,
    layers: Sequence[str],
    precision: Precision,
    *,
    on_gpu: bool,
    kernel: Kernel | None = None,
) -> MemoryNeed:
    """Return the memory that a recipe's model needs; no weight is loaded, and nothing is computed.

    Args:
        base: The base checkpoint; only its configuration is read.
        recipe: The recipe.
        layers: The result of `planned_layers`.
        precision: The dtype of the base's weights.
        on_gpu: Whether the kernels are those of a GPU.
        kernel: The kernel of attention; default: the result of `kernel_of`.

    Raises:
        InputError: If the model computes something that depends on values, which `meta` lacks.
    """
    for one in get_args(Kernel):
        AttentionInterface.register(f"counted-{one}", partial(_attend, kernel=one))
        AttentionMaskInterface.register(f"counted-{one}", sdpa_mask)
    try:
        model = without_weights(base, lora_config(recipe.lora, layers))
        # also the adapter: autocast makes its products in the dtype of the base
        model = model.to(torch_dtype(precision)).train()
        model.set_attn_implementation(f"counted-{kernel or kernel_of(precision, on_gpu=on_gpu)}")
        _run_without_numbers(model)
        if recipe.lora.dora and precision != "fp32":
            _cast_twice(model)
        packed = in_four_bits(model) if recipe.base.quantization else []
        use_frozen_layers(model)
        need = measure_need(model, "cuda" if on_gpu else "cpu")
        need = replace(need, unpacked=max((one.weight.nbytes for one in packed), default=0))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        found = f"no estimate of memory for this base: {one_line(error)}"
        raise InputError(found, place=str(base.config_file)) from error
    if precision == "fp32":
        return need
    # each layer keeps the copies of its adapter that autocast made
    copies = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    return replace(need, plain=replace(need.plain, copies=copies))


@dataclass(frozen=True)
class RunMemory:
    """The memory that a recipe needs on one device, by an estimate.

    Attributes:
        base: The base checkpoint.
        recipe: The recipe.
        layers: The adapted layers.
        precision: The dtype of the base's weights.
        on_gpu: Whether the model is on a GPU.
        longest: Most input tokens of a row.
    """

    base: BaseFolder
    recipe: Recipe
    layers: Sequence[str]
    precision: Precision
    on_gpu: bool
    longest: int

    @cached_property
    def need(self) -> MemoryNeed:
        """The need of the parts.

        Raises:
            InputError: As for `estimate_need`.
        """
        return estimate_need(self.base, self.recipe, self.layers, self.precision, on_gpu=self.on_gpu)

    @property
    def tokens(self) -> int:
        """Most input tokens of a pass."""
        return max(self.longest, self.recipe.training.micro_batch_tokens)

    @property
    def _settings(self) -> dict[str, bool]:
        return {
            "checkpointed": self.recipe.training.activation_checkpointing,
            "nf4": self.recipe.base.quantization is not None,
        }

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part, by its name."""
        need, settings = self.need, self._settings
        base = need.total(0, **settings) - need.adapter
        moments = _EIGHT_BITS if self.recipe.training.optimizer != "adamw" else 1
        name = f"base in {self.precision}"
        if self.recipe.base.quantization:
            # embeddings, head and the experts of a mixture, which are no linear layers: most of such a base
            unquantised = 1 - need.quantisable / need.base
            name = f"base in {self.recipe.base.quantization}, {unquantised:.0%} of its weights in {self.precision}"
        return {
            name: base,
            "adapter, its gradients and the optimizer": int(need.adapter * moments),
            f"{self.tokens} tokens at once": need.total(self.tokens, **settings) - base - need.adapter,
        }

    @property
    def total(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts().values())

    def usable(self, memory: int) -> int:
        """Return the part of a device's memory that tensors can use."""
        return int(memory * (1 - _SPARE)) if self.on_gpu else memory

    def savings(self, memory: int) -> Iterator[MemorySaving]:
        """Yield the ways to need less than now, the least harmful first."""
        usable, checkpointed = self.usable(memory), self._settings["checkpointed"]
        need, training = self.need, self.recipe.training
        if self.precision == "fp32" and training.precision != "auto":
            # first, since every other way is computed in this precision
            bytes_ = replace(self, precision="bf16").need.total(self.tokens, checkpointed=checkpointed)
            yield MemorySaving("training.precision: bf16", "the base is rounded to bf16", bytes_)
        tokens, longest = self.tokens, self.longest
        for saving in memory_savings(need, usable, tokens=tokens, longest=longest, checkpointed=checkpointed):
            if not saving.setting.startswith("base.quantization"):
                yield saving
            elif not self._settings["nf4"]:
                # layers in 4 bits keep more than those with passes of their own
                base = self.recipe.base.model_copy(update={"quantization": "nf4"})
                in_nf4 = replace(self, recipe=self.recipe.model_copy(update={"base": base}))
                yield replace(saving, bytes=in_nf4.need.total(longest, checkpointed=True, nf4=True))

    def text(self, memory: int | None = None) -> str:
        """Return the estimate in lines; with the memory of a device, whether it fits, and the ways to need less."""
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in self.parts().items())
        first = f"memory: about {in_words(self.total)} ({parts})"
        if memory is None:
            return first
        usable, spare = self.usable(memory), " after what CUDA takes" if self.on_gpu else ""
        if self.total <= usable:
            return f"{first}: fits into {in_words(usable)}{spare}"
        lines = [f"{first}: does not fit into {in_words(usable)}{spare}. These settings need less:"]
        return "\n".join([*lines, *(saving.line(usable) for saving in self.savings(memory))])

    def to_json(self, memory: int) -> dict[str, Any]:
        """Return the estimate for a device as plain JSON data."""
        usable = self.usable(memory)
        return {
            "parts": self.parts(),
            "bytes": self.total,
            "usable_bytes": usable,
            "fits": self.total <= usable,
            "savings": [
                {"setting": saving.setting, "bytes": saving.bytes, "fits": saving.bytes <= usable, "cost": saving.cost}
                for saving in (self.savings(memory) if self.total > usable else ())
            ],
        }


def recipe_memory(recipe: Recipe, base: BaseFolder) -> RunMemory:
    """Return the memory that a recipe needs on its device; `auto` means a GPU.

    Args:
        recipe: The recipe. The longest row is assumed to have `max_length` tokens.
        base: The base checkpoint; only its configuration is read.

    Raises:
        InputError: As for `planned_layers`.
    """
    training = recipe.training
    on_gpu = training.device != "cpu"
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    layers = planned_layers(base, recipe.lora)
    return RunMemory(base, recipe, layers, precision, on_gpu, training.max_length)


def memory_line(recipe: Recipe, base: BaseFolder, layers: Sequence[str], rows: Sequence[EncodedRow]) -> str:
    """Return the estimate of a run on this machine as a line; empty if devices share a model or the estimate fails.

    Args:
        recipe: The recipe.
        base: The base checkpoint.
        layers: The result of `planned_layers`.
        rows: The rows to train on.
    """
    if engine() in ("fsdp", "deepspeed"):
        return ""
    training = recipe.training
    longest = max((len(row.input_ids) for row in rows), default=1) - 1
    memory = RunMemory(base, recipe, layers, precision_of(training), on_gpu(training), longest)
    try:
        return f"{memory.text()}, of {in_words(memory_limit(device_of(training)))}\n"
    except InputError:
        return ""
