"""Causal attention in blocks, for a CPU.

PyTorch's own kernel computes short rows in full, the masked half too, and bf16 slower than float32. Here scores are
float32 at least, and are computed again in the backward pass: the kept memory grows with the tokens, not with their
square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from pytest_mistral_lora.training.step.packing import Segment

BLOCK = 64
"""Queries of each head in a block: scores that fit a core's cache, products large enough to be fast."""


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scaling: float
) -> torch.Tensor:
    """Attend causally within each segment and to its prefix.

    Args:
        query: `(1, heads, tokens, head size)`, with rotary positions applied.
        key: `(1, key-value heads, tokens, head size)`, likewise.
        value: `(1, key-value heads, tokens, value size)`.
        segments: Segments in order, together all tokens.
        scaling: Factor of the scores.

    Returns:
        `(1, tokens, heads, value size)`, in the dtype of `query`.
    """
    function: Any = _BlockAttention
    attended: torch.Tensor = function.apply(query, key, value, tuple(segments), scaling)
    return attended


class _BlockAttention(torch.autograd.Function):
    """`O = softmax(scaling * Q K' + causal bias) V` for each segment; the probabilities are not kept."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, segments: Sequence[Segment], scaling: float) -> Any:
        # autocast would round the scores to bf16
        with torch.autocast("cpu", enabled=False):
            # scaled once here: cheaper than scaling each block of scores
            queries = _by_key_head(query, len(key[0])).mul_(scaling)
            keys, values = _at_least_float32(key[0]), _at_least_float32(value[0])
            output = query.new_empty(query.shape[2], *queries.shape[::2], value.shape[3])  # tokens, key heads, ...
            for segment in segments:
                visible_keys, visible_values = _visible(keys, segment), _visible(values, segment)
                for start, end, visible in _blocks(segment):
                    probs = _attention_probs(queries[:, start:end], visible_keys[:, :visible])
                    attended = torch.bmm(probs, visible_values[:, :visible])
                    output[start:end] = _by_token(attended, end - start)
        ctx.save_for_backward(queries, keys, values)
        ctx.segments, ctx.scaling, ctx.dtype = segments, scaling, query.dtype
        return output.flatten(1, 2)[None]

    # With S = scaling * Q K' + bias, P = softmax(S), O = P V, and dX for the gradient of the loss by X:
    #   dV = P' dO     dP = dO V'     dS = P * (dP - rowsum(P * dP))     dQ = scaling * dS K     dK = scaling * dS' Q
    # (FlashAttention, arXiv 2205.14135, appendix B.2.) `queries` holds scaling * Q, so dK needs no factor. A key is
    # seen by all query heads of its group and by every segment that continues its prefix: their gradients are summed.
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        queries, keys, values = ctx.saved_tensors
        # autograd runs this in the autocast state of whoever calls backward()
        with torch.autocast("cpu", enabled=False):
            grad_output = _by_key_head(grad_outputs[0].transpose(1, 2), len(keys))
            grad_queries = queries.new_empty(queries.shape[1], len(queries), *queries.shape[2:])
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            for segment in ctx.segments:
                visible_keys, visible_values = _visible(keys, segment), _visible(values, segment)
                grad_visible_keys, grad_visible_values = map(torch.zeros_like, (visible_keys, visible_values))
                for start, end, visible in _blocks(segment):
                    grad_block, block = grad_output[:, start:end].flatten(1, 2), queries[:, start:end].flatten(1, 2)
                    probs = _attention_probs(queries[:, start:end], visible_keys[:, :visible])
                    grad_visible_values[:, :visible].baddbmm_(probs.transpose(1, 2), grad_block)
                    grad_probs = torch.bmm(grad_block, visible_values[:, :visible].transpose(1, 2))
                    grad_scores = _softmax_backward(grad_probs, probs)
                    grad_visible_keys[:, :visible].baddbmm_(grad_scores.transpose(1, 2), block)
                    grad_queries[start:end] = _by_token(torch.bmm(grad_scores, visible_keys[:, :visible]), end - start)
                shared = segment.prefix[1] - segment.prefix[0]
                for total, part in ((grad_keys, grad_visible_keys), (grad_values, grad_visible_values)):
                    total[:, segment.prefix[0] : segment.prefix[1]] += part[:, :shared]
                    total[:, segment.start : segment.end] += part[:, shared:]
        grad_queries = grad_queries.mul_(ctx.scaling).flatten(1, 2).transpose(0, 1)
        return *(grad[None].to(ctx.dtype) for grad in (grad_queries, grad_keys, grad_values)), None, None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_key_head(queries: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return `(key heads, tokens, queries of a key head, head size)`, a copy: a block of it is one matrix a head."""
    _, heads, tokens, size = queries.shape
    grouped = _at_least_float32(queries[0]).view(key_heads, heads // key_heads, tokens, size)
    return grouped.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _by_token(block: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a block, `(key heads, tokens * group, head size)`, as `(tokens, key heads, group, head size)`."""
    key_heads, rows, size = block.shape
    return block.view(key_heads, tokens, rows // tokens, size).transpose(0, 1)


def _blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield the first query of each block, the query after its last, and how many tokens the last query sees."""
    for start in range(segment.start, segment.end, BLOCK):
        end = min(start + BLOCK, segment.end)
        yield start, end, segment.seen - segment.end + end


def _visible(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return the part that a segment's last token sees, prefix first, of `(key heads, tokens, head size)`."""
    segment_tokens, (first, last) = tensor[:, segment.start : segment.end], segment.prefix
    # without a prefix, as in most segments, this is a view
    return torch.cat([tensor[:, first:last], segment_tokens], dim=1) if first < last else segment_tokens


def _attention_probs(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return `softmax(Q K' + causal bias)`, `(key heads, tokens * group, keys)`; the last token sees every key."""
    _, tokens, group, _ = queries.shape
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    # keys before the block are seen by all of its queries: only the square at the end needs a bias
    scores[:, :, -tokens:] += _causal_bias(tokens, group, scores.dtype)
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=BLOCK)  # one entry for each possible size of a last block; every layer asks again
def _causal_bias(tokens: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Return -inf if the key is later than the query, else 0, `(tokens * group, tokens)`."""
    square = torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu_(diagonal=1)
    return square.repeat_interleave(group, dim=0)


def _softmax_backward(grad_probs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    # torch's fused kernel reads a block once; the formula takes three passes and 1.5 to 2 times its CPU time. It has no
    # public name, so that a release of torch may drop it: then the formula gives the same gradient.
    if hasattr(torch, "_softmax_backward_data"):
        return torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
    return probs * (grad_probs - (probs * grad_probs).sum(dim=-1, keepdim=True))
