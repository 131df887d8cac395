"""The memory that a step needs, counted on a model; the settings that need less; and a step that runs out of memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

_PROBED_ON_META = (2048, 4096)
"""The same where nothing is computed: beside so many tokens, a matrix or its gradient is small."""

_TRAINED_BYTES = 16
"""Bytes of a trainable value: itself, its gradient, and AdamW's two moments, all in float32."""

_NF4_BYTES = 0.53
"""Bytes of a weight in 4 bits, its share of the doubly quantised scales included (QLoRA, arXiv 2305.14314)."""

_FLOAT32 = 4
"""Bytes of a value in float32."""


@dataclass(frozen=True)
class PassNeed:
    """Bytes that a forward and a backward pass need, beside weights, gradients and the optimizer's state.

    Attributes:
        head: For each input token, while the losses are computed; without the logits.
        backward: For each input token, where the backward pass needs the most.
        fixed: There, for any number of tokens: a full matrix of a base in 4 bits, the gradient of a matrix.
        copies: All the time: the adapter in the dtype of the base.
    """

    head: int
    backward: int
    fixed: int
    copies: int = 0

    def with_more(self, more: int) -> PassNeed:
        """Return a need that has this many bytes more for each token."""
        return replace(self, head=self.head + more, backward=self.backward + more)


@dataclass(frozen=True)
class MemoryNeed:
    """Memory that training needs on one device, in bytes.

    Attributes:
        base: The frozen weights.
        quantisable: Part of `base` that a 4-bit base would shrink: the decoder's linear layers.
        values: Number of values in `quantisable`; 0 if they are in 4 bits already.
        adapter: The adapter with its gradients and the optimizer's state.
        gathered: Part of `base` that is whole on each of the devices that share it: all but the decoder's layers, and
            two of these, the one that is computed and the next.
        plain: The need of a pass.
        checkpointed: The need of a pass with activation checkpointing.
        vocabulary: Logits of a position.
        logits: Most logits that are computed at a time.
        logit_bytes: Bytes of a logit as the head computes it; its loss is computed in float32.
        unpacked: The largest matrix of a base in 4 bits, which is made again for each product.
    """

    base: int
    quantisable: int
    values: int
    adapter: int
    gathered: int
    plain: PassNeed
    checkpointed: PassNeed
    vocabulary: int
    logits: int
    logit_bytes: int
    unpacked: int = 0

    def total(self, tokens: int, *, checkpointed: bool = False, shards: int = 1, nf4: bool = False) -> int:
        """Return the bytes for a pass of this many tokens; for none, those of the weights and of the optimizer."""
        base = self.base - self.quantisable + self.values * _NF4_BYTES if nf4 else self.base
        weights = (base + self.adapter + self.gathered * (shards - 1)) / shards
        return int(weights) + self._of_pass(tokens, checkpointed=checkpointed)

    def most_tokens(self, limit: int, *, checkpointed: bool = False) -> int:
        """Return how many tokens fit into `limit` bytes at once; 0 if not even the weights do."""
        room, fitting = limit - self.total(0), 0
        for bit in reversed(range(40)):
            if self._of_pass(fitting + 2**bit, checkpointed=checkpointed) <= room:
                fitting += 2**bit
        return fitting

    def _of_pass(self, tokens: int, *, checkpointed: bool) -> int:
        if not tokens:
            return 0
        need = self.checkpointed if checkpointed else self.plain
        # beside few tokens, a matrix is the most of the backward pass
        at_head = need.head * tokens + max(self._of_logits(tokens), self.unpacked)
        return need.copies + max(need.backward * tokens + need.fixed, at_head)

    def _of_logits(self, tokens: int) -> int:
        """Return the bytes of the logits that are alive at a time."""
        each = _FLOAT32 if self.logit_bytes == _FLOAT32 else self.logit_bytes + _FLOAT32
        at_once = max(1, self.logits // self.vocabulary) * self.vocabulary
        return each * min(self.vocabulary * tokens, at_once)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within its block, while they are alive.

    Attributes:
        now: The bytes that are alive.
        most: Most bytes that were alive at a time; may be set back to `now`.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """Make a count.

        Args:
            known: Tensors from before, which are not counted; nor are views of them.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = [tensor.untyped_storage() for tensor in known]
        # by the storage's own address: the data of a tensor on `meta` has no address
        self._sizes = {storage._cdata: 0 for storage in self._known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its results."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return found

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor until its memory is released."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._release, address)

    def _release(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


def _bytes_of_pass(model: Any, tokens: int) -> tuple[int, int]:
    """Return the bytes that are alive when the head has the losses, and the most of the backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alive, at_head = LiveBytes([*model.parameters(), *model.buffers()]), 0

    def look(*given: Any) -> None:
        nonlocal at_head
        at_head = alive.now

    def release(parameter: torch.Tensor) -> None:
        # the gradients of the whole adapter are counted with it
        parameter.grad = None

    gradients = [parameter.grad for parameter in trained]
    hooks = [parameter.register_post_accumulate_grad_hook(release) for parameter in trained]
    hooks.append(model.get_output_embeddings().register_forward_hook(look))
    ids = torch.ones(tokens + 1, dtype=torch.int64)
    try:
        with alive:
            losses = supervised_losses(model, [StepRow(0, ids, ids)])[0].sum()
            alive.most = alive.now
            torch.autograd.backward(losses)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
    return at_head, alive.most


def _kinds_of_layers(layers: Iterable[Any]) -> list[list[Any]]:
    """Return the layers of a decoder in groups; those of a group need the same memory."""
    kinds: dict[Any, list[Any]] = {}
    is_trained = False
    for layer in layers:
        parameters = tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in layer.named_parameters())
        # layers below the first adapter keep nothing for the backward pass
        is_trained = is_trained or any(requires_grad for *_, requires_grad in parameters)
        kinds.setdefault((is_trained, parameters), []).append(layer)
    return list(kinds.values())


