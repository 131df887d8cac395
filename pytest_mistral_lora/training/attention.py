"""Attention over rows that are laid end to end: each sees itself alone, as if the others were not there.

Isolation is exact by construction: each row's queries meet that row's keys only, and no mask over all tokens is made.
Attending by segments instead of a block mask is also faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "segments"
"""What a model's `_attn_implementation` is called while it is trained."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[int] | None = None,
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
        segments: Where each segment starts, in tokens, and where the last one ends.
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
    fused = _varlen() if query.is_cuda and query.dtype != torch.float32 else None
    if fused is not None:
        return fused(query, key, value, segments, sliding_window, settings["scaling"]), None
    parts = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            _window_mask(end - start, sliding_window, query.device),
            **settings,
        )[0]
        for start, end in pairwise(segments)
    ]
    return torch.cat(parts, dim=1), None


def attend_in_segments(model: Any) -> None:
    """Make a model attend by segments where it is called with them; every other call is as before.

    Args:
        model: A transformers model, with or without PEFT around it.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)


def segment_arguments(segments: Sequence[int]) -> dict[str, Any]:
    """Return what a model is called with, beside ids and positions, so that its rows stay apart.

    A mask of four dimensions is taken by transformers as it is: it makes none over all tokens.
    """
    return {"segments": tuple(segments), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, `(1, 1, length, length)` bool; None where causality alone decides."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return ((back >= 0) & (back < window))[None, None]


_Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], int | None, float], torch.Tensor]


@cache
def _varlen() -> _Varlen | None:
    """Return a fused kernel for segments: FlashAttention's, or PyTorch's own; None where neither is there."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen()

    def attend(q: Any, k: Any, v: Any, segments: Sequence[int], window: int | None, scale: float) -> torch.Tensor:
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

    def attend(q: Any, k: Any, v: Any, segments: Sequence[int], window: int | None, scale: float) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        q, k, v, starts, longest = _flat(q, k, v, segments)
        back = -1 if window is None else window - 1
        out: Any = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scale, window_size=(back, 0), enable_gqa=grouped
        )
        return torch.as_tensor(out)[None]

    return attend


def _flat(q: Any, k: Any, v: Any, segments: Sequence[int]) -> tuple[Any, Any, Any, torch.Tensor, int]:
    """Return queries, keys and values as `(tokens, heads, head size)`, the starts on their device, the longest row."""
    starts = torch.tensor(segments, dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in pairwise(segments))
    return *(one[0].transpose(0, 1).contiguous() for one in (q, k, v)), starts, longest
