"""Attention in blocks: what the definition says, forwards and backwards, and no more of it kept than needed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from pytest_mistral_lora.training.step import Segment
from pytest_mistral_lora.training.step import attention_cpu as blocks
from pytest_mistral_lora.training.step.attention_cpu import attend_in_blocks

SIZE, SCALING = 8, 0.3
LAYOUTS = st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=4)


def segments_of(lengths: Sequence[tuple[int, bool]]) -> list[Segment]:
    """Return segments of these lengths; the first is a beginning, which some of the others share."""
    found: list[Segment] = []
    for length, shares in lengths:
        start = found[-1].end if found else 0
        found.append(Segment(start, start + length, (0, found[0].end) if found and shares else (0, 0)))
    return found


def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """Attend with one mask over all tokens."""
    place = torch.arange(query.shape[2])
    sees = torch.zeros(len(place), len(place), dtype=torch.bool)
    for start, end, (first, last) in segments:
        sees[start:end, first:last] = True
        sees[start:end, start:end] = place[start:end, None] >= place[None, start:end]
    group = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(group, dim=1) for one in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=SCALING).transpose(1, 2)


def tensors(tokens: int, heads: int, group: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, heads * group, SIZE), (1, tokens, heads, SIZE), (1, tokens, heads, SIZE)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [one.transpose(1, 2).requires_grad_() for one in made]


def output_and_gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, given, upstream.to(output.dtype))]


@given(LAYOUTS, st.integers(1, 2), st.integers(1, 3))
def test_blocks_give_what_a_mask_over_all_tokens_gives(lengths: list[tuple[int, bool]], heads: int, group: int) -> None:
    segments = segments_of(lengths)
    given = tensors(segments[-1].end, heads, group, torch.float64)
    found = output_and_gradients(attend_in_blocks(*given, segments, SCALING), given)
    expected = output_and_gradients(definition(*given, segments), given)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_at_least_as_near_to_fp64_as_the_stock_kernel(dtype: torch.dtype) -> None:
    segments = [Segment(0, 200)]
    given = tensors(200, 2, 3, dtype)
    exact = [one.detach().double().requires_grad_() for one in given]
    truth = output_and_gradients(definition(*exact, segments), exact)
    stock = scaled_dot_product_attention(*given, is_causal=True, scale=SCALING, enable_gqa=True).transpose(1, 2)
    ours = attend_in_blocks(*given, segments, SCALING)
    assert ours.dtype == dtype
    for name, found, other, right in zip(
        ("output", "query", "key", "value"),
        output_and_gradients(ours, given),
        output_and_gradients(stock, given),
        truth,
        strict=True,
    ):
        error, least = (float((one.double() - right).norm() / right.norm()) for one in (found, other))
        assert error <= 1.2 * least, name


def test_a_block_that_saw_behind_itself_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bias(tokens: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tokens * group, tokens, dtype=dtype)

    monkeypatch.setattr(blocks, "_causal_bias", no_bias)
    given = tensors(20, 1, 1, torch.float64)
    found = attend_in_blocks(*given, [Segment(0, 20)], SCALING)
    expected = definition(*given, [Segment(0, 20)])
    assert torch.allclose(found[:, -1], expected[:, -1])
    assert not torch.allclose(found[:, 5], expected[:, 5], atol=1e-3)


def test_the_formula_gives_the_gradient_of_torchs_own_softmax_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of([(70, False), (90, True)])
    given = tensors(segments[-1].end, 2, 3, torch.float64)
    expected = output_and_gradients(attend_in_blocks(*given, segments, SCALING), given)
    monkeypatch.delattr(torch, "_softmax_backward_data")
    found = output_and_gradients(attend_in_blocks(*given, segments, SCALING), given)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens() -> None:
    kept = {}
    for tokens in (200, 400):
        sizes: list[int] = []
        given = tensors(tokens, 2, 3, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):  # noqa: B023
            attend_in_blocks(*given, [Segment(0, tokens)], SCALING)
        kept[tokens] = sum(sizes)
    assert kept[400] == 2 * kept[200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_makes_no_bf16_of_scores(dtype: torch.dtype) -> None:
    given = tensors(100, 2, 3, dtype)
    plain = output_and_gradients(attend_in_blocks(*given, [Segment(0, 100)], SCALING), given)
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(attend_in_blocks(*given, [Segment(0, 100)], SCALING), given)
    assert all(map(torch.equal, found, plain))
