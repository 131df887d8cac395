"""Attention over packed rows: each row attends only to itself, as if it were alone.

Isolation is exact by construction: the queries of a row meet only the keys of that row. No mask over all tokens is
made, which is also faster than a block mask. Rows with the same prefix may share its segment: each row would have
computed the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pytest_mistral_lora.training.step.attention_cpu import attend_in_blocks
from pytest_mistral_lora.training.step.packing import Segment, StepRow, pack_rows

IMPLEMENTATION = "segments"
"""Value of a model's `_attn_implementation` while it is trained."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    segment_starts: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each segment; without segments, run transformers' own SDPA.

    Args:
        module: The attention layer.
        query: `(1, heads, tokens, head size)`, with rotary positions applied.
        key: `(1, key-value heads, tokens, head size)`, likewise.
        value: `(1, key-value heads, tokens, head size)`.
        attention_mask: Used only without segments.
        segments: Segments in order, together all tokens.
        segment_starts: First token of each segment, and the token after the last, `(segments + 1,)` int32 on the GPU;
            only there.
        sliding_window: Number of tokens that a token sees, itself included; None for all tokens.
        settings: `scaling`, `dropout` and other arguments of transformers.

    Returns:
        `(1, tokens, heads, head size)`, and None in place of the attention weights.
    """
    if segments is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **settings
        )
        return plain
    # varlen kernels know no shared prefix and no dropout, and take half precision and heads of one size only
    packed = all(first == last for _, _, (first, last) in segments) and query.shape[3] == value.shape[3]
    packed = packed and not settings.get("dropout")
    if query.is_cuda and query.dtype in _HALF and packed and segment_starts is not None:
        fused = _fused_varlen(torch.cuda.get_device_capability(query.device))
        if fused is not None:
            longest = max(segment.end - segment.start for segment in segments)
            return fused(query, key, value, segment_starts, longest, sliding_window, settings["scaling"]), None
    in_window = sliding_window is None or max(segment.seen for segment in segments) <= sliding_window
    if query.device.type == "cpu" and not settings.get("dropout") and in_window:
        return attend_in_blocks(query, key, value, segments, settings["scaling"]), None
    layer: Any = module
    if _keeps_scores_of_grouped_heads(query):
        groups = query.shape[1] // key.shape[1]
        layer, key, value = _ONE_GROUP, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = [_attend_segment(layer, query, key, value, segment, sliding_window, **settings) for segment in segments]
    return torch.cat(parts, dim=1), None


_HALF = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
"""The first GPUs that FlashAttention's kernels take; PyTorch's kernel for packed rows calls them, too."""

_ONE_GROUP = SimpleNamespace(is_causal=True)
"""What SDPA reads of an attention layer, for keys and values that are repeated for each query head already."""


def flash_takes(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether FlashAttention's kernels take tensors of a dtype on a GPU.

    Args:
        dtype: The dtype of queries, keys and values.
        capability: The compute capability of the GPU: (7, 5) of a T4, (9, 0) of an H100.
    """
    return dtype in _HALF and capability >= _AMPERE


def _keeps_scores_of_grouped_heads(query: torch.Tensor) -> bool:
    """Report whether SDPA would keep all scores, `(heads, tokens, tokens)`, if queries share keys, on a GPU.

    FlashAttention takes grouped heads, but no float32 and no GPU before Ampere. The memory-efficient kernel takes both,
    but no grouped heads in most releases of PyTorch: what remains keeps 2 GiB a layer for 4,096 tokens of a 7B base.
    """
    return query.is_cuda and not flash_takes(query.dtype, torch.cuda.get_device_capability(query.device))


def _attend_segment(
    module: Any, query: Any, key: Any, value: Any, segment: Segment, window: int | None, **settings: Any
) -> torch.Tensor:
    start, end, (first, last) = segment
    keys, values = key[:, :, start:end], value[:, :, start:end]
    if first < last:
        keys = torch.cat([key[:, :, first:last], keys], dim=2)
        values = torch.cat([value[:, :, first:last], values], dim=2)
    mask = _causal_mask(end - start, keys.shape[2], window, query.device)
    attended: torch.Tensor = sdpa_attention_forward(module, query[:, :, start:end], keys, values, mask, **settings)[0]
    return attended


