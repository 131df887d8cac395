"""The loss where a token is supervised, and nowhere else: no logit of any other position is computed or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOGITS = 2**24
"""Logits that are held at a time: 64 MiB in float32."""


@contextmanager
def losses_at_head(head: Any, targets: torch.Tensor) -> Iterator[None]:
    """Let a model's head return the loss of each position in place of its logits.

    The losses then leave the model through its own output, so that whatever is wrapped around it (DDP, FSDP, DeepSpeed)
    sees one forward pass and one backward pass.

    Args:
        head: The model's output layer.
        targets: The id to predict at each position that the head is given, `(positions,)` int64.
    """
    own = head.__dict__.get("forward")
    logits_of = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        losses = token_losses(hidden.flatten(0, -2), head, targets, logits_of)
        # a view would lose the hooks that FSDP puts on what a module returns
        return losses.view(*hidden.shape[:-1], 1).clone()

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def token_losses(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the cross entropy at each position, in nats, `(positions,)` float32; softmax and sum in float32.

    Args:
        hidden: What the head is given, `(positions, hidden size)`.
        head: The model's output layer.
        targets: The id to predict at each position, `(positions,)` int64.
        logits_of: What computes the head's logits, for one that is not a frozen matrix.
    """
    size = max(1, _LOGITS // head.out_features) if isinstance(head, torch.nn.Linear) else 256
    if isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad:
        frozen: torch.Tensor = _FrozenHeadLoss.apply(hidden, head.weight, targets, size)
        return frozen
    parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    return torch.cat([_cross_entropy(logits_of(part), wanted) for part, wanted in parts])


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses of a head that is not trained: the gradient is formed with them, chunk by chunk; no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        """Compute losses, and the gradient of each with regard to its own hidden state."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if hidden.requires_grad else None
        for start in range(0, len(targets), size):
            part, wanted = slice(start, start + size), targets[start : start + size, None]
            logits = (hidden[part].to(weight.dtype) @ weight.T).float()
            largest, wanted_logits = logits.amax(dim=1, keepdim=True), logits.gather(1, wanted)
            # worked into the logits' own memory; torch.softmax would do, but on a CPU its exponentials have 20 bits
            chances = logits.sub_(largest).exp_()
            total = chances.sum(dim=1, keepdim=True)
            losses[part] = (total.log() + largest - wanted_logits).squeeze(1)
            if slopes is not None:
                slope = chances.div_(total).scatter_add_(1, wanted, torch.full_like(total, -1.0))
                slopes[part] = slope.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Scale each position's gradient by that of its loss."""
        (slopes,) = ctx.saved_tensors
        return (slopes * upstream[0][:, None]).to(ctx.dtype), None, None, None
