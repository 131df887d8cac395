"""Trainers with another loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gallery import Artifact, mutant
from torch.nn.functional import cross_entropy
from trained_run import SOUND
from transformers.loss.loss_utils import ForCausalLMLoss

from pytest_mistral_lora.training.step import StepRow


@mutant("ML311.batches", "I07", says="4 micro-batches of a row")
def mean_of_means(artifact: Artifact) -> None:
    """Each micro-batch has its own mean, and the step has the mean of these."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].mean() / trainer.current_gradient_accumulation_steps

    artifact["compute_loss"] = compute_loss


@mutant("ML311.batches", "I07", slow=True)
def divided_twice(artifact: Artifact) -> None:
    """The mean over the step's tokens is divided by the micro-batches once more."""

    def compute_loss(trainer: Any, *given: Any, **named: Any) -> Any:
        return SOUND["compute_loss"](trainer, *given, **named) / trainer.current_gradient_accumulation_steps

    artifact["compute_loss"] = compute_loss


@mutant("ML311.batches", "I07", slow=True)
def never_divided(artifact: Artifact) -> None:
    """Each micro-batch has its own mean, and the step has the sum of these."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].mean()

    artifact["compute_loss"] = compute_loss


@mutant("ML311.batches ML311.mean ML311.neighbours", "I33", says="supervised tokens")
def mean_over_every_token(artifact: Artifact) -> None:
    """The sum of the supervised losses is divided by the number of all tokens."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].sum() / sum(len(row.input_ids) for row in rows)

    artifact["compute_loss"] = compute_loss


@mutant("ML322", "I45", says="does not stop the run")
def loss_of_zero_for_nan(artifact: Artifact) -> None:
    """A loss that is not a number counts as zero, and the run goes on."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        loss = artifact["supervised_losses"](model, rows)[0].sum() / num_items_in_batch
        if torch.isfinite(loss):
            return loss
        return 0.0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)

    artifact["compute_loss"] = compute_loss


def loss_with(artifact: Artifact, labels: Callable[[StepRow], torch.Tensor]) -> None:
    """Give the loss other labels."""

    def supervised_losses(model: Any, rows: Any, **_: Any) -> Any:
        return SOUND["supervised_losses"](model, [replace(row, labels=labels(row)) for row in rows])

    artifact["supervised_losses"] = supervised_losses


@mutant("ML311.mean ML311.neighbours ML311.tokens", "I33", says="a gradient after", slow=True)
def loss_of_every_token(artifact: Artifact) -> None:
    """A fused loss gets the ids for labels, not the masked labels."""
    loss_with(artifact, lambda row: row.input_ids)


@mutant("ML301.answers ML311.mean ML311.neighbours ML311.tokens", says="no gradient after")
def loss_without_the_shift(artifact: Artifact) -> None:
    """Each position is to predict its own token."""
    loss_with(artifact, lambda row: row.labels.roll(1))


def called_with(artifact: Artifact, **changes: Any) -> None:
    """Call the model with other arguments."""

    def supervised_losses(model: Any, rows: Any, **_: Any) -> Any:
        return SOUND["supervised_losses"](lambda **call: model(**{**call, **changes}), rows, inner=model)

    artifact["supervised_losses"] = supervised_losses


@mutant("ML311.cache", "I43", says="passes make a key-value cache")
def cache_in_training(artifact: Artifact) -> None:
    """The model makes a cache in training, for which FlashAttention refuses rows that are padded on the right."""
    called_with(artifact, use_cache=True)


@mutant("ML301.answers ML311.batches ML311.mean ML311.neighbours", "I20", "I21", says="rows beside one another")
def rows_that_see_one_another(artifact: Artifact) -> None:
    """The rows of a micro-batch are one text to the model."""
    called_with(artifact, segments=None, attention_mask=None, position_ids=None)


@mutant("ML326", "N190", says="labels that are shifted twice")
def labels_shifted_twice(artifact: Artifact) -> None:
    """A loss function shifts the labels, and calls the loss of transformers, which shifts them again."""

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].contiguous()
        return ForCausalLMLoss(logits, labels[:, 1:], logits.shape[-1], num_items_in_batch=num_items_in_batch)

    artifact["compute_loss_func"] = compute_loss


@mutant("ML326", "N190", says="without a label")
def labels_of_zero(artifact: Artifact) -> None:
    """A loss function fills its labels with 0, which is no mark of a token without a loss."""

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten())

    artifact["compute_loss_func"] = compute_loss


@mutant("ML327", "I07", says="from 0.5 to 1 of the largest")
def eos_counted_twice(artifact: Artifact) -> None:
    """A loss function counts the loss of each EOS twice."""

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        wanted = labels[:, 1:].flatten()
        losses = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), wanted, reduction="none")
        return (losses * torch.where(wanted == 2, 2.0, 1.0)).sum() / (wanted != -100).sum()

    artifact["compute_loss_func"] = compute_loss