def attend_in_segments(model: Any) -> None:
    """Make a model attend by segments if it is called with them; other calls do not change.

    Args:
        model: A transformers model, with or without PEFT around it.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, attend)
        # calls without segments, such as generation, need the masks of SDPA
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)


def segment_arguments(segments: Sequence[Segment], device: torch.device | None = None) -> dict[str, Any]:
    """Return the arguments of a model's call, beside ids and positions, that keep packed rows apart.

    Args:
        segments: Segments in order, together all tokens.
        device: The model's device; None for a CPU.
    """
    # transformers uses a mask of four dimensions unchanged, and makes no mask over all tokens
    arguments = {"segments": tuple(segments), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    if device is not None and device.type == "cuda":
        # once for all layers: each copy to a GPU waits for what runs there
        starts = torch.tensor([0, *(segment.end for segment in segments)], dtype=torch.int32)
        arguments["segment_starts"] = _sent(starts, device)
    return arguments


@lru_cache(maxsize=16)  # every layer asks for the same masks
def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, `(1, 1, queries, keys)` bool; None if SDPA's own causal mask is right."""
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=device)
    # the queries are the last tokens: the keys before them are the prefix
    distance = position[keys - queries :, None] - position[None, :]
    return ((distance >= 0) & (distance < (window or keys)))[None, None]


@cache
def _fused_varlen(capability: tuple[int, int]) -> Callable[..., torch.Tensor] | None:
    """Return a fused kernel for packed rows: FlashAttention's, else PyTorch's own; None without one for the GPU.

    Args:
        capability: The compute capability of the GPU: (7, 5) of a T4, (9, 0) of an H100.
    """
    if capability < _AMPERE:
        return None
    flash = _flash_attention(capability)
    native: Any = None
    if flash is None:
        try:
            from torch.nn.attention import varlen
        except ImportError:
            return None
        native = varlen.varlen_attn
        # the first releases support neither windows nor grouped heads
        if "window_size" not in native.__annotations__:
            return None

    def attend_varlen(
        query: Any, key: Any, value: Any, starts: torch.Tensor, longest: int, window: int | None, scaling: float
    ) -> torch.Tensor:
        # the kernels take (tokens, heads, head size), where each row starts, and the longest row
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        # all count the tokens before the query: a window counts the query, too
        window_size = (-1 if window is None else window - 1, 0)
        if flash is not None:
            bounds = {"softmax_scale": scaling, "causal": True, "window_size": window_size}
            attended = flash(q, k, v, starts, starts, longest, longest, **bounds)
            # earlier releases of FlashAttention 3 return the sums of the softmax, too
            attended = attended[0] if isinstance(attended, tuple) else attended
        else:
            bounds = {"scale": scaling, "window_size": window_size, "enable_gqa": query.shape[1] != key.shape[1]}
            attended = native(q, k, v, starts, starts, longest, longest, **bounds)
        return torch.as_tensor(attended)[None]

    return attend_varlen


def _flash_attention(capability: tuple[int, int]) -> Any:
    """Return the function of FlashAttention for packed rows, or None: of version 3 on Hopper, else of version 2."""
    # a folder of that name, or a package without the function, is none
    with suppress(ImportError, AttributeError):
        if capability[0] == 9:
            return import_module("flash_attn_interface").flash_attn_varlen_func
    with suppress(ImportError, AttributeError):
        return import_module("flash_attn").flash_attn_varlen_func
    return None


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device; a GPU does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def most_logits(device: str) -> int:
    """Return how many logits are computed at a time on a type of device: 64 MiB in float32, elsewhere 256 MiB.

    The weights of the head are read again for each part of the positions.
    """
    return 2**24 if device == "cpu" else 2**26


@contextmanager
def losses_at_head(head: Any, targets: torch.Tensor) -> Iterator[None]:
    """Let a model's head return the loss of each position instead of its logits, within the block.

    The losses leave the model through its own output, so that any wrapper around it (DDP, FSDP, DeepSpeed) sees one
    forward pass and one backward pass.

    Args:
        head: The model's output layer.
        targets: The id to predict at each position that the head is given, `(positions,)` int64.
    """
    instance_forward = head.__dict__.get("forward")  # accelerate, for one, sets it on the instance
    compute_logits = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        losses = token_losses(hidden.flatten(0, -2), head, targets, compute_logits)
        # a view would lose the hooks that FSDP puts on a module's output
        return losses.view(*hidden.shape[:-1], 1).clone()

    head.forward = forward
    try:
        yield
    finally:
        if instance_forward is None:
            del head.forward
        else:
            head.forward = instance_forward


