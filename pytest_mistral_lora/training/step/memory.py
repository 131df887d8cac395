"""Activation checkpointing: activations are computed twice, and fewer of them are kept."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from pytest_mistral_lora.training.step.forward import supervised_losses
from pytest_mistral_lora.training.step.packing import StepRow


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone, and compute the rest again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # reentrant checkpointing loses the gradient where no input of a layer needs one (frozen embeddings)
    enable({"use_reentrant": False})


def is_checkpointed(model: Any) -> bool:
    """Say whether any layer is checkpointed."""
    return bool(_checkpointed(model))


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Let every layer keep its activations for a moment."""
    layers = _checkpointed(model)
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _checkpointed(model: Any) -> list[Any]:
    return [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]


_PROBED = (16, 48)
"""Tokens of the two passes from whose difference the need of a token follows."""

_TRAINED_BYTES = 16
"""Bytes of a trainable value: itself, its gradient, and AdamW's two moments, all in float32."""

_NF4_BYTES = 0.53
"""Bytes of a weight in 4 bits, its share of the doubly quantised scales included (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Need:
    """What training takes on one device, in bytes.

    Attributes:
        base: The frozen weights.
        quantisable: Those of them that a 4-bit base would shrink: the linear layers' of the decoder.
        values: How many values those have; 0 where they are in 4 bits already.
        adapter: The adapter with its gradients and the optimizer's state.
        token: What is kept for the backward pass, for each token that is fed.
        checkpointed_token: The same with activation checkpointing.
    """

    base: int
    quantisable: int
    values: int
    adapter: int
    token: int
    checkpointed_token: int

    def total(self, tokens: int, *, checkpointed: bool = False, shards: int = 1, nf4: bool = False) -> int:
        """Return what a pass of this many tokens takes."""
        base = self.base - self.quantisable + self.values * _NF4_BYTES if nf4 else self.base
        kept = self.checkpointed_token if checkpointed else self.token
        return int((base + self.adapter) / shards + kept * tokens)

    def most_tokens(self, limit: int, *, checkpointed: bool = False) -> int:
        """Return how many tokens fit at once; 0 if not even the weights do."""
        kept = self.checkpointed_token if checkpointed else self.token
        return max(0, int(limit - self.total(0)) // kept)


def need_of(model: Any) -> Need:
    """Measure what a model needs, by two small passes whose tensors for the backward pass are counted.

    Args:
        model: Base with adapter, attending by segments.
    """
    parameters = list(model.parameters())
    frozen = [one for one in parameters if not one.requires_grad]
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        # not the adapter's, and none that is in 4 bits already
        if not module.weight.requires_grad and module.weight.is_floating_point()
    ]
    small, large = (_kept(model, tokens) for tokens in _PROBED)
    token = max(1, (large - small) // (_PROBED[1] - _PROBED[0]))
    layers = model.config.num_hidden_layers
    width = model.config.hidden_size * next(iter(frozen), parameters[0]).element_size()
    return Need(
        sum(one.nbytes for one in frozen),
        sum(one.nbytes for one in linear),
        sum(one.numel() for one in linear),
        sum(one.numel() for one in parameters if one.requires_grad) * _TRAINED_BYTES,
        token,
        # each layer's input, and all that one layer keeps while it is computed again
        width * layers + token // layers,
    )


def _kept(model: Any, tokens: int) -> int:
    """Return the bytes that one pass of this many tokens keeps for its backward pass, weights left out."""
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(tokens + 1, dtype=torch.int64)
    with without_checkpointing(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses, _ = supervised_losses(model, [StepRow(0, ids, ids)])
    del losses
    return sum(kept.values())


def memory_limit(device: torch.device) -> int:
    """Return the memory that a process can have on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([int(psutil.virtual_memory().total), *(one for one in limits if one != resource.RLIM_INFINITY)])


@dataclass(frozen=True)
class Way:
    """One way to need less.

    Attributes:
        setting: What to write into the recipe, or to do.
        cost: What it costs.
        bytes: What a step then needs.
    """

    setting: str
    cost: str
    bytes: int


def ways(need: Need, limit: int, *, tokens: int, longest: int, checkpointed: bool) -> Iterator[Way]:
    """Yield what would need less, in the order of least harm.

    Args:
        need: What the model needs.
        limit: Memory of the device, in bytes.
        tokens: Tokens of the largest micro-batch.
        longest: Tokens of the longest row.
        checkpointed: Whether activation checkpointing is on already.
    """
    fitting = max(longest, min(tokens, need.most_tokens(limit, checkpointed=checkpointed)))
    if longest < tokens:
        bytes_ = need.total(fitting, checkpointed=checkpointed)
        yield Way(f"training.micro_batch_tokens: {fitting}", "the step stays the same", bytes_)
    if not checkpointed:
        bytes_ = need.total(longest, checkpointed=True)
        what = "training.activation_checkpointing: true"
        if longest < tokens:
            what += f" with micro_batch_tokens: {longest}"
        yield Way(what, "the step stays the same, and takes about a third longer", bytes_)
    for shards in (2, 4, 8):
        bytes_ = need.total(longest, checkpointed=True, shards=shards)
        if bytes_ <= limit or shards == 8:
            yield Way(f"sharding over {shards} devices (FSDP2), checkpointed", "the step stays the same", bytes_)
            break
    if need.values:
        bytes_ = need.total(longest, checkpointed=True, nf4=True)
        yield Way("base.quantization: nf4, checkpointed", "the base is rounded to 4 bits: other gradients", bytes_)
    shorter = need.most_tokens(limit, checkpointed=True)
    if 0 < shorter < longest:
        bytes_ = need.total(shorter, checkpointed=True)
        yield Way(f"rows of at most {shorter} tokens, checkpointed", "other rows are trained on", bytes_)
