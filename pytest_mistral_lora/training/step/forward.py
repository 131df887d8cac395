"""The loss where a token is supervised, and nowhere else: no logit of any other position is computed or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pytest_mistral_lora.training.step.attention import segment_arguments
from pytest_mistral_lora.training.step.packing import StepRow, lay_out

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


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows of a step one after the other, unpadded: nothing of what is fed depends on a padding id.

    Returns:
        `input_ids` and `labels`, `(tokens of all rows,)` int64; `lengths` and `rows` (each row's place in the dataset),
        `(rows,)` int64.
    """
    return {
        **{
            name: torch.cat([torch.as_tensor(row[name], dtype=torch.int64) for row in rows] or [torch.empty(0).long()])
            for name in ("input_ids", "labels")
        },
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64),
        "rows": torch.tensor([row["row"] for row in rows], dtype=torch.int64),
    }


def step_rows(batch: Mapping[str, torch.Tensor]) -> list[StepRow]:
    """Return the rows of a collated batch."""
    lengths = batch["lengths"].tolist()
    ids, labels = (torch.split(batch[name], lengths) for name in ("input_ids", "labels"))
    return [StepRow(*one) for one in zip(batch["rows"].tolist(), ids, labels, strict=True)]


def supervised_losses(
    model: Any, rows: Sequence[StepRow], *, inner: Any = None, share_prefix: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each supervised token of some rows, in one pass.

    The rows are laid end to end and do not see one another; the head is computed only where a supervised token follows.

    Args:
        model: A causal language model that attends by segments, wrapped for distribution or not.
        rows: Rows that each have a supervised token.
        inner: The same model without the wrapping; default: `model`.
        share_prefix: Whether rows that begin alike share the passes of their beginning.

    Returns:
        Losses, `(supervised tokens,)` float32, in nats, on the model's device; and the row of each, its place in the
        dataset, `(supervised tokens,)` int64, on the CPU.
    """
    inner = model if inner is None else inner
    laid, device = lay_out(rows, share_prefix=share_prefix), inner.device
    with losses_at_head(inner.get_output_embeddings(), laid.targets.to(device)):
        output = model(
            input_ids=laid.input_ids.to(device),
            position_ids=laid.position_ids.to(device),
            logits_to_keep=laid.columns.to(device),
            use_cache=False,
            **segment_arguments(laid.segments),
        )
    return output.logits.flatten(), laid.owners
