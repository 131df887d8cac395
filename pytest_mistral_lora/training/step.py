"""The optimizer step: transformers' Trainer, with the loss of all its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.errors import TrainingError


def supervised_losses(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each supervised token of a batch.

    The head is computed only at positions whose next token is supervised in some row of the batch.

    Args:
        model: A causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, each `(batch, length)` int64.

    Returns:
        Losses, `(supervised tokens,)` float32, in nats; and the batch row of each, `(supervised tokens,)` int64.
    """
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=columns, use_cache=False
    ).logits
    targets = targets[:, columns]
    supervised = targets != IGNORE_INDEX
    losses = torch.nn.functional.cross_entropy(logits[supervised].float(), targets[supervised], reduction="none")
    return losses, supervised.nonzero()[:, 0]


class LoraTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the mean over the supervised tokens of the whole optimizer step.

    Micro-batches and devices only split the sum: four times one row gives the gradient of one times four rows.
    """

    control: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the share of this micro-batch in the step's loss, in nats a token (a scalar tensor, float32).

        Raises:
            TrainingError: If it is not finite.
        """
        losses, _ = supervised_losses(model, inputs)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                next_step="Nothing is saved. Lower training.learning_rate, use precision: fp32, check the base.",
            )
        # the devices' gradients are averaged afterwards, and num_items_in_batch counts all devices' tokens
        return loss * self.accelerator.num_processes

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out loss: the mean over all supervised tokens, in nats.

        Trainer's own is a mean of batch means, which weighs short rows more.
        """
        totals = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad(), self.compute_loss_context_manager():
                losses, rows = supervised_losses(self.model_wrapped, self._prepare_inputs(batch))
            by_row = torch.zeros(len(batch["labels"]), 2, device=losses.device)
            by_row[:, 0].index_add_(0, rows, losses)
            by_row[:, 1].index_add_(0, rows, torch.ones_like(losses))
            # a distributed sampler repeats rows to fill its last batch; this drops the repeats
            totals += self.accelerator.gather_for_metrics(by_row).double().sum(dim=0).cpu()
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