def _decoder_of(model: Any) -> Any:
    # a vision tower has layers, too, and no embeddings of tokens
    return next(one for one in model.modules() if hasattr(one, "embed_tokens") and hasattr(one, "layers"))


def _measure_pass(model: Any) -> PassNeed:
    """Measure the need of a pass with two layers of each kind; a third one shows what each further layer adds."""
    decoder = _decoder_of(model)
    layers = decoder.layers
    order = {layer: number for number, layer in enumerate(layers)}
    is_meta = next(model.parameters()).is_meta
    lengths = _PROBED_ON_META if is_meta else _PROBED_TOKENS

    def measure(chosen: Sequence[Any]) -> torch.Tensor:
        decoder.layers = torch.nn.ModuleList(sorted(chosen, key=order.__getitem__))
        (short_head, short), (long_head, long) = (_bytes_of_pass(model, tokens) for tokens in lengths)
        apart = lengths[1] - lengths[0]
        backward = (long - short) // apart
        return torch.tensor([(long_head - short_head) // apart, backward, short - backward * lengths[0]])

    kinds = _kinds_of_layers(layers)
    some = [layer for kind in kinds for layer in kind[:2]]
    try:
        if not is_meta:
            measure(some)  # attention makes masks the first time, and remembers them
        found = first = measure(some)
        for kind in kinds:
            if len(kind) > 2:
                found = found + (len(kind) - 2) * (measure([*some, kind[2]]) - first)
    finally:
        decoder.layers = layers
    return PassNeed(*found.clamp(min=0).tolist())


def _measure_passes(model: Any) -> tuple[PassNeed, PassNeed]:
    """Measure the need of a pass without and with activation checkpointing."""
    switches, was_training = checkpointed_layers(model), model.training
    for module in switches:
        module.gradient_checkpointing = False
    # in training only, activations are computed again, and there is dropout
    model.train()
    try:
        plain = _measure_pass(model)
        if not switches:
            checkpoint_activations(model)
        for module in switches:
            module.gradient_checkpointing = True
        return plain, _measure_pass(model)
    finally:
        model.train(was_training)
        if not switches:
            for module in checkpointed_layers(model):
                module.gradient_checkpointing = False
            # transformers 5 lets the embeddings have a gradient then; transformers 4 did not, and raises here
            with suppress(AttributeError):
                model.disable_input_require_grads()


def measure_need(model: Any, device: str | None = None) -> MemoryNeed:
    """Measure the memory that a model needs, by small passes whose tensors are counted.

    Args:
        model: Base with adapter, attending by segments. On torch's device `meta` nothing is computed, and the
            count does not change.
        device: The type of the device that the model will be on; default: that of the model.
    """
    parameters = list(model.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        # neither the adapter's nor those in 4 bits
        if not module.weight.requires_grad and module.weight.is_floating_point()
    ]
    plain, checkpointed = _measure_passes(model)
    base = sum(weight.nbytes for weight in frozen)
    layers = [sum(one.nbytes for one in layer.parameters()) for layer in _decoder_of(model).layers]
    return MemoryNeed(
        base,
        sum(weight.nbytes for weight in linear),
        sum(weight.numel() for weight in linear),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _TRAINED_BYTES,
        max(0, base - sum(layers)) + 2 * max(layers),
        plain,
        checkpointed,
        model.config.get_text_config().vocab_size,
        most_logits(device or model.device.type),
        model.get_output_embeddings().weight.element_size(),
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
    with trainer.compute_loss_context_manager():
        need = measure_need(model)
    # these tokens did not fit: if the estimate says they do, it is too small
    unexplained = limit - need.total(tokens, checkpointed=checkpointed)
    if unexplained > 0 and tokens:
        more = unexplained // tokens + 1
        need = replace(need, plain=need.plain.with_more(more), checkpointed=need.checkpointed.with_more(more))
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
