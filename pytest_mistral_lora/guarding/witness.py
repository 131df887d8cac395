"""What the gradient of a step shows: where the run has a loss, and which token each position is trained to produce.

After the output of the decoder nothing mixes positions: the gradient there is zero where a position has no loss,
whatever the loss function is. At a position with a cross entropy it is `c Jᵀ(p - y)`, where J is the Jacobian of the
head, p the probabilities of the next token, y the token that the position is trained to produce, and c its weight. So
the direction of the gradient proves the token, and its length gives the weight. A loss whose targets are smoothed has
the same form, with a smoothed y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

EXACT = {torch.float64: 0.999, torch.float32: 0.999, torch.float16: 0.99, torch.bfloat16: 0.99}
"""The least cosine of a gradient and the direction of the token that it trains for, by the dtype of the gradient."""

SURE = {torch.float64: 2**-10, torch.float32: 2**-10, torch.float16: 2**-5, torch.bfloat16: 2**-4}
"""The least `1 - p` of a token whose direction is judged: below it, rounding moves p by a large share of `1 - p`.

In float32, p is the exponential of a difference of numbers that may be 100 and more: rounded by 6e-6.
"""

CERTAIN = 2**-20
"""The most `1 - p` of a label that may have no gradient: in float32, p rounds to 1."""

EQUAL = {torch.float64: 2**-7, torch.float32: 2**-7, torch.float16: 2**-3, torch.bfloat16: 2**-3}
"""How far two weights that are the same may be apart, as a share of the larger one."""

_ELEMENTS = 2**22
"""Most logits at the same time: 16 MiB in float32."""

CANDIDATES = 4
"""The tokens that are tried at a position: the longest row of the head may be beside the one that is meant."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What the gradients of some positions show of one token each.

    Attributes:
        cosines: The cosine of the gradient and the direction of the token, `(positions,)` float32; 1 if the position is
            trained to produce it, -1 if it is trained to avoid it.
        weights: The weight of the token in the loss, `(positions,)` float32; as a share of the others of a step.
        probabilities: The probability of the token, `(positions,)` float32.
        common: The cosine of the direction of the token and that of all tokens alike, `(positions,)` float32: near 1,
            it proves no token. Tokens that a model was never trained to produce, for example, grow alike.
    """

    cosines: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor
    common: torch.Tensor

    def prove(self, precision: torch.dtype) -> torch.Tensor:
        """Return at which positions a direction can prove the token, `(positions,)` bool.

        Args:
            precision: The dtype that the head computed in.
        """
        least = EXACT[precision]
        # twice the angle by which rounding may turn the gradient
        return (1 - self.probabilities > SURE[precision]) & (self.common < 2 * least**2 - 1)

    def where(self, mask: torch.Tensor) -> Directions:
        """Return those of a mask, `(positions,)` bool."""
        return Directions(*(getattr(self, name)[mask] for name in self.__slots__))


def trained_positions(gradient: torch.Tensor) -> torch.Tensor:
    """Return where a step has a loss, `(batch, length)` bool on the CPU.

    Args:
        gradient: The gradient at the decoder's output, `(batch, length, hidden)`.
    """
    return (gradient != 0).any(-1).cpu()


def directions(
    head: torch.nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor, smoothing: float = 0.0
) -> Directions:
    """Compare gradients at the decoder's output with the direction of a token each.

    Args:
        head: The module that makes logits of the decoder's output, as it acts: with an adapter, a bias or a copy.
        hidden: The decoder's output at the positions, `(positions, hidden)`.
        gradient: The gradient of the step there, `(positions, hidden)`.
        tokens: The token of each position, `(positions,)` int64.
        smoothing: The declared smoothing of labels.
    """
    parts = []
    size = _chunk(_logits_of_nothing(head, hidden))
    columns = (torch.split(column, size) for column in (hidden, gradient, tokens.to(hidden.device)))
    for inputs, step, wanted in zip(*columns, strict=True):
        with torch.enable_grad():
            inputs = inputs.detach().to(_dtype(head)).requires_grad_()
            logits = head.forward(inputs)
            probabilities = logits.detach().float().softmax(-1)
            target = torch.full_like(probabilities, smoothing / probabilities.shape[-1])
            target[torch.arange(len(wanted)), wanted] += 1 - smoothing
            pulls = [
                torch.autograd.grad(logits, inputs, given.to(logits.dtype), retain_graph=True)[0].float()
                for given in (probabilities - target, probabilities - 1 / probabilities.shape[-1])
            ]
        (pull, common), step = pulls, step.float()
        along = (step * pull).sum(-1)
        norm = pull.square().sum(-1)
        cosine = torch.nn.functional.cosine_similarity(_unit(step), _unit(pull), dim=-1)
        of_token = probabilities.gather(-1, wanted[:, None])[:, 0]
        likeness = torch.nn.functional.cosine_similarity(_unit(pull), _unit(common), dim=-1)
        parts.append((cosine, along / norm.clamp(min=torch.finfo(norm.dtype).tiny), of_token, likeness))
    return Directions(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def likeliest_targets(head: torch.nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Return the tokens whose logits a step against the gradient raises most, `(positions, CANDIDATES)` int64.

    `directions` says whether one of them is the token that the position is trained to produce.

    Args:
        head: As for `directions`.
        gradient: As for `directions`.
    """
    found = []
    with torch.no_grad():
        nothing = _logits_of_nothing(head, gradient)  # what a bias adds
        for step in torch.split(gradient, _chunk(nothing)):
            raised = nothing - head.forward(_unit(step.float()).to(nothing.dtype))
            found.append(raised.topk(min(CANDIDATES, raised.shape[-1])).indices)
    return torch.cat(found).cpu()


def why_no_directions(head: Any) -> str:
    """Return why the directions of tokens cannot be computed with a head; empty if they can."""
    if not isinstance(head, torch.nn.Module):
        return "the model has no head of logits"
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in head.modules()):
        return "the head has dropout"
    parameters = [*head.parameters()]
    if any(parameter.numel() == 0 for parameter in parameters):
        return "the head is divided among processes"
    if any(not parameter.is_floating_point() for parameter in parameters):
        return "the head is quantised"
    return ""


def _dtype(head: torch.nn.Module) -> torch.dtype:
    """Return the dtype of a head, whose inputs autocast may give another one."""
    return next(parameter.dtype for parameter in head.parameters())


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors of the length 1: a gradient may be too small for its square to be a number."""
    largest = vectors.abs().amax(-1, keepdim=True)
    vectors = vectors / largest.clamp(min=torch.finfo(vectors.dtype).tiny)
    return torch.nn.functional.normalize(vectors, dim=-1)


def _logits_of_nothing(head: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    """Return the logits that a head makes of zeros, `(1, vocabulary)`."""
    with torch.no_grad():
        logits: torch.Tensor = head.forward(torch.zeros_like(like[:1], dtype=_dtype(head)))
    return logits


def _chunk(logits: torch.Tensor) -> int:
    """Return the number of positions whose logits are made at the same time."""
    return max(_ELEMENTS // logits.shape[-1], 1)
