"""Causal attention on a CPU, in blocks of queries that meet the keys before them and none behind.

PyTorch's own kernel computes short rows in full, the masked half too, and bf16 slower than float32. Here scores are
float32 at least, and are made again in the backward pass: what is kept grows with the tokens, not with their square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft.tuners import lora
from torch.nn.functional import silu
from transformers.models.mistral.modeling_mistral import MistralMLP

from pytest_mistral_lora.training.step.packing import Segment

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


def use_frozen_layers(model: Any) -> None:
    """Let a model's LoRA layers and MLPs compute as this module does, where they can; nothing else of them changes.

    Args:
        model: The base model with its adapter. DeepSpeed must not have divided it: it gathers the weights of a module
            when that module is called, and here they are read.
    """
    for module in model.modules():
        if type(module) is lora.Linear and _is_frozen(module.base_layer):
            module.__class__ = _LoraLinear
        elif (
            type(module) is MistralMLP
            and module.config.hidden_act == "silu"
            and all(map(_is_frozen, _matrices(module)))
        ):
            module.__class__ = _Mlp


def _is_frozen(module: Any) -> bool:
    return type(module) is torch.nn.Linear and module.bias is None and not module.weight.requires_grad


def _matrices(mlp: Any) -> tuple[Any, Any, Any]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _multiplied_in(weight: torch.Tensor) -> torch.dtype | None:
    """Return the dtype in which a weight is multiplied without a cast; None where autocast would make another of it."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype:
        return None
    return weight.dtype


class _LoraLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's layer, as one autograd function where a single plain adapter is at work."""

    def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's, `(..., out_features)`, in the dtype of `x`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if given or named or len(active) != 1 or not self._is_plain(active[0], x.dtype):
            output: torch.Tensor = super().forward(x, *given, **named)
            return output
        a, b = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        product: Any = _LoraProduct
        output = product.apply(x.flatten(0, -2), self.base_layer.weight, a, b, self.scaling[active[0]])
        return output.view(*x.shape[:-1], -1)

    def _is_plain(self, name: str, dtype: torch.dtype) -> bool:
        """Say whether PEFT would compute `x W' + scaling * x A' B'` in this dtype, and no more."""
        at_work = torch.is_grad_enabled() and not self.disable_adapters and not self.merged
        plain = isinstance(self.lora_dropout[name], torch.nn.Identity) and name not in self.lora_variant
        alike = dtype == self.lora_A[name].weight.dtype or torch.is_autocast_enabled("cpu")
        return (
            at_work and plain and alike and not self.lora_bias[name] and dtype == _multiplied_in(self.base_layer.weight)
        )


class _LoraProduct(torch.autograd.Function):
    """`x W' + scaling * x A' B'`: `x` (tokens, in), W (out, in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scaling: float) -> Any:
        ctx.scaling, ctx.dtype = scaling, a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        narrow = x @ a.T
        ctx.save_for_backward(x, weight, a, b, narrow)
        return (x @ weight.T).addmm_(narrow, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, narrow = ctx.saved_tensors
        slope = upstream[0]
        of_narrow = (slope @ b).mul_(ctx.scaling)
        of_x = (slope @ weight).addmm_(of_narrow, a) if ctx.needs_input_grad[0] else None
        of_a, of_b = (of_narrow.T @ x).to(ctx.dtype), (slope.T @ narrow).to(ctx.dtype)
        return of_x, None, of_a, of_b.mul_(ctx.scaling), None


class _Mlp(MistralMLP):  # type: ignore[misc]
    """transformers' MLP, as one autograd function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`, `(..., hidden size)`."""
        if not torch.is_grad_enabled() or x.dtype != _multiplied_in(self.gate_proj.weight):
            output: torch.Tensor = super().forward(x)
            return output
        product: Any = _MlpProduct
        output = product.apply(x.flatten(0, -2), *(one.weight for one in _matrices(self)))
        return output.view(*x.shape[:-1], -1)


class _MlpProduct(torch.autograd.Function):
    """`(silu(x G') * x U') D'`; of what is computed, `x G'` and `x U'` are kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate: Any, up: Any, down: Any) -> Any:
        gated, upward = x @ gate.T, x @ up.T
        ctx.save_for_backward(gated, upward, gate, up, down)
        return silu(gated).mul_(upward) @ down.T

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        gated, upward, gate, up, down = ctx.saved_tensors
        slope = upstream[0] @ down
        of_x = silu(gated).mul_(slope) @ up
        of_gated = torch.ops.aten.silu_backward(slope.mul_(upward), gated)
        return of_x.addmm_(of_gated, gate), None, None, None
