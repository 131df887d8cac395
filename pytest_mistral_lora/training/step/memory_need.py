"""The memory that a step needs, counted on a model; the settings that need less; and a step that runs out of memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pytest_mistral_lora.errors import MemoryShortageError
from pytest_mistral_lora.training.devices import memory_limit
from pytest_mistral_lora.training.step.forward import most_logits, supervised_losses
from pytest_mistral_lora.training.step.packing import StepRow, micro_batches


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input only, and compute its activations again in the backward pass."""
    # transformers 5 uses the later name, and deprecates the earlier one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # reentrant checkpointing loses the gradient if no input of a layer needs one, as with frozen embeddings
    enable({"use_reentrant": False})


def checkpointed_layers(model: Any) -> list[Any]:
    """Return the layers of a model whose activations are computed again in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


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
        logits: Most logits that are computed at a time.
    """

    base: int
    quantisable: int
    values: int
    adapter: int
    token: int
    checkpointed_token: int
    vocabulary: int
    logits: int

    def total(self, tokens: int, *, checkpointed: bool = False, shards: int = 1, nf4: bool = False) -> int:
        """Return the bytes for a pass of this many tokens."""
        base = self.base - self.quantisable + self.values * _NF4_BYTES if nf4 else self.base
        kept = self.checkpointed_token if checkpointed else self.token
        # a part of the logits at a time, and their gradient
        head = _LOGIT_BYTES * min(self.logits, self.vocabulary * tokens)
        return int((base + self.adapter) / shards + kept * tokens + head)

    def most_tokens(self, limit: int, *, checkpointed: bool = False) -> int:
        """Return how many tokens fit into `limit` bytes at once; 0 if not even the weights do."""
        kept = self.checkpointed_token if checkpointed else self.token
        room = limit - self.total(0)
        fitting = room // (kept + _LOGIT_BYTES * self.vocabulary)
        if fitting * self.vocabulary > self.logits:
            fitting = (room - _LOGIT_BYTES * self.logits) // kept
        return max(0, fitting)


