"""The direction of a gradient proves the token that a position is trained to produce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import lora_model
from torch.nn.functional import cross_entropy

from pytest_mistral_lora.guarding import witness
from pytest_mistral_lora.guarding.witness import EQUAL, EXACT, directions, likeliest_targets, why_no_directions

# PEFT and transformers warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

POSITIONS, HIDDEN, VOCABULARY = 40, 64, 300


def _heads() -> dict[str, Any]:
    """Return heads as models have them."""
    return {
        "plain": torch.nn.Linear(HIDDEN, VOCABULARY, bias=False),
        "with a bias": torch.nn.Linear(HIDDEN, VOCABULARY),
        "in bfloat16": torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16(),
    }


def _step(head: Any, weights: torch.Tensor, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return outputs of a decoder, the tokens that a loss trains for, and the gradient of the loss."""
    dtype = next(head.parameters()).dtype
    hidden = torch.randn(POSITIONS, HIDDEN).to(dtype).requires_grad_()
    tokens = torch.randint(VOCABULARY, (POSITIONS,))
    losses = cross_entropy(head(hidden).float(), tokens, reduction="none", label_smoothing=smoothing)
    [gradient] = torch.autograd.grad((losses * weights).sum(), hidden)
    return hidden.detach(), tokens, gradient


@pytest.mark.parametrize("name", _heads())
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_token_and_its_weight_are_those_of_the_loss(name: str, smoothing: float) -> None:
    torch.manual_seed(0)
    head, weights = _heads()[name], torch.linspace(-2, 3, POSITIONS)
    hidden, tokens, gradient = _step(head, weights, smoothing)
    shown = directions(head, hidden, gradient, tokens, smoothing)
    assert bool((shown.cosines.abs() > EXACT[gradient.dtype]).all())
    assert torch.equal(shown.cosines > 0, weights > 0)
    assert bool(((shown.weights / weights - 1).abs() < EQUAL[gradient.dtype]).all())
    assert bool((likeliest_targets(head, gradient) == tokens[:, None]).any(-1)[weights > 0].all())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, tokens, gradient: (hidden, tokens.roll(1), gradient),
        lambda hidden, tokens, gradient: (hidden, tokens, gradient.roll(1, dims=0)),
        lambda hidden, tokens, gradient: (hidden.roll(1, dims=0), tokens, gradient),
        lambda hidden, tokens, gradient: (hidden, tokens, -gradient),
    ],
    ids=["the token before", "the gradient before", "the output before", "a sign"],
)
def test_the_token_of_another_position_is_none(change: Any) -> None:
    torch.manual_seed(0)
    head = _heads()["plain"]
    given = _step(head, torch.ones(POSITIONS))
    assert float(directions(head, *_in_order(given)).cosines.min()) > EXACT[torch.float32]
    assert float(directions(head, *_in_order(change(*given))).cosines.max()) < EXACT[torch.float32]


def test_a_direction_that_all_tokens_share_proves_none() -> None:
    torch.manual_seed(0)
    head = _heads()["plain"]
    # a model was never trained to produce most tokens: they have grown alike, and it is sure of the first one
    with torch.no_grad():
        head.weight[10:] = head.weight[10] + 1e-3 * head.weight[10:]
    hidden = (100 * head.weight[:1].detach()).expand(POSITIONS, HIDDEN).clone().requires_grad_()
    tokens = torch.arange(1, POSITIONS + 1)
    [gradient] = torch.autograd.grad(cross_entropy(head(hidden), tokens), hidden)
    shown = directions(head, hidden.detach(), gradient, tokens)
    assert bool((shown.cosines > EXACT[torch.float32]).all())
    assert torch.equal(shown.prove(torch.bfloat16), tokens < 10)


def _in_order(given: Any) -> Any:
    hidden, tokens, gradient = given
    return hidden, gradient, tokens


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = _heads()["with a bias"]
    hidden, tokens, gradient = _step(head, torch.ones(POSITIONS))
    whole, targets = directions(head, hidden, gradient, tokens), likeliest_targets(head, gradient)
    monkeypatch.setattr(witness, "_ELEMENTS", 7 * VOCABULARY)
    parts = directions(head, hidden, gradient, tokens)
    assert all(torch.allclose(getattr(whole, name), getattr(parts, name)) for name in witness.Directions.__slots__)
    assert torch.equal(targets, likeliest_targets(head, gradient))


def test_a_head_with_an_adapter_acts_as_it_does_in_the_step(base: Path) -> None:
    model = lora_model(base, target_modules=["lm_head"], lora_dropout=0.0)
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.lora_B["default"].weight)
    hidden = torch.randn(POSITIONS, head.in_features, requires_grad=True)
    tokens = torch.randint(head.out_features, (POSITIONS,))
    [gradient] = torch.autograd.grad(cross_entropy(head(hidden), tokens), hidden)
    assert float(directions(head, hidden.detach(), gradient, tokens).cosines.min()) > EXACT[torch.float32]
    without = directions(head.base_layer, hidden.detach(), gradient, tokens)
    assert float(without.cosines.max()) < EXACT[torch.float32]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (None, "no head"),
        (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.1)), "dropout"),
        (torch.nn.Embedding(0, 3), "divided among processes"),
        (torch.nn.Linear(2, 3), ""),
    ],
)
def test_a_head_that_cannot_be_read_is_named(head: Any, reason: str) -> None:
    assert (reason in why_no_directions(head)) is True
    assert bool(why_no_directions(head)) is bool(reason)
