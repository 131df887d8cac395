"""Attention over packed rows: each row attends to itself alone, as if it were the only row.

Isolation is exact by construction: the queries of a row meet the keys of that row only, and no mask over all tokens is
made, which is also faster than a block mask. Rows with the same prefix may share the segment of that prefix: its keys
and values are those that each of them would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pytest_mistral_lora.training.step.kernels_cpu import attend_in_blocks
from pytest_mistral_lora.training.step.packing import Segment

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
        sliding_window: Number of tokens that a token sees, itself included; None for all.
        settings: `scaling`, `dropout` and other arguments of transformers.

    Returns:
        `(1, tokens, heads, head size)`, and None in place of the attention weights.
    """
    if segments is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **settings
        )
        return plain
    # varlen kernels know no shared prefix, and take half precision only
    if query.is_cuda and query.dtype != torch.float32 and all(first == last for _, _, (first, last) in segments):
        fused = _fused_varlen()
        if fused is not None:
            return fused(query, key, value, segments, sliding_window, settings["scaling"]), None
    in_window = sliding_window is None or max(segment.seen for segment in segments) <= sliding_window
    if query.device.type == "cpu" and not settings.get("dropout") and in_window:
        return attend_in_blocks(query, key, value, segments, settings["scaling"]), None
    parts = [_attend_segment(module, query, key, value, segment, sliding_window, **settings) for segment in segments]
    return torch.cat(parts, dim=1), None


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
    """Make a model attend by segments if it is called with them; every other call is as before.

    Args:
        model: A transformers model, with or without PEFT around it.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, attend)
        # calls without segments, such as generation, need the masks of SDPA
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)


def segment_arguments(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return the arguments of a model's call, beside ids and positions, that keep packed rows apart."""
    # transformers takes a mask of four dimensions as it is, and makes none over all tokens
    return {"segments": tuple(segments), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}


@lru_cache(maxsize=16)  # every layer asks for the same ones
def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, `(1, 1, queries, keys)` bool; None if SDPA's own causal mask is right."""
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=device)
    # the queries are the last tokens: the keys before them are the prefix
    distance = position[keys - queries :, None] - position[None, :]
    return ((distance >= 0) & (distance < (window or keys)))[None, None]


@cache
def _fused_varlen() -> Callable[..., torch.Tensor] | None:
    """Return a fused kernel for packed rows: FlashAttention's, else PyTorch's own; None without either."""
    flash: Any = None
    native: Any = None
    try:
        import flash_attn

        flash = flash_attn.flash_attn_varlen_func
    except ImportError:
        try:
            from torch.nn.attention import varlen
        except ImportError:
            return None
        native = varlen.varlen_attn
        # its first releases know neither windows nor grouped heads
        if "window_size" not in native.__annotations__:
            return None

    def attend_varlen(
        query: Any, key: Any, value: Any, segments: Sequence[Segment], window: int | None, scaling: float
    ) -> torch.Tensor:
        # both kernels take (tokens, heads, head size), where each row starts, and the longest row
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        starts = torch.tensor([0, *(segment.end for segment in segments)], dtype=torch.int32, device=query.device)
        longest = max(segment.end - segment.start for segment in segments)
        # both count the tokens before the query: a window counts the query, too
        window_size = (-1 if window is None else window - 1, 0)
        if flash is not None:
            bounds = {"softmax_scale": scaling, "causal": True, "window_size": window_size}
            attended = flash(q, k, v, starts, starts, longest, longest, **bounds)
        else:
            bounds = {"scale": scaling, "window_size": window_size, "enable_gqa": query.shape[1] != key.shape[1]}
            attended = native(q, k, v, starts, starts, longest, longest, **bounds)
        return torch.as_tensor(attended)[None]

    return attend_varlen