def _kept_bytes_of_token(model: Any) -> int:
    """Return the bytes that an input token keeps for the backward pass if no activation is computed again."""
    storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def kept_bytes(tokens: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            # by the storage's own address: the data of a tensor on `meta` has no address
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                kept[storage._cdata] = storage
            return tensor

        ids = torch.ones(tokens + 1, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses, _ = supervised_losses(model, [StepRow(0, ids, ids)])
        del losses
        return sum(storage.nbytes() for storage in kept.values())

    checkpointed = checkpointed_layers(model)
    try:
        for layer in checkpointed:
            layer.gradient_checkpointing = False
        small, large = map(kept_bytes, _PROBED_TOKENS)
    finally:
        for layer in checkpointed:
            layer.gradient_checkpointing = True
    return max(1, (large - small) // (_PROBED_TOKENS[1] - _PROBED_TOKENS[0]))


def measure_need(model: Any, device: str | None = None) -> MemoryNeed:
    """Measure the memory that a model needs, by two small forward passes whose saved tensors are counted.

    Args:
        model: Base with adapter, attending by segments. On torch's device `meta` nothing is computed, and the count
            does not change.
        device: The type of the device that the model will be on; default: that of the model.
    """
    parameters = list(model.parameters())
    token = _kept_bytes_of_token(model)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        # neither the adapter's nor those in 4 bits
        if not module.weight.requires_grad and module.weight.is_floating_point()
    ]
    config = model.config.get_text_config()
    size = next(iter(frozen), parameters[0]).element_size()
    layers, width = config.num_hidden_layers, config.hidden_size * size
    # in the backward pass of an MLP: the gradients of gate, up and their product, and of a layer's input
    working = 3 * size * max((weight.shape[0] for weight in linear), default=0) + 2 * width
    return MemoryNeed(
        sum(weight.nbytes for weight in frozen),
        sum(weight.nbytes for weight in linear),
        sum(weight.numel() for weight in linear),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _TRAINED_BYTES,
        token + working,
        # each layer's input, and everything that one layer keeps while it is recomputed
        width * layers + token // layers + working,
        config.vocab_size,
        most_logits(device or model.device.type),
    )


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

    def line(self, limit: int) -> str:
        """Return the way as a line of advice for a device with this much memory, in bytes."""
        fits = "fits" if self.bytes <= limit else "does not fit"
        return f"  {self.setting}: about {in_words(self.bytes)}, {fits}; {self.cost}"


def memory_savings(
    need: MemoryNeed, limit: int, *, tokens: int, longest: int, checkpointed: bool
) -> Iterator[MemorySaving]:
    """Yield the ways to need less, in the order of least harm.

    Args:
        need: The present need.
        limit: Memory of the device, in bytes.
        tokens: Input tokens of the largest micro-batch.
        longest: Input tokens of the longest row.
        checkpointed: Whether activation checkpointing is on.
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


def shrink_or_stop(trainer: Any, failure: str, rows: Sequence[StepRow]) -> str:
    """Make a pass on some rows need less memory, as the recipe's `on_oom` allows; return the change.

    Args:
        trainer: The trainer, whose `micro_batch_tokens` or activation checkpointing may be changed.
        failure: A sentence that names the action that ran out of memory.
        rows: The rows that were fed.

    Raises:
        MemoryShortageError: If no change is allowed or possible; with the settings that need less.
    """
    batches = micro_batches(rows, trainer.micro_batch_tokens)
    tokens = max((sum(row.num_input_tokens for row in batch) for batch in batches), default=0)
    longest = max((row.num_input_tokens for row in rows), default=0)
    # several processes would have to agree: their numbers of passes must be equal
    may_shrink = trainer.on_oom == "shrink" and trainer.accelerator.num_processes == 1
    if may_shrink and tokens > longest:
        trainer.micro_batch_tokens = max(longest, tokens // 2)
        change = f"micro_batch_tokens: {trainer.micro_batch_tokens}"
    elif may_shrink and not checkpointed_layers(trainer.model):
        checkpoint_activations(trainer.model)
        change = "activation_checkpointing: true"
    else:
        raise _shortage(trainer, failure, tokens, longest)
    sys.stderr.write(f"{failure}; going on with {change}, which changes no gradient\n")
    return f"{change} from step {trainer.state.global_step + 1} on"


def _shortage(trainer: Any, failure: str, tokens: int, longest: int) -> MemoryShortageError:
    model, device = trainer.model, trainer.args.device
    # sharded by FSDP2, or by ZeRO-3, which marks its parameters with ds_id
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        # measuring the need takes a pass, and the other processes do not take part in it
        return MemoryShortageError(
            f"{failure}: {tokens} tokens at once",
            next_step="Lower training.micro_batch_tokens, set activation_checkpointing: true, or share the base "
            "over more devices.",
        )
    limit, checkpointed = memory_limit(str(device)), bool(checkpointed_layers(model))
    need = measure_need(model)
    # these tokens did not fit: if the estimate says they do, it is too small
    unexplained = limit - need.total(tokens, checkpointed=checkpointed)
    if unexplained > 0 and tokens:
        more = unexplained // tokens + 1
        need = replace(need, token=need.token + more, checkpointed_token=need.checkpointed_token + more)
    savings = memory_savings(need, limit, tokens=tokens, longest=longest, checkpointed=checkpointed)
    advice = ["These settings need less, in the order of least harm:", *(saving.line(limit) for saving in savings)]
    if trainer.on_oom == "stop" and trainer.accelerator.num_processes == 1:
        # with any other setting, steps would round differently from those before the checkpoint
        advice.append("A run that has a checkpoint can go on: set training.on_oom: shrink, and use --resume.")
    return MemoryShortageError(
        f"{failure}: {tokens} tokens at once need about "
        f"{in_words(need.total(tokens, checkpointed=checkpointed))}, and there are {in_words(limit)} on {device}",
        next_step="\n".join(advice),
    )
