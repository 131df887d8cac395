"""Attention over rows that are laid end to end: each sees itself alone, as if the others were not there.

Isolation is exact by construction: each row's queries meet that row's keys only, and no mask over all tokens is made.
Attending by segments instead of a block mask is also faster. Rows that begin alike may share the segment of their
beginning: its keys and values are then those that each of them would have.
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
"""What a model's `_attn_implementation` is called while it is trained."""


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
    """Attend causally within each segment; without segments, as transformers' own SDPA does.

    Args:
        module: The attention layer.
        query: `(1, heads, tokens, head size)`, positions already worked in.
        key: `(1, key-value heads, tokens, head size)`.
        value: As `key`.
        attention_mask: Used only without segments.
        segments: Segments in order, together all tokens.
        sliding_window: How many tokens back a token sees, itself included; None for all.
        settings: `scaling`, `dropout` and whatever else transformers hands on.

    Returns:
        `(1, tokens, heads, head size)`, and None in place of weights.
    """
    if segments is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **settings
        )
        return whole
    whole_rows = all(start == end for _, _, (start, end) in segments)
    fused = _varlen() if whole_rows and query.is_cuda and query.dtype != torch.float32 else None
    if fused is not None:
        return fused(query, key, value, segments, sliding_window, settings["scaling"]), None
    if query.device.type == "cpu" and not settings.get("dropout") and _sees_all(segments, sliding_window):
        return attend_in_blocks(query, key, value, segments, settings["scaling"]), None
    parts = [_attend_one(module, query, key, value, one, sliding_window, **settings) for one in segments]
    return torch.cat(parts, dim=1), None


def _sees_all(segments: Sequence[Segment], window: int | None) -> bool:
    return window is None or max(one.seen for one in segments) <= window


def _attend_one(
    module: Any, query: Any, key: Any, value: Any, segment: Segment, window: int | None, **settings: Any
) -> torch.Tensor:
    start, end, (first, last) = segment
    keys, values = (one[:, :, start:end] for one in (key, value))
    if first < last:
        keys = torch.cat([key[:, :, first:last], keys], dim=2)
        values = torch.cat([value[:, :, first:last], values], dim=2)
    mask = _mask(end - start, keys.shape[2], window, query.device)
    found: torch.Tensor = sdpa_attention_forward(module, query[:, :, start:end], keys, values, mask, **settings)[0]
    return found


def attend_in_segments(model: Any) -> None:
    """Make a model attend by segments where it is called with them; every other call is as before.

    Args:
        model: A transformers model, with or without PEFT around it.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)


def segment_arguments(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return what a model is called with, beside ids and positions, so that its rows stay apart.

    A mask of four dimensions is taken by transformers as it is: it makes none over all tokens.
    """
    return {"segments": tuple(segments), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}


@lru_cache(maxsize=16)  # every layer asks for the same ones
def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, `(1, 1, queries, keys)` bool; None where SDPA's own causality is right."""
    if queries == keys and (window is None or keys <= window):
        return None
    place = torch.arange(keys, device=device)
    back = place[keys - queries :, None] - place[None, :]
    return ((back >= 0) & (back < (window or keys)))[None, None]


_Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Segment], int | None, float], torch.Tensor]


@cache
def _varlen() -> _Varlen | None:
    """Return a fused kernel for segments: FlashAttention's, or PyTorch's own; None where neither is there."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen()

    def attend(q: Any, k: Any, v: Any, segments: Sequence[Segment], window: int | None, scale: float) -> torch.Tensor:
        q, k, v, starts, longest = _flat(q, k, v, segments)
        back = -1 if window is None else window - 1
        out: torch.Tensor = flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True, window_size=(back, 0)
        )
        return out[None]

    return attend


def _torch_varlen() -> _Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" not in varlen_attn.__annotations__:  # its first releases know neither windows nor grouped heads
        return None

    def attend(q: Any, k: Any, v: Any, segments: Sequence[Segment], window: int | None, scale: float) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        q, k, v, starts, longest = _flat(q, k, v, segments)
        back = -1 if window is None else window - 1
        out: Any = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scale, window_size=(back, 0), enable_gqa=grouped
        )
        return torch.as_tensor(out)[None]

    return attend


def _flat(q: Any, k: Any, v: Any, segments: Sequence[Segment]) -> tuple[Any, Any, Any, torch.Tensor, int]:
    """Return queries, keys and values as `(tokens, heads, head size)`, the starts on their device, the longest row."""
    starts = torch.tensor([0, *(one.end for one in segments)], dtype=torch.int32, device=q.device)
    longest = max(one.end - one.start for one in segments)
    return *(one[0].transpose(0, 1).contiguous() for one in (q, k, v)), starts, longest
