"""Hand-written forward and backward passes for a CPU: causal attention in blocks, and layers around frozen weights.

Attention: PyTorch's own kernel computes short rows in full, the masked half too, and bf16 slower than float32. Here
scores are float32 at least, and are computed again in the backward pass: the kept memory grows with the tokens, not
with their square. Layers: autograd keeps inputs for the gradient of a weight, which a frozen weight never gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, cast

import torch
from peft.tuners import lora
from torch.nn.functional import silu
from transformers.activations import ACT2FN
from transformers.models.mistral.modeling_mistral import MistralMLP

from pytest_mistral_lora.training.step.packing import Segment

_SILU = (type(ACT2FN["silu"]), torch.nn.SiLU)
_BLOCK = 64
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
    for start in range(segment.start, segment.end, _BLOCK):
        end = min(start + _BLOCK, segment.end)
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


@lru_cache(maxsize=_BLOCK)  # one entry for each possible size of a last block; every layer asks again
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


def use_frozen_layers(model: Any) -> None:
    """Let a model's LoRA layers and MLPs run the passes of this module if their base weights are frozen and plain.

    The layers keep their parameters, names and state; every other layer, and every call that these passes do not
    support (merged or several adapters, dropout, DoRA), runs the code of PEFT and transformers.

    Args:
        model: The base model with its adapter. DeepSpeed must not have sharded it: DeepSpeed gathers a module's weights
            when that module is called, and here its parent reads them.
    """
    for module in model.modules():
        # The class is swapped in place. A new module would have to take over hooks, parameters' identities (the
        # optimizer's keys), PEFT's registries and names in checkpoints; these subclasses only add a `forward`.
        if type(module) is lora.Linear and _is_frozen(module.base_layer):
            module.__class__ = _FrozenLoraLinear
        elif _is_gated_mlp(module):
            module.__class__ = _frozen_mlp(module.__class__)


def _is_frozen(module: Any) -> bool:
    # the exact type: adapters, 4-bit layers and hooks by subclass compute something else
    return type(module) is torch.nn.Linear and module.bias is None and not module.weight.requires_grad


def _is_gated_mlp(module: Any) -> bool:
    """Report whether a module is `down(silu(gate(x)) * up(x))` over frozen matrices and nothing else, of any class.

    transformers writes the same forward pass into each class of models; a class that computes more has other code.
    """
    code, known = getattr(type(module).forward, "__code__", None), MistralMLP.forward.__code__
    parts = dict(module.named_children())
    return (
        code is not None
        and (code.co_code, code.co_names, code.co_consts) == (known.co_code, known.co_names, known.co_consts)
        and parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and type(parts["act_fn"]) in _SILU
        and all(_is_frozen(parts[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    )


def _is_cast_free(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    """Report whether a product with this weight stays in its dtype: autocast may choose another dtype."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype
    return dtype == weight.dtype and not autocast


class _FrozenLoraLinear(lora.Linear):
    """PEFT's layer, as one autograd function if a single plain adapter is active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's, `(..., out_features)`, in the dtype of `x`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        name = active[0] if len(active) == 1 and not args and not kwargs else None
        # whether PEFT would compute just `x W' + scaling * x A' B'`, in the dtype of x
        if (
            name is not None
            and torch.is_grad_enabled()
            and not self.disable_adapters
            and not self.merged
            and isinstance(self.lora_dropout[name], torch.nn.Identity)
            and name not in self.lora_variant  # such as DoRA
            and not self.lora_bias[name]
            # without autocast, PEFT casts x to the dtype of A
            and (x.dtype == self.lora_A[name].weight.dtype or torch.is_autocast_enabled("cpu"))
            and _is_cast_free(x.dtype, self.base_layer.weight)
        ):
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            product: Any = _LoraProduct
            output: torch.Tensor = product.apply(x.flatten(0, -2), self.base_layer.weight, a, b, self.scaling[name])
            return output.view(*x.shape[:-1], -1)
        plain: torch.Tensor = super().forward(x, *args, **kwargs)
        return plain


class _LoraProduct(torch.autograd.Function):
    """`y = x W' + s * h B'` with `h = x A'`: x (tokens, in), W (out, in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scaling: float) -> Any:
        ctx.scaling, ctx.dtype = scaling, a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        lora_hidden = x @ a.T
        ctx.save_for_backward(x, weight, a, b, lora_hidden)
        return (x @ weight.T).addmm_(lora_hidden, b.T, alpha=scaling)

    # dh = s * dy B     dx = dy W + dh A     dA = dh' x     dB = s * dy' h     (W is frozen: no dW)
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, lora_hidden = ctx.saved_tensors
        grad_output = grad_outputs[0]
        grad_hidden = (grad_output @ b).mul_(ctx.scaling)
        # the first layer's input needs no gradient: embeddings are frozen
        grad_x = (grad_output @ weight).addmm_(grad_hidden, a) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = (grad_hidden.T @ x).to(ctx.dtype), (grad_output.T @ lora_hidden).to(ctx.dtype)
        return grad_x, None, grad_a, grad_b.mul_(ctx.scaling), None


class _FrozenMlp:
    """An MLP of transformers, as one autograd function; mixed into the class of the MLP."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`, `(..., hidden size)`."""
        if not torch.is_grad_enabled() or not _is_cast_free(x.dtype, self.gate_proj.weight):
            plain: torch.Tensor = cast(Any, super()).forward(x)  # of the class that it is mixed into
            return plain
        product: Any = _MlpProduct
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        output: torch.Tensor = product.apply(x.flatten(0, -2), *weights)
        return output.view(*x.shape[:-1], -1)


@cache
def _frozen_mlp(kind: type) -> type:
    return type(_FrozenMlp.__name__, (_FrozenMlp, kind), {})


class _MlpProduct(torch.autograd.Function):
    """`y = (silu(g) * u) D'` with `g = x G'` and `u = x U'`: only g and u are kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate_weight: Any, up_weight: Any, down_weight: Any) -> Any:
        gate, up = x @ gate_weight.T, x @ up_weight.T
        ctx.save_for_backward(gate, up, gate_weight, up_weight, down_weight)
        return silu(gate).mul_(up) @ down_weight.T

    # With m = silu(g) * u:  dm = dy D     du = dm * silu(g)     dg = dm * u * silu'(g)     dx = du U + dg G
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        grad_product = grad_outputs[0] @ down_weight
        grad_x = silu(gate).mul_(grad_product) @ up_weight
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_x.addmm_(grad_gate, gate_weight), None, None, None
