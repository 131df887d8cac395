"""Experts in the proof of a merge: a rounded weight can move a token to another expert, with another output.

The logits of a model with experts jump where two experts are nearly as good for a token. For a given choice of experts,
they follow the weights as in any model. So the merged model is compared under the choices of base and adapter. Its
routers must equal the base's bit for bit, and their logits must equal the base's within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import inf, isnan
from typing import Any

import torch

from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.records.judgement import TOLERANCES, Tier, answer_tier, first_difference
from pytest_mistral_lora.records.transcripts import Transcript

ROUTER_SHARE = 0.5
"""Largest difference of a router's logits, in their standard deviations, as a share of that of the head's logits in
`FARTHEST`. Tiny models gave 0.1 standard deviations in bfloat16 and 1e-5 in float32; a router of which two experts are
swapped, 3."""


@dataclass
class RouterDifference:
    """The difference between the routers of two models, over the tokens of some prompts.

    Attributes:
        farthest: Largest difference of a router's logits, in standard deviations of that router's logits.
        moved: How often a token has another set of experts in a layer.
        choices: How often experts are chosen: tokens times layers.
    """

    farthest: float = 0.0
    moved: int = 0
    choices: int = 0

    def add(self, expected: Any, found: Any) -> None:
        """Compare the outputs of a router of both models."""
        # transformers 5 returns logits, weights and experts; in 4, a router is a linear layer
        logits, found_logits = (
            (output[0] if isinstance(output, tuple) else output).float() for output in (expected, found)
        )
        apart = ((found_logits - logits).abs().max() / logits.std()).item()
        self.farthest = max(self.farthest, inf if isnan(apart) else apart)  # max() would lose a NaN
        chosen, others = (_experts(output) for output in (expected, found))
        self.moved += int((chosen != others).any(dim=-1).sum())
        self.choices += len(chosen)

    def include(self, other: RouterDifference) -> None:
        """Add the tokens of other prompts."""
        self.farthest = max(self.farthest, other.farthest)
        self.moved += other.moved
        self.choices += other.choices


def _experts(output: Any) -> torch.Tensor:
    """Return the experts of each token, sorted; a linear layer's two largest logits are the first that may move."""
    experts: torch.Tensor = output[-1] if isinstance(output, tuple) else output.topk(2, dim=-1).indices
    chosen: torch.Tensor = experts.sort(dim=-1).values
    return chosen


def _routers(model: Any, name: str) -> list[torch.nn.Module]:
    return [module for path, module in model.named_modules() if name and path.endswith(f".{name}")]


def router_weights(model: Any, router: str) -> list[dict[str, torch.Tensor]]:
    """Return copies of the weights of each router, on the CPU, in model order."""
    return [
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in router_module.state_dict().items()}
        for router_module in _routers(model, router)
    ]


def changed_routers(before: Sequence[dict[str, torch.Tensor]], after: Sequence[dict[str, torch.Tensor]]) -> list[str]:
    """Return each router whose weights differ in any bit, or that is missing, by its place among the routers."""
    none: dict[str, torch.Tensor] = {}
    return [
        f"router {place}"
        for place, (weights, other) in enumerate(zip_longest(before, after, fillvalue=none))
        if weights.keys() != other.keys()
        or any(not torch.equal(tensor, other[name]) for name, tensor in weights.items())
    ]


@contextmanager
def recorded_routing(model: Any, router: str) -> Iterator[list[Any]]:
    """Yield a list that gets the output of each router in a forward pass, in model order.

    Args:
        model: The model.
        router: Last name of its routers; empty for a model without experts.
    """
    outputs: list[Any] = []
    handles = [
        router_module.register_forward_hook(lambda module, given, output: outputs.append(output))
        for router_module in _routers(model, router)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed_routing(model: Any, router: str, outputs: Sequence[Any]) -> Iterator[RouterDifference]:
    """Let the routers of a model return recorded outputs in a forward pass; yield how their own outputs differ.

    Args:
        model: A model of the class that the outputs were recorded with.
        router: Last name of its routers.
        outputs: The result of `recorded_routing` for the same tokens.
    """
    difference = RouterDifference()

    def replay(expected: Any, found: Any) -> Any:
        difference.add(expected, found)
        return expected

    handles = [
        router_module.register_forward_hook(lambda module, given, output, expected=expected: replay(expected, output))
        for router_module, expected in zip(_routers(model, router), outputs, strict=True)
    ]
    try:
        yield difference
    finally:
        for handle in handles:
            handle.remove()


def tier_of_logits(logits: torch.Tensor, transcript: Transcript, precision: Precision) -> Tier:
    """Return the tier of the greedy answer that logits give, with the recorded answer fed to the model.

    Args:
        logits: The logits that predict each token of the recorded answer, `(tokens, vocabulary)` float32.
        transcript: The recorded answer.
        precision: dtype of the weights.
    """
    golden, logprobs = torch.tensor(transcript.completion_ids), logits.log_softmax(dim=-1)
    moved = logprobs.gather(1, golden[:, None]).squeeze(1) - torch.tensor(transcript.logprobs)
    difference = first_difference(
        transcript, logprobs.argmax(dim=-1).tolist(), str, lambda index, token: logprobs[index, token].exp().item()
    )
    return answer_tier(difference, moved.abs().mean().item(), TOLERANCES[precision])
