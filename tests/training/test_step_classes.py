"""One law for every class of models: a packed step is the sum of its rows, each alone, under transformers' own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from class_models import WINDOW, Case, distance
from sampling import sampled

from pytest_mistral_lora.training.step import Segment, attention_cpu, forward, frozen_layers
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers


def attending(change: Callable[..., dict[str, Any]]) -> Callable[[Any], None]:
    """Return a mutant whose attention is called with other arguments."""

    def apply(monkeypatch: Any) -> None:
        right = forward.attend

        def wrong(module: Any, query: Any, *given: Any, **named: Any) -> Any:
            return right(module, query, *given, **named | change(query, **named))

        monkeypatch.setattr(forward, "attend", wrong)

    return apply


def packing(change: Callable[[Any], dict[str, Any]]) -> Callable[[Any], None]:
    """Return a mutant that packs rows otherwise."""

    def apply(monkeypatch: Any) -> None:
        right = forward.pack_rows

        def wrong(rows: Any, **named: Any) -> Any:
            packed = right(rows, **named)
            return replace(packed, **change(packed))

        monkeypatch.setattr(forward, "pack_rows", wrong)

    return apply


def positions_go_on(packed: Any) -> dict[str, Any]:
    return {"position_ids": torch.arange(packed.input_ids.shape[1])[None]}


def heads_in_another_order(monkeypatch: Any) -> None:
    right = attention_cpu._by_key_head
    # the query heads of a key head are neighbours; these are a stride apart
    monkeypatch.setattr(
        attention_cpu,
        "_by_key_head",
        lambda heads, keys: right(heads.unflatten(1, (-1, keys)).transpose(1, 2).flatten(1, 2), keys),
    )


def a_bias_is_left_out(monkeypatch: Any) -> None:
    monkeypatch.setattr(frozen_layers, "_is_frozen", lambda one: type(one) is torch.nn.Linear)


def no_activation(monkeypatch: Any) -> None:
    monkeypatch.setattr(frozen_layers, "silu", torch.clone)


WINDOWLESS = attending(lambda query, **named: {"sliding_window": None})
ONE_WINDOW = attending(lambda query, **named: {"sliding_window": WINDOW})
SCALED_BY_SIZE = attending(lambda query, **named: {"scaling": query.shape[3] ** -0.5})
NEIGHBOURS = packing(lambda packed: {"segments": (Segment(0, packed.input_ids.shape[1]),)})
POSITIONS_GO_ON = packing(positions_go_on)

MUTANTS: dict[Case, Callable[[Any], None]] = {
    Case("mistral"): WINDOWLESS,
    Case("mistral", tied=True, with_mlp=True): NEIGHBOURS,
    Case("ministral"): ONE_WINDOW,
    Case("ministral3", with_mlp=True): POSITIONS_GO_ON,
    Case("mixtral"): heads_in_another_order,
    Case("mistral4"): SCALED_BY_SIZE,
    Case("llama"): no_activation,
    Case("qwen2", tied=True): a_bias_is_left_out,
    Case("qwen3", with_mlp=True): NEIGHBOURS,
    Case("mistral", wrapped=True): no_activation,
    Case("ministral", wrapped=True): WINDOWLESS,
    Case("ministral3", wrapped=True, tied=True): POSITIONS_GO_ON,
    Case("mistral4", wrapped=True): POSITIONS_GO_ON,
}
"""For each case, the fault that its class is the most likely to show: a kernel or a pack that leaves out its rule."""

SAMPLE = {"ministral", "mistral4", "wrapped-ministral3-tied"}
"""The cases of every run: windows, latent attention with experts, and a wrapper with scaled queries and a tied head."""

EXACT, FAULT = 1e-12, 0.1
"""Relative to the norm of a gradient: the faults above are from 0.7 on."""

each_case = pytest.mark.parametrize("case", sampled(MUTANTS, SAMPLE))


@each_case
def test_a_packed_step_is_its_rows_alone(case: Case) -> None:
    assert max(distance(case)) < EXACT


@each_case
def test_a_step_of_rows_that_share_a_prefix_is_its_rows_alone(case: Case) -> None:
    # the gradients of rows are added before a norm, which transformers computes in float32 in any model
    assert max(distance(case, share_prefix=True)) < 1e-6


@each_case
def test_a_step_that_leaves_out_a_rule_of_the_class_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[case](monkeypatch)
    assert distance(case)[1] > FAULT


@pytest.mark.parametrize(
    ("case", "replaced"),
    [
        (Case("mistral"), {"_FrozenLoraLinear": 8, "_FrozenMlp": 2}),
        (Case("ministral3", with_mlp=True), {"_FrozenLoraLinear": 14}),
        # experts are parameters of three dimensions
        (Case("mixtral"), {"_FrozenLoraLinear": 8}),
        # each layer has an expert that every token takes, which is a plain MLP
        (Case("mistral4"), {"_FrozenLoraLinear": 10, "_FrozenMlp": 2}),
        (Case("llama"), {"_FrozenLoraLinear": 8, "_FrozenMlp": 2}),
        # q, k and v have a bias
        (Case("qwen2", tied=True), {"_FrozenLoraLinear": 2, "_FrozenMlp": 2}),
        # the vision tower has an MLP of the same form, with gelu
        (Case("mistral", wrapped=True), {"_FrozenLoraLinear": 8, "_FrozenMlp": 2}),
    ],
    ids=str,
)
def test_kernels_replace_layers_by_their_form(case: Case, replaced: dict[str, int]) -> None:
    model = case.model()
    use_frozen_layers(model)
    kinds = [type(one).__name__ for one in model.modules() if type(one).__module__ == frozen_layers.__name__]
    assert {kind: kinds.count(kind) for kind in kinds} == replaced


@pytest.mark.parametrize("change", ["another forward pass", "another activation", "a bias", "a part more"])
def test_an_mlp_of_another_form_is_left_as_it_is(change: str) -> None:
    model = Case("llama").model()
    [first, *_] = [one for name, one in model.named_modules() if name.endswith(".mlp")]
    if change == "another forward pass":

        class OtherMLP(type(first)):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))

        first.__class__ = OtherMLP
    elif change == "another activation":
        first.act_fn = torch.nn.GELU()
    elif change == "a bias":
        first.up_proj = torch.nn.Linear(32, 48)
    else:
        first.norm = torch.nn.Identity()
    use_frozen_layers(model)
    assert [type(one).__name__ for one in model.modules()].count("_FrozenMlp") == 1
