"""A training step on tensors without memory: what it launches and moves, and the most bytes that it has at a time.

The passes are the trainer's, and so is the choice of the kernels: within `on_gpu`, tensors of the CPU are taken for
those of a GPU. Memory that a kernel takes for itself, and gaps between tensors, are not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.devices import Precision, torch_dtype
from pytest_mistral_lora.training.adapter import lora_config, without_weights
from pytest_mistral_lora.training.memory import in_four_bits
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.step import StepRow, attention_cpu, forward
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.memory_need import LiveBytes, checkpoint_activations

Kind = Literal["product", "attention", "other"]

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: the scales of 64 weights have 8 bits, and a scale in float32 for 256 of them."""

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device", "detach"}
"""Operators that launch nothing, beside views."""


@dataclass
class Work:
    """What kernels of one kind did: their launches, the bytes that they read and wrote, and their operations."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What a GPU does in a second; the constants are those of an H100 as its users measure it, not of its data sheet.

    Attributes:
        product_flops: Operations of large matrix products in bf16.
        attention_flops: Operations of attention.
        bytes: Bytes of memory that are read and written.
        launch_seconds: Time that each kernel takes at the least.
    """

    product_flops: float = 650e12
    attention_flops: float = 350e12
    bytes: float = 2.6e12
    launch_seconds: float = 2e-6

    def seconds(self, kind: Kind, flops: float, moved: float) -> float:
        """Return the time of one kernel, by the slower of its operations and its bytes."""
        rate = self.attention_flops if kind == "attention" else self.product_flops
        return max(flops / rate, moved / self.bytes) + self.launch_seconds


class Count(LiveBytes):
    """Counts the kernels within its block, and the bytes of the tensors that are alive.

    Attributes:
        work: The work of each kind of kernel.
        seconds: The time of each kind, by the roofline.
        moved: The bytes that each operator moved, by its name.
    """

    def __init__(self, machine: Machine, lengths: Sequence[int]) -> None:
        """Make a count.

        Args:
            machine: The machine that the time is of.
            lengths: Input tokens of the rows of a pass.
        """
        super().__init__()
        self._machine, self._pairs = machine, sum(map(_pairs, lengths))
        self.restart()

    def restart(self) -> None:
        """Forget the work, and all bytes but those that are alive."""
        self.most = self.now
        self.work: dict[Kind, Work] = {"product": Work(), "attention": Work(), "other": Work()}
        self.seconds: Counter[Kind] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        found = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.partition("::")[2]
        tensors = [one for one in tree_leaves((args, kwargs, found)) if isinstance(one, torch.Tensor)]
        if func.is_view or name in _FREE or not tensors:
            return found
        attends = "attn" in name or "attention" in name
        flops = self._of_attention(name, args) if attends else self._of_product(func, name, args, kwargs, found)
        kind: Kind = "attention" if attends else "product" if flops else "other"
        moved = _moved(name, tensors)
        work = self.work[kind]
        work.launches, work.bytes, work.flops = work.launches + 1, work.bytes + moved, work.flops + flops
        self.seconds[kind] += self._machine.seconds(kind, flops, moved)
        self.moved[name] += moved
        return found

    def _of_attention(self, name: str, args: Any) -> float:
        query = args[1] if "backward" in name else args[0]
        # packed: (tokens, heads, head size), all rows; else (1, heads, tokens, head size), one row
        heads, pairs = (query.shape[1], self._pairs if query.ndim == 3 else _pairs(query.shape[2]))
        # of each pair and head, two products in the forward pass, and five in the backward pass
        return (5 if "backward" in name else 2) * 2 * pairs * heads * query.shape[-1]

    def _of_product(self, func: Any, name: str, args: Any, kwargs: Any, found: Any) -> float:
        # in place, an operator does what it does elsewhere
        formula = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), func.overloadpacket))
        return float(formula(*args, **(kwargs or {}), out_val=found)) if formula else 0.0


_CHOOSES = {"gather", "embedding", "index", "index_select"}
_CHANGES = {"scatter_add_", "index_put_", "index_add_"}
"""Operators that read, or read and write, the chosen elements of their first tensor alone."""


