"""The memory that a step needs, counted on a model, and the settings that need less."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from pytest_mistral_lora.training.step.forward import LOGITS, supervised_losses
from pytest_mistral_lora.training.step.packing import StepRow


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input only, and compute its activations again in the backward pass."""
    # the later name is that of transformers 5, which deprecates the earlier one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # reentrant checkpointing loses the gradient if no input of a layer needs one, as with frozen embeddings
    enable({"use_reentrant": False})


def checkpointed_layers(model: Any) -> list[Any]:
    """Return the layers of a model whose activations are computed again in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def _without_checkpointing(model: Any) -> Iterator[None]:
    layers = checkpointed_layers(model)
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


_PROBED_TOKENS = (16, 48)
"""Lengths of two passes: the need of a token is their difference, so that constant parts cancel."""

_TRAINED_BYTES = 16
"""Bytes of a trainable value: itself, its gradient, and AdamW's two moments, all in float32."""

_NF4_BYTES = 0.53
"""Bytes of a weight in 4 bits, its share of the doubly quantised scales included (QLoRA, arXiv 2305.14314)."""


_LOGIT_BYTES = 8
"""Bytes of a logit, and of its exponential, in float32."""


@dataclass(frozen=True)
class MemoryNeed:
    """Memory that training needs on one device, in bytes.

    Attributes:
        base: The frozen weights.
        quantisable: Part of `base` that a 4-bit base would shrink: the decoder's linear layers.
        values: Number of values in `quantisable`; 0 if they are in 4 bits already.
        adapter: The adapter with its gradients and the optimizer's state.
        token: For each input token: kept for the backward pass, and used at once by the widest layer.
        checkpointed_token: The same with activation checkpointing.
        vocabulary: Logits of a position.
    """

    base: int
    quantisable: int
    values: int
    adapter: int
    token: int
    checkpointed_token: int
    vocabulary: int

    def total(self, tokens: int, *, checkpointed: bool = False, shards: int = 1, nf4: bool = False) -> int:
        """Return the bytes for a pass of this many tokens."""
        base = self.base - self.quantisable + self.values * _NF4_BYTES if nf4 else self.base
        kept = self.checkpointed_token if checkpointed else self.token
        # a part of the logits at a time, and their gradient
        head = _LOGIT_BYTES * min(LOGITS, self.vocabulary * tokens)
        return int((base + self.adapter) / shards + kept * tokens + head)

    def most_tokens(self, limit: int, *, checkpointed: bool = False) -> int:
        """Return how many tokens fit into `limit` bytes at once; 0 if not even the weights do."""
        kept = self.checkpointed_token if checkpointed else self.token
        room = limit - self.total(0)
        fitting = room // (kept + _LOGIT_BYTES * self.vocabulary)
        if fitting * self.vocabulary > LOGITS:
            fitting = (room - _LOGIT_BYTES * LOGITS) // kept
        return max(0, fitting)


def measure_need(model: Any) -> MemoryNeed:
    """Measure the memory that a model needs, by two small forward passes whose saved tensors are counted.

    Args:
        model: Base with adapter, attending by segments. On torch's device `meta` nothing is computed, and the count is
            the same.
    """
    parameters = list(model.parameters())
    storages = {parameter.untyped_storage()._cdata for parameter in parameters}

    def kept_bytes(tokens: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            # by its own address: the data of a tensor on `meta` has none
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                kept[storage._cdata] = storage
            return tensor

        ids = torch.ones(tokens + 1, dtype=torch.int64)
        with _without_checkpointing(model), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses, _ = supervised_losses(model, [StepRow(0, ids, ids)])
        del losses
        return sum(storage.nbytes() for storage in kept.values())

    small, large = map(kept_bytes, _PROBED_TOKENS)
    token = max(1, (large - small) // (_PROBED_TOKENS[1] - _PROBED_TOKENS[0]))
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        # not the adapter's, and none that is in 4 bits already
        if not module.weight.requires_grad and module.weight.is_floating_point()
    ]
    config = model.config.get_text_config()
    size = next(iter(frozen), parameters[0]).element_size()
    layers, width = config.num_hidden_layers, config.hidden_size * size
    # in the backward pass of an MLP: the gradients of gate, up and their product; and those of a layer's input
    working = 3 * size * max((weight.shape[0] for weight in linear), default=0) + 2 * width
    return MemoryNeed(
        sum(weight.nbytes for weight in frozen),
        sum(weight.nbytes for weight in linear),
        sum(weight.numel() for weight in linear),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _TRAINED_BYTES,
        token + working,
        # each layer's input, and all that one layer keeps while it is computed again
        width * layers + token // layers + working,
        config.vocab_size,
    )


def memory_limit(device: torch.device) -> int:
    """Return the memory that this process can have on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


@dataclass(frozen=True)
class MemorySaving:
    """One way to need less memory.

    Attributes:
        setting: The line for the recipe, or the action.
        cost: Its disadvantage.
        bytes: Memory that a step then needs.
    """

    setting: str
    cost: str
    bytes: int


def memory_savings(
    need: MemoryNeed, limit: int, *, tokens: int, longest: int, checkpointed: bool
) -> Iterator[MemorySaving]:
    """Yield the ways to need less, in the order of least harm.

    Args:
        need: The present need.
        limit: Memory of the device, in bytes.
        tokens: Input tokens of the largest micro-batch.
        longest: Input tokens of the longest row.
        checkpointed: Whether activation checkpointing is on already.
    """
    if longest < tokens:
        fitting = max(longest, min(tokens, need.most_tokens(limit, checkpointed=checkpointed)))
        bytes_ = need.total(fitting, checkpointed=checkpointed)
        yield MemorySaving(f"training.micro_batch_tokens: {fitting}", "the step stays the same", bytes_)
    if not checkpointed:
        bytes_ = need.total(longest, checkpointed=True)
        setting = "training.activation_checkpointing: true"
        if longest < tokens:
            setting += f" with micro_batch_tokens: {longest}"
        yield MemorySaving(setting, "the step stays the same, and takes about a third longer", bytes_)
    for shards in (2, 4, 8):
        bytes_ = need.total(longest, checkpointed=True, shards=shards)
        if bytes_ <= limit or shards == 8:
            setting = f"sharding over {shards} devices (FSDP2), checkpointed"
            yield MemorySaving(setting, "the step stays the same", bytes_)
            break
    if need.values:
        bytes_ = need.total(longest, checkpointed=True, nf4=True)
        cost = "the base is rounded to 4 bits: other gradients"
        yield MemorySaving("base.quantization: nf4, checkpointed", cost, bytes_)
    shorter = need.most_tokens(limit, checkpointed=True)
    if 0 < shorter < longest:
        bytes_ = need.total(shorter, checkpointed=True)
        yield MemorySaving(f"rows of at most {shorter} tokens, checkpointed", "other rows are trained on", bytes_)


def in_words(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