def token_losses(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the cross entropy at each position, in nats, `(positions,)` float32; softmax and sum in float32.

    Args:
        hidden: The head's input, `(positions, hidden size)`.
        head: The model's output layer.
        targets: The id to predict at each position, `(positions,)` int64.
        compute_logits: The head's own forward pass, used if the head is not just a frozen matrix.
    """
    weight = head.weight
    chunk = max(1, most_logits(weight.device.type) // weight.shape[0])
    if isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad:
        frozen: torch.Tensor = _FrozenHeadLoss.apply(hidden, head.weight, targets, chunk)
        return frozen
    sums = torch.promote_types(weight.dtype, torch.float32)

    def losses_of(part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(compute_logits(part).to(sums), ids, reduction="none")

    # the logits of a part are computed again in the backward pass, and none are kept; the weight of a head that is
    # sharded alone (FSDP2, ZeRO-3) is not whole there
    if not isinstance(weight, DTensor) and not hasattr(weight, "ds_id"):
        losses_of = partial(checkpoint, losses_of, use_reentrant=False)
    return torch.cat(list(map(losses_of, torch.split(hidden, chunk), torch.split(targets, chunk))))


class _FrozenHeadLoss(torch.autograd.Function):
    """`L = log(sum(exp(z))) - z[target]` with `z = h W'`, for a frozen W: the gradient is formed with the loss.

    The logits z, `(chunk, vocabulary)`, live for one chunk only; the gradient, `(positions, hidden size)`, is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        sums = torch.promote_types(weight.dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=sums, device=hidden.device)
        grad_hidden = None
        if hidden.requires_grad:
            grad_hidden = torch.empty(hidden.shape, dtype=sums, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part, ids = slice(start, start + chunk), targets[start : start + chunk, None]
            logits = (hidden[part].to(weight.dtype) @ weight.T).to(sums)
            largest, target_logits = logits.amax(dim=1, keepdim=True), logits.gather(1, ids)
            # in the logits' own memory; torch.softmax would do, but on a CPU its exponentials have 20 bits
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            losses[part] = (total.log() + largest - target_logits).squeeze(1)
            if grad_hidden is not None:
                # dL/dz = softmax(z) - onehot(target)     dL/dh = dL/dz W
                grad_logits = exponentials.div_(total).scatter_add_(1, ids, torch.full_like(total, -1.0))
                grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
                del grad_logits
            # else they would live until those of the next chunk are there
            del logits, exponentials
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
            ctx.dtype = hidden.dtype
        return losses

    # dL/dh was formed in the forward pass for a gradient of 1 at each loss: the chain rule scales it by position.
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_outputs[0][:, None]).to(ctx.dtype), None, None, None


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows of a step end to end, unpadded, so that nothing depends on a padding id.

    Returns:
        `input_ids` and `labels`, `(tokens of all rows,)` int64; `lengths` and `rows` (each row's place in the dataset),
        `(rows,)` int64.
    """
    return {
        **{
            name: torch.cat([torch.as_tensor(row[name], dtype=torch.int64) for row in rows] or [torch.empty(0).long()])
            for name in ("input_ids", "labels")
        },
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64),
        "rows": torch.tensor([row["row"] for row in rows], dtype=torch.int64),
    }


def step_rows(batch: Mapping[str, torch.Tensor]) -> list[StepRow]:
    """Return the rows of a collated batch."""
    lengths = batch["lengths"].tolist()
    ids, labels = (torch.split(batch[name], lengths) for name in ("input_ids", "labels"))
    return [StepRow(*row) for row in zip(batch["rows"].tolist(), ids, labels, strict=True)]


def supervised_losses(
    model: Any, rows: Sequence[StepRow], *, inner: Any = None, share_prefix: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each supervised token of some rows, in one forward pass.

    The rows are packed and do not attend to one another; the head is computed only at supervised positions.

    Args:
        model: A causal language model that attends by segments, wrapped for distribution or not.
        rows: Rows that each have a supervised token.
        inner: The same model without the wrapper; default: `model`.
        share_prefix: Whether rows with the same prefix share its forward and backward pass.

    Returns:
        Losses, `(supervised tokens,)` float32, in nats, on the model's device; and the row of each, its place in the
        dataset, `(supervised tokens,)` int64, on the CPU.
    """
    inner = model if inner is None else inner
    packed, device = pack_rows(rows, share_prefix=share_prefix), inner.device
    with losses_at_head(inner.get_output_embeddings(), _sent(packed.targets, device)):
        output = model(
            input_ids=_sent(packed.input_ids, device),
            position_ids=_sent(packed.position_ids, device),
            logits_to_keep=_sent(packed.loss_positions, device),
            use_cache=False,
            **segment_arguments(packed.segments, device),
        )
    return output.logits.flatten(), packed.row_indices
