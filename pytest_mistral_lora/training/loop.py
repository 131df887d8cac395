"""Faster kernels in place of the model's own: the same mathematics, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.arguments import Progress, trainer_arguments
from pytest_mistral_lora.training.callbacks import DryRun, EvaluateAtEnd, LogLines, OverflowWatch, StopAtNonFinite
from pytest_mistral_lora.training.devices import GenerateTogether, on_gpu
from pytest_mistral_lora.training.recipe import Training
from pytest_mistral_lora.training.rows.table import RowDataset
from pytest_mistral_lora.training.step.attention import attend_in_segments
from pytest_mistral_lora.training.step.kernels_cpu import use_frozen_layers
from pytest_mistral_lora.training.step.oom import checkpoint_activations
from pytest_mistral_lora.training.step.trainer import LoraTrainer


def apply_kernels(model: Any, training: Training) -> None:
    """Put the recipe's kernels into a loaded base model, before its adapter.

    The rotary embedding is a function of transformers' module: it stays replaced for the rest of the process.
    """
    if training.kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_mistral

        # the loss is the trainer's own: Liger's would replace the model's forward pass
        apply_liger_kernel_to_mistral(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )


def evaluated(trainer: LoraTrainer) -> bool:
    """Say whether the log has a held-out loss of the last step."""
    return any("eval_loss" in line and line["step"] == trainer.state.global_step for line in trainer.state.log_history)


def make_trainer(
    model: Any,
    training: Training,
    train: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow],
    *,
    work: Path,
    progress: Progress,
) -> LoraTrainer:
    """Return a trainer that is ready to run.

    Args:
        model: The base model with its adapter, on its device.
        training: The recipe's section.
        train: Encoded rows to train on.
        held_out: Encoded rows for the held-out loss; may be empty.
        work: Folder for checkpoints.
        progress: How to show what has been done.

    Raises:
        TrainingError: If nothing in the model can be trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "no parameter of the model can be trained: it is loaded for inference",
            next_step="Load the adapter with is_trainable=True.",
        )
    attend_in_segments(model)
    if not on_gpu(training):
        use_frozen_layers(model)
    if training.activation_checkpointing:
        checkpoint_activations(model)
    trainer = LoraTrainer(
        model=model,
        args=trainer_arguments(training, has_held_out=bool(held_out), work=work, progress=progress),
        train_dataset=RowDataset(train),
        eval_dataset=RowDataset(held_out) if held_out else None,
        batch_size=training.batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        order_seed=training.seed_of_order,
        share_prefix=training.share_prefix,
        on_oom=training.on_oom,
        stop_at_grad_norm=training.stop_at_grad_norm,
        callbacks=[StopAtNonFinite(), OverflowWatch(training.max_skipped_steps), GenerateTogether()],
    )
    if training.dry_run:
        trainer.add_callback(DryRun(trainer))
    trainer.remove_callback(PrinterCallback)
    if progress == "lines":
        trainer.add_callback(LogLines())
    return trainer


def follow(trainer: LoraTrainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Let callbacks follow a run from its first step to its last, the last held-out loss included."""
    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluateAtEnd())
    for callback in callbacks:
        trainer.add_callback(callback)
