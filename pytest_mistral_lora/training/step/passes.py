"""One pass through the model: rows from the collated batch of a step, and the loss of each supervised token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pytest_mistral_lora.training.step.attention import segment_arguments
from pytest_mistral_lora.training.step.loss import losses_at_head
from pytest_mistral_lora.training.step.micro_batches import lay_out
from pytest_mistral_lora.training.step.step_row import StepRow


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
