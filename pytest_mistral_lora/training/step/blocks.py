"""Causal attention on a CPU, in blocks of queries that meet the keys before them and none behind.

PyTorch's own kernel computes short rows in full, the masked half too, and bf16 slower than float32. Here scores are
float32 at least, and are made again in the backward pass: what is kept grows with the tokens, not with their square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from pytest_mistral_lora.training.step.segments import Segment

_BLOCK = 64
"""Queries of each head in a block: scores that fit a core's cache, products large enough to be fast."""


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scaling: float
) -> torch.Tensor:
    """Attend causally within each segment and to its beginning.

    Args:
        query: `(1, heads, tokens, head size)`, positions already worked in.
        key: `(1, key-value heads, tokens, head size)`.
        value: As `key`.
        segments: Segments in order, together all tokens.
        scaling: What scores are multiplied with.

    Returns:
        `(1, tokens, heads, head size)`, in the dtype of `query`.
    """
    blocks: Any = _Blocks
    attended: torch.Tensor = blocks.apply(query, key, value, tuple(segments), scaling)
    return attended


class _Blocks(torch.autograd.Function):
    """Attention whose probabilities are not kept."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, segments: Sequence[Segment], scaling: float) -> Any:
        with torch.autocast("cpu", enabled=False):
            queries = _by_key_head(query, len(key[0])).mul_(scaling)
            keys, values = _wide(key[0]), _wide(value[0])
            out = query.new_empty(query.shape[2], *queries.shape[::2], query.shape[3])  # tokens, key heads, ...
            for segment in segments:
                seen, known = _seen(keys, segment), _seen(values, segment)
                for start, end, last in _blocks(segment):
                    chances = _probabilities(queries[:, start:end], seen[:, :last])
                    mixed = torch.bmm(chances, known[:, :last])
                    out[start:end] = _by_query(mixed, end - start)
        ctx.save_for_backward(queries, keys, values)
        ctx.segments, ctx.scaling, ctx.dtype = segments, scaling, query.dtype
        return out.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        queries, keys, values = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            slopes = _by_key_head(upstream[0].transpose(1, 2), len(keys))
            by_query = queries.new_empty(queries.shape[1], len(queries), *queries.shape[2:])
            by_key, by_value = (queries.new_zeros(one.shape) for one in (keys, values))
            for segment in ctx.segments:
                seen, known = _seen(keys, segment), _seen(values, segment)
                of_seen, of_known = torch.zeros_like(seen), torch.zeros_like(known)
                for start, end, last in _blocks(segment):
                    slope, rows = slopes[:, start:end].flatten(1, 2), queries[:, start:end].flatten(1, 2)
                    chances = _probabilities(queries[:, start:end], seen[:, :last])
                    of_known[:, :last].baddbmm_(chances.transpose(1, 2), slope)
                    of_chances = torch.bmm(slope, known[:, :last].transpose(1, 2))
                    of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
                    of_seen[:, :last].baddbmm_(of_scores.transpose(1, 2), rows)
                    of_rows = torch.bmm(of_scores, seen[:, :last])
                    by_query[start:end] = _by_query(of_rows, end - start)
                _add_seen(by_key, segment, of_seen)
                _add_seen(by_value, segment, of_known)
        by_query = by_query.mul_(ctx.scaling).flatten(1, 2).transpose(0, 1)
        return *(one[None].to(ctx.dtype) for one in (by_query, by_key, by_value)), None, None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_key_head(queries: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return `(key heads, tokens, queries of a key head, head size)`, a copy: a block of it is one matrix a head."""
    _, heads, tokens, size = queries.shape
    wide = _wide(queries[0]).view(key_heads, heads // key_heads, tokens, size)
    return wide.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _by_query(block: torch.Tensor, queries: int) -> torch.Tensor:
    """Return a block, `(key heads, queries of all heads, head size)`, as `(queries, key heads, ..., head size)`."""
    key_heads, rows, size = block.shape
    return block.view(key_heads, queries, rows // queries, size).transpose(0, 1)


def _blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield the first query of each block, the one after its last, and how many tokens that last one sees."""
    for start in range(segment.start, segment.end, _BLOCK):
        end = min(start + _BLOCK, segment.end)
        yield start, end, segment.seen - segment.end + end


def _seen(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return what the last token of a segment sees, of `(heads, tokens, head size)`."""
    own, (first, last) = tensor[:, segment.start : segment.end], segment.prefix
    return torch.cat([tensor[:, first:last], own], dim=1) if first < last else own


def _add_seen(total: torch.Tensor, segment: Segment, found: torch.Tensor) -> None:
    shared = segment.prefix[1] - segment.prefix[0]
    total[:, segment.prefix[0] : segment.prefix[1]] += found[:, :shared]
    total[:, segment.start : segment.end] += found[:, shared:]


def _probabilities(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return how much each query takes of each key, `(key heads, queries, keys)`; the last query sees every key."""
    _, count, group, _ = queries.shape
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    scores[:, :, -count:] += _behind(count, group, scores.dtype)
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=_BLOCK)
def _behind(count: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Return minus infinity where a key is behind a query, else 0, `(count * group, count)`."""
    square = torch.full((count, count), -torch.inf, dtype=dtype).triu_(diagonal=1)
    return square.repeat_interleave(group, dim=0)