def _moved(name: str, tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes that an operator reads and writes, by its name and all of its tensors."""
    if name in _CHOOSES:
        tensors = [tensors[-1], *tensors[1:]]
    elif name in _CHANGES:
        # what is added, and the elements that it is added to, read and written
        tensors = [*tensors[1:-1], tensors[-2], tensors[-2]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pairs(tokens: int) -> int:
    """Return the pairs of a query and a key of a row, each query with the keys that it sees."""
    return tokens * (tokens + 1) // 2


def fake_model(
    base: BaseFolder,
    lora: Lora,
    layers: Sequence[str],
    precision: Precision,
    mode: FakeTensorMode,
    *,
    nf4: bool = False,
    checkpointed: bool = False,
) -> Any:
    """Return base and adapter as a run has them, ready to train, without memory.

    Args:
        base: The base checkpoint; only its configuration is read.
        lora: The adapter.
        layers: The result of `planned_layers`.
        precision: The dtype of the base's weights.
        mode: Where its tensors belong.
        nf4: Whether the decoder's linear layers are in 4 bits.
        checkpointed: Whether activations are computed again.
    """
    model = without_weights(base, lora_config(lora, layers))
    dtype = torch_dtype(precision)
    for module in model.modules():
        for parameters in (module._parameters, module._buffers):
            for key, one in parameters.items():
                if one is None:
                    continue
                trained = isinstance(one, torch.nn.Parameter) and one.requires_grad
                kind = torch.float32 if trained else dtype
                with mode:
                    new = torch.empty(one.shape, dtype=kind if one.is_floating_point() else one.dtype)
                parameters[key] = torch.nn.Parameter(new, trained) if isinstance(one, torch.nn.Parameter) else new
    model.tie_weights()
    if nf4:
        for module in in_four_bits(model):
            with mode:
                packed = torch.empty(int(module.weight.numel() * _NF4_BYTES), dtype=torch.uint8)
            module.register_buffer("packed", packed)
            # its shape and its dtype alone
            module.weight = torch.nn.Parameter(module.weight.to("meta"), requires_grad=False)
    forward.attend_in_segments(model)
    use_frozen_layers(model)
    if checkpointed:
        checkpoint_activations(model)
    return model.train()


@contextmanager
def on_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Let the trainer take tensors without memory for those of a GPU, within the block.

    Args:
        capability: The compute capability of the GPU.
    """
    arguments = forward.segment_arguments
    with ExitStack() as patched:
        for owner, name, value in (
            (FakeTensor, "is_cuda", True),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (forward, "most_logits", lambda device, most=forward.most_logits: most("cuda")),
            (forward, "segment_arguments", lambda segments, device: arguments(segments, torch.device("cuda"))),
            (forward, "attend_in_blocks", _attend_row_by_row),
        ):
            patched.enter_context(patch.object(owner, name, value))
        yield


def _multiply_by_experts(rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Return a product of each row with the matrix of an expert; without memory, torch has it in bf16 alone."""
    return rows @ matrices[0]


def _attend_row_by_row(query: Any, key: Any, value: Any, segments: Any, scaling: float) -> torch.Tensor:
    """Attend by the kernel that a GPU has for each row alone; it takes as many key heads as query heads."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    rows = (tuple(one[:, :, start:end] for one in (query, key, value)) for start, end, _ in segments)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*row, is_causal=True, scale=scaling).transpose(1, 2).contiguous() for row in rows], dim=1)


@dataclass
class FakeStep:
    """A step of a model without memory.

    Attributes:
        model: The result of `fake_model`.
        lengths: Input tokens of each row of a micro-batch, all of them supervised.
        mode: The mode of the model's tensors.
        machine: The machine that the time is of.
    """

    model: Any
    lengths: Sequence[int]
    mode: FakeTensorMode
    machine: Machine = field(default_factory=Machine)

    def run(self) -> Count:
        """Return the count of a micro-batch and the optimizer's step, beside gradients and moments from before."""
        rows = [StepRow(index, ids := torch.ones(length + 1).long(), ids) for index, length in enumerate(self.lengths)]
        packed = forward.pack_rows(rows)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        count = Count(self.machine, self.lengths)
        forget()
        with (
            patch.object(forward, "pack_rows", lambda rows, share_prefix: packed),
            patch.object(torch.nn.functional, "grouped_mm", _multiply_by_experts),
            patch.object(forward, "_sent", lambda tensor, device: self.mode.from_tensor(tensor)),
            self.mode,
            count,
        ):
            for one in (*self.model.parameters(), *self.model.buffers()):
                if not one.is_meta:
                    count.hold(one)
            # as after a micro-batch before it, in a step after the first
            optimizer = torch.optim.AdamW(trained, fused=True)
            for one in trained:
                one.grad = torch.zeros_like(one)
            optimizer.step()
            count.restart()
            with disable_input_dtype_casting(self.model, active=self._autocasts and not self._has_dora):
                with self._autocast():
                    loss = forward.supervised_losses(self.model, rows)[0].sum() / len(rows)
                loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        forget()
        return count

    @property
    def _has_dora(self) -> bool:
        return any(config.use_dora for config in self.model.peft_config.values())

    @property
    def _autocasts(self) -> bool:
        return self.model.dtype != torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.model.dtype) if self._autocasts else nullcontext()


def forget() -> None:
    """Forget the masks that attention remembers: they are without memory in this module, and with it elsewhere."""
    forward._causal_mask.cache_clear()
    attention_cpu._causal_bias.cache_clear()
