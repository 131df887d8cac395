"""Make the trainer of a recipe: its model's attention and kernels, its arguments and its callbacks."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.adapter import ATTENDED, refuse_layers_without_gradient
from pytest_mistral_lora.training.callbacks import OverflowWatch, StopAtNonFinite
from pytest_mistral_lora.training.devices import check_sharded_layers, engine, on_gpu, precision_of
from pytest_mistral_lora.training.recipe import Training
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.step.forward import attend_in_segments
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.liger import use_liger
from pytest_mistral_lora.training.step.memory_need import checkpoint_activations
from pytest_mistral_lora.training.step.trainer import LoraTrainer


class GenerateTogether(TrainerCallback):
    """Lets processes that shard a model generate with the model."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Register `generate` as a forward pass."""
        # FSDP2 gathers weights in `forward` only, unless told otherwise; transformers does so from version 5 on
        is_wrapped = isinstance(model, FSDPModule)
        if is_wrapped and "generate" not in vars(model):
            register_fsdp_forward_method(model, "generate")


@dataclass(eq=False)
class DryRun(TrainerCallback):
    """Tries the largest possible micro-batch before the first step, so that a run fails early and not after hours.

    The gradient of this pass shows whether each adapted layer is trained; in a short run, that of the first step does.

    Attributes:
        trainer: The trainer.
        training: The recipe's section.
    """

    trainer: Any
    training: Training
    _looks_at_step: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the pass; weights, gradients and random state are as before.

        Raises:
            MemoryShortageError: If the memory is too small.
            TrainingError: If an adapted layer gets no gradient.
        """
        # DeepSpeed's engine would mistake the gradient for a step's
        if engine() == "deepspeed":
            return
        if not self.training.tries_largest(state.max_steps - state.global_step):
            self._looks_at_step = True
            return
        if self.trainer.try_largest() >= ATTENDED:
            refuse_layers_without_gradient(self.trainer.model)
        self.trainer.model.zero_grad(set_to_none=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradient of the first step that does not overflow, if there was no pass before it.

        Raises:
            TrainingError: If an adapted layer gets no gradient.
        """
        # clipping makes zeros of the finite parts of a gradient that overflows
        if not self._looks_at_step or not math.isfinite(self.trainer.gradient_norm):
            return
        self._looks_at_step = False
        if self.trainer.reduce_over_processes(self.trainer.step_longest, "max") >= ATTENDED:
            refuse_layers_without_gradient(self.trainer.model)


def make_trainer(
    model: Any,
    training: Training,
    train: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow],
    *,
    work: Path,
) -> LoraTrainer:
    """Return a trainer, ready to run; `model` is changed in place.

    Args:
        model: The base model with its adapter, on its device.
        training: The recipe's section.
        train: Encoded rows to train on.
        held_out: Encoded rows for the held-out loss; may be empty.
        work: Folder for checkpoints.

    Raises:
        TrainingError: If nothing in the model can be trained.
        InputError: As for `check_sharded_layers`.
    """
    check_sharded_layers(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "no parameter of the model can be trained: it is loaded for inference",
            next_step="Load the adapter with is_trainable=True.",
        )
    attend_in_segments(model)
    # DeepSpeed gathers a module's weights when that module is called, and these passes read them from outside
    if engine() != "deepspeed":
        use_frozen_layers(model)
    if training.kernels == "liger":
        use_liger(model)
    if training.activation_checkpointing:
        checkpoint_activations(model)
    # TrainingArguments sets it again for bf16 and fp16. A launcher, or an earlier run of this process, may have left
    # another value, which accelerate would follow: the recipe alone decides
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    trainer = LoraTrainer(
        model=model,
        args=trainer_arguments(training, has_held_out=bool(held_out), work=work),
        train_dataset=RowDataset(train),
        eval_dataset=RowDataset(held_out) if held_out else None,
        batch_size=training.batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        order_seed=training.seed_of_order,
        share_prefix=training.share_prefix,
        on_oom=training.on_oom,
        stop_at_grad_norm=training.stop_at_grad_norm,
        callbacks=[OverflowWatch(training.max_skipped_steps), GenerateTogether()],
    )
    trainer.add_callback(StopAtNonFinite(trainer))
    if training.dry_run is not False:
        trainer.add_callback(DryRun(trainer, training))
    # without a progress bar, Trainer prints dicts to standard output, which is for the folder's path
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_arguments(training: Training, *, has_held_out: bool, work: Path) -> TrainingArguments:
    """Return transformers' arguments of a run.

    Args:
        training: The recipe's section.
        has_held_out: Whether there are rows for a held-out loss.
        work: Folder for checkpoints.

    Raises:
        RecipeError: If the device is missing.
    """
    precision = precision_of(training)
    # transformers 5 has no warmup_ratio: it takes a number of warmup_steps below 1 for a fraction
    ratio = "warmup_ratio" if hasattr(TrainingArguments, "warmup_ratio") else "warmup_steps"
    warmup = {ratio: training.warmup_ratio} if training.warmup_ratio else {"warmup_steps": training.warmup_steps}
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        **optimizer_settings(training),
        **schedule_settings(training),
        **warmup,
        # one batch of the loader is a step; micro-batches are made of it
        gradient_accumulation_steps=1,
        optim=optimizer_name(training, precision),
        # an engine that shards would cast the adapter and its gradients, too
        bf16=precision == "bf16" and engine() in ("none", "ddp"),
        fp16=precision == "fp16",
        use_cpu=not on_gpu(training),
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # the filter would log an average in place of a NaN
        logging_nan_inf_filter=False,
        eval_on_start=has_held_out,
        eval_strategy="steps" if has_held_out and training.eval_steps else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        # without a number of steps, only the last one
        save_steps=training.checkpoint_steps or sys.maxsize,
        # loggers are added one by one: "all", the default of transformers 4, sends data to whatever is installed
        report_to="none",
        # the run's display draws its own bar
        disable_tqdm=True,
        # the columns are those of this trainer's collator, not of the model's forward pass
        remove_unused_columns=False,
        # the rows are packed into other tensors, which are pinned
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    # with several GPUs and no launcher, Trainer would split batches over threads (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def optimizer_settings(training: Training) -> dict[str, Any]:
    """Return the settings of the optimizer, and the seed, under the names of transformers' arguments."""
    return {
        "learning_rate": training.learning_rate,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.epsilon,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
    }


def schedule_settings(training: Training) -> dict[str, Any]:
    """Return the schedule of a recipe, without its warm-up, under the names of transformers' arguments."""
    # transformers' constant schedule ignores warm-up steps
    if training.schedule == "constant" and (training.warmup_steps or training.warmup_ratio):
        return {"lr_scheduler_type": "constant_with_warmup"}
    if training.min_learning_rate_ratio:
        kwargs = {"min_lr_rate": training.min_learning_rate_ratio}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    return {"lr_scheduler_type": training.schedule}


def optimizer_name(training: Training, precision: str) -> str:
    """Return transformers' name of a recipe's optimizer, at a precision of `bf16`, `fp16` or `fp32`."""
    if training.optimizer != "adamw":
        return training.optimizer
    # a fused kernel skips an overflowing step by itself: accelerate does not notice, and lets the schedule go on
    return "adamw_torch" if precision == "fp16" else "adamw_torch_fused"
