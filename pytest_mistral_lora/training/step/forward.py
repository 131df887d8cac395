"""The loss at supervised positions only: no logit of any other position is computed or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pytest_mistral_lora.training.step.attention import segment_arguments
from pytest_mistral_lora.training.step.packing import StepRow, pack_rows

_LOGITS = 2**24
"""Most logits that are held at a time: 64 MiB in float32."""


@contextmanager
def losses_at_head(head: Any, targets: torch.Tensor) -> Iterator[None]:
    """Let a model's head return the loss of each position instead of its logits, within the block.

    The losses leave the model through its own output, so that any wrapper around it (DDP, FSDP, DeepSpeed) sees one
    forward pass and one backward pass.

    Args:
        head: The model's output layer.
        targets: The id to predict at each position that the head is given, `(positions,)` int64.
    """
    instance_forward = head.__dict__.get("forward")  # accelerate, for one, sets it on the instance
    compute_logits = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        losses = token_losses(hidden.flatten(0, -2), head, targets, compute_logits)
        # a view would lose the hooks that FSDP puts on a module's output
        return losses.view(*hidden.shape[:-1], 1).clone()

    head.forward = forward
    try:
        yield
    finally:
        if instance_forward is None:
            del head.forward
        else:
            head.forward = instance_forward


def token_losses(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the cross entropy at each position, in nats, `(positions,)` float32; softmax and sum in float32.

    Args:
        hidden: The head's input, `(positions, hidden size)`.
        head: The model's output layer.
        targets: The id to predict at each position, `(positions,)` int64.
        compute_logits: The head's own forward pass, used if the head is more than a frozen matrix.
    """
    chunk = max(1, _LOGITS // head.out_features) if isinstance(head, torch.nn.Linear) else 256
    if isinstance(head, torch.nn.Linear) and head.bias is None and not head.weight.requires_grad:
        frozen: torch.Tensor = _FrozenHeadLoss.apply(hidden, head.weight, targets, chunk)
        return frozen
    cross_entropy = torch.nn.functional.cross_entropy
    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([cross_entropy(compute_logits(part).float(), ids, reduction="none") for part, ids in parts])


class _FrozenHeadLoss(torch.autograd.Function):
    """`L = log(sum(exp(z))) - z[target]` with `z = h W'`, for a frozen W: the gradient is formed with the loss.

    The logits z, `(chunk, vocabulary)`, live for one chunk only; the gradient, `(positions, hidden size)`, is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = None
        if hidden.requires_grad:
            grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part, ids = slice(start, start + chunk), targets[start : start + chunk, None]
            logits = (hidden[part].to(weight.dtype) @ weight.T).float()
            largest, target_logits = logits.amax(dim=1, keepdim=True), logits.gather(1, ids)
            # in the logits' own memory; torch.softmax would do, but on a CPU its exponentials have 20 bits
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=1, keepdim=True)
            losses[part] = (total.log() + largest - target_logits).squeeze(1)
            if grad_hidden is not None:
                # dL/dz = softmax(z) - onehot(target)     dL/dh = dL/dz W
                grad_logits = exponentials.div_(total).scatter_add_(1, ids, torch.full_like(total, -1.0))
                grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
            ctx.dtype = hidden.dtype
        return losses

    # dL/dh was formed in the forward pass for a gradient of 1 at each loss: the chain rule scales it by position.
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_outputs[0][:, None]).to(ctx.dtype), None, None, None


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows of a step one after the other, unpadded, so that nothing depends on a padding id.

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
    return [StepRow(*row) for row in zip(batch["rows"].tolist(), ids, labels, strict=True)]


def supervised_losses(
    model: Any, rows: Sequence[StepRow], *, inner: Any = None, share_prefix: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each supervised token of some rows, in one forward pass.

    The rows are packed and do not attend to one another; the head is computed only at supervised positions.

    Args:
        model: A causal language model that attends by segments, wrapped for distribution or not.
        rows: Rows that each have a supervised token.
        inner: The same model without the wrapper; default: `model`.
        share_prefix: Whether rows with the same prefix share its forward and backward pass.

    Returns:
        Losses, `(supervised tokens,)` float32, in nats, on the model's device; and the row of each, its place in the
        dataset, `(supervised tokens,)` int64, on the CPU.
    """
    inner = model if inner is None else inner
    packed, device = pack_rows(rows, share_prefix=share_prefix), inner.device
    with losses_at_head(inner.get_output_embeddings(), packed.targets.to(device)):
        output = model(
            input_ids=packed.input_ids.to(device),
            position_ids=packed.position_ids.to(device),
            logits_to_keep=packed.loss_positions.to(device),
            use_cache=False,
            **segment_arguments(packed.segments),
        )
    return output.logits.flatten(), packed.row_indices
