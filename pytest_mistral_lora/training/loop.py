"""The training loop: transformers' Trainer, with the loss of a whole step and a stop at non-finite numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.errors import RecipeError, TrainingError
from pytest_mistral_lora.training.data import PadRight, RowDataset
from pytest_mistral_lora.training.recipe import Training

Progress = Literal["none", "lines", "bar"]
"""How a run shows what has been done: not at all, a line for each line of the log, or a progress bar."""

_FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate")


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


def evaluated(trainer: LoraTrainer) -> bool:
    """Say whether the log has a held-out loss of the last step."""
    return any("eval_loss" in line and line["step"] == trainer.state.global_step for line in trainer.state.log_history)


class StopAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Refuse an optimizer step whose gradients are not finite: the adapter stays as it was."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check every gradient.

        Raises:
            TrainingError: If one holds NaN or infinity.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            raise TrainingError(f"no tensor has a gradient at step {state.global_step + 1}")
        if not torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum()):
            raise TrainingError(
                f"a gradient is not finite at step {state.global_step + 1}",
                next_step="Nothing is saved. Lower training.learning_rate, or use precision: fp32.",
            )


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Write a line to standard error for each line of the log: for CI and log files, where a bar is of no use."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the step and its figures; one process of a distributed run writes."""
        figures = [f"{name} {value:.4g}" for name, value in (logs or {}).items() if name in _FIGURES]
        if figures and state.is_world_process_zero:
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}: {', '.join(figures)}\n")
            sys.stderr.flush()


def make_trainer(
    model: Any,
    training: Training,
    train: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow],
    *,
    pad_id: int,
    work: Path,
    progress: Progress,
) -> LoraTrainer:
    """Return a trainer that is ready to run.

    Args:
        model: The base model with its adapter, on its device.
        training: The recipe's section.
        train: Encoded rows to train on.
        held_out: Encoded rows for the held-out loss; may be empty.
        pad_id: The id that pads a batch.
        work: Folder for checkpoints.
        progress: How to show what has been done.

    Raises:
        RecipeError: If the batch cannot be divided over the devices.
        TrainingError: If nothing in the model can be trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "no parameter of the model can be trained: it is loaded for inference",
            next_step="Load the adapter with is_trainable=True.",
        )
    if training.activation_checkpointing:
        _checkpoint_activations(model)
    trainer = LoraTrainer(
        model=model,
        args=_arguments(training, bool(held_out), work, progress),
        train_dataset=RowDataset(train),
        eval_dataset=RowDataset(held_out) if held_out else None,
        data_collator=PadRight(pad_id),
        callbacks=[StopAtNonFinite()],
    )
    trainer.remove_callback(PrinterCallback)
    if progress == "lines":
        trainer.add_callback(LogLines())
    return trainer


def on_gpu(training: Training) -> bool:
    """Say whether the model runs on a GPU.

    Raises:
        RecipeError: If the recipe asks for CUDA and there is none.
    """
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise RecipeError("'cuda', but no CUDA device is available", place="training.device", expected="auto or cpu")
    return available and training.device != "cpu"


def precision_of(training: Training) -> Any:
    """Return `bf16` or `fp32`: what the recipe says, or what `auto` comes to here."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if on_gpu(training) and torch.cuda.is_bf16_supported() else "fp32"


def device_count() -> int:
    """Return the number of processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _arguments(training: Training, has_held_out: bool, work: Path, progress: Progress) -> TrainingArguments:
    # the recipe alone decides: transformers would take what a launcher, or an earlier run in this process, has set
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if not _warms_to_constant(training) else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=_accumulation(training),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        seed=training.seed,
        data_seed=training.seed if training.order_seed is None else training.order_seed,
        bf16=precision_of(training) == "bf16",
        use_cpu=not on_gpu(training),
        **_bookkeeping(training, has_held_out, progress),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=on_gpu(training),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
    )
    # with several GPUs and no launcher, Trainer would split batches over threads (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _bookkeeping(training: Training, has_held_out: bool, progress: Progress) -> dict[str, Any]:
    """Return what is logged, evaluated and kept, and when."""
    return {
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_on_start": has_held_out,
        "eval_strategy": "steps" if has_held_out and training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": progress != "bar",
    }


def _warms_to_constant(training: Training) -> bool:
    return training.schedule == "constant" and training.warmup_steps > 0


def _accumulation(training: Training) -> int:
    """Return the micro-batches of one device in one optimizer step."""
    devices = device_count()
    steps, rest = divmod(training.batch_size, training.micro_batch_size * devices)
    if rest:
        raise RecipeError(
            f"{training.batch_size} rows over {devices} devices in micro-batches of {training.micro_batch_size}",
            place="training.batch_size",
            expected="a multiple of micro_batch_size times devices",
        )
    return steps


def _checkpoint_activations(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # reentrant checkpointing loses the gradient where no input of a layer needs one (frozen embeddings)
    enable({"use_reentrant": False})
