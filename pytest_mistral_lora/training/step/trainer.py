"""The loss since the last line of the log, which a checkpoint keeps: a resumed run logs what it would have logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState

from pytest_mistral_lora.errors import NonFiniteError
from pytest_mistral_lora.training.callbacks import gradient_error, gradient_norm
from pytest_mistral_lora.training.devices import engine, shard_on_cpu
from pytest_mistral_lora.training.step.forward import collate, step_rows, supervised_losses
from pytest_mistral_lora.training.step.oom import OnOom, Relief
from pytest_mistral_lora.training.step.packing import StepRow, split
from pytest_mistral_lora.training.step.sampler import StepSampler


class UnloggedLoss(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sums the losses of the steps, in nats a token."""

    def __init__(self) -> None:
        self._sum, self._steps = 0.0, 0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._sum += loss
        self._steps += 1

    def take(self) -> float:
        """Return the mean over the steps, and begin again."""
        mean = self._sum / self._steps
        self._sum, self._steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Return what transformers writes into the state of a checkpoint."""
        return {"args": {}, "attributes": {"sum": self._sum, "steps": self._steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the sum of the checkpoint, or with none."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        self._sum, self._steps = kept.get("sum", 0.0), kept.get("steps", 0)


def _any_row(dataset: Any) -> StepRow:
    """Return a row that has a loss."""
    return next(row for place in range(len(dataset)) for row in step_rows(collate([dataset[place]])) if row.fed)


class LoraTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the mean over the supervised tokens of the whole optimizer step.

    A batch of its loader is one process's rows of one step. Micro-batches and processes only split the sum.

    Attributes:
        step_rows: This process's rows of the current step: their places in the dataset.
    """

    control: Any
    is_fsdp_enabled: bool
    step_rows: Sequence[int] = ()

    def __init__(
        self,
        *,
        batch_size: int,
        micro_batch_tokens: int,
        order_seed: int,
        share_prefix: bool = False,
        on_oom: OnOom = "stop",
        stop_at_grad_norm: float | None = None,
        **settings: Any,
    ) -> None:
        """Make a trainer.

        Args:
            batch_size: Rows of an optimizer step, over all processes.
            micro_batch_tokens: Most tokens that are fed at once.
            order_seed: Decides the order of the rows.
            share_prefix: Whether rows of a micro-batch that begin alike share the passes of their beginning.
            on_oom: What is done where memory runs out.
            stop_at_grad_norm: Largest L2 norm that the gradients may have, before they are scaled down.
            settings: Whatever Trainer takes.
        """
        super().__init__(data_collator=collate, **settings)
        set_seed(self.args.seed + self.accelerator.process_index)  # else processes would drop out the same places
        self.model_accepts_loss_kwargs = False  # the tokens of a step are counted here
        self.batch_size, self.micro_batch_tokens, self.order_seed = batch_size, micro_batch_tokens, order_seed
        self.share_prefix = share_prefix
        self.relief = Relief(self, on_oom)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stop_at_grad_norm = stop_at_grad_norm
        self._unlogged = UnloggedLoss()
        self.add_callback(self._unlogged)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, with sharding on CPUs, too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_cpu(self.accelerator) or self.is_fsdp_enabled

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Return what a forward pass runs in: autocast, where accelerate has not wrapped the model in it."""
        if self.model.dtype == torch.bfloat16 and not self.args.bf16:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        context: AbstractContextManager[Any] = super().compute_loss_context_manager()
        return context

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the rows of each step, in the order of the seed."""
        return self._loader(self.train_dataset, seed=self.order_seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's share of the held-out rows."""
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def _loader(self, dataset: Any, seed: int | None = None) -> DataLoader[Any]:
        sampler = StepSampler(
            len(dataset),
            self.batch_size,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            seed=seed,
            epoch=lambda: self.state.global_step // len(sampler),
        )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model: Any, inputs: Mapping[str, torch.Tensor], num_items_in_batch: Any = None) -> Any:
        """Compute the gradient of a step, and return its loss: the mean over its supervised tokens, in nats (scalar).

        Each process returns its share times the number of processes, so that their mean is the loss of the step.

        Raises:
            NonFiniteError: If a loss is not finite, in any process, or the gradients are larger than allowed; before
                the optimizer changes a weight.
        """
        model.train()
        rows = step_rows(inputs)
        self.step_rows = [row.index for row in rows]
        what = f"step {self.state.global_step + 1}"
        total: torch.Tensor = self.relief.attempt(what, rows, lambda: self._gradient(model, rows))
        self._refuse_non_finite(total)
        if engine() == "deepspeed" and not math.isfinite(gradient_norm(model)):
            raise gradient_error(self.state.global_step + 1)
        self._refuse_exploding(model)
        return total

    def _gradient(self, model: Any, rows: Sequence[StepRow]) -> torch.Tensor:
        tokens = max(1, self.over_processes(sum(len(row.targets) for row in rows)))
        passes = self._passes(rows, self.train_dataset)
        self.current_gradient_accumulation_steps = len(passes)
        self._seen = []
        total = torch.zeros((), device=self.args.device)
        for number, (part, counts) in enumerate(passes, 1):
            total += self._pass(model, part, tokens=tokens, counts=counts, last=number == len(passes))
        if not passes:  # rows without a label, which the recipe kept: a loss of zero has a gradient of zero
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return total

    def _pass(
        self, model: Any, part: Sequence[StepRow], *, tokens: int, counts: int = 1, last: bool = True
    ) -> torch.Tensor:
        """Add a micro-batch to the gradient, and return its share of the loss; the backward pass is not autocast."""
        with self._synchronised(model, last=last):
            with self.compute_loss_context_manager():
                loss = counts * self.compute_loss(model, part, num_items_in_batch=tokens)
            self.accelerator.backward(loss)
        found: torch.Tensor = loss.detach()
        return found

    def try_largest(self) -> None:
        """Compute the gradient of the largest micro-batch there can be, and forget it; weights stay as they are."""
        size = -(-self.batch_size // self.accelerator.num_processes)
        longest = np.argsort(-self.train_dataset.lengths, kind="stable")[:size].tolist()
        rows = [row for row in step_rows(collate([self.train_dataset[place] for place in longest])) if row.fed]
        if not rows:
            return

        def act() -> None:
            self.current_gradient_accumulation_steps = 1
            part = max(split(rows, self.micro_batch_tokens), key=lambda part: sum(row.fed for row in part))
            tokens = sum(len(row.targets) for row in part)
            self._pass(self.model_wrapped, part, tokens=tokens)

        with torch.random.fork_rng():
            self.model.train()
            self.relief.attempt("a dry run of the largest micro-batch", rows, act)
        self.model.zero_grad(set_to_none=True)

    def compute_loss(
        self, model: Any, inputs: Sequence[StepRow], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> Any:
        """Return the share of a micro-batch in the step's loss, in nats a token (a scalar tensor, float32).

        Args:
            model: The model, as it is wrapped.
            inputs: The rows of the micro-batch.
            return_outputs: Not used: there are no logits to return.
            num_items_in_batch: The supervised tokens of the whole step, over all processes.
        """
        losses, owners = self._losses(model, inputs)
        self._seen.append((losses.detach(), owners))
        # the processes' gradients are averaged afterwards
        return losses.sum() * (self.accelerator.num_processes / num_items_in_batch)

    def _losses(self, model: Any, rows: Sequence[StepRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return supervised_losses(model, rows, inner=self.model, share_prefix=self.share_prefix)

    def _passes(self, rows: Sequence[StepRow], dataset: Any) -> list[tuple[list[StepRow], int]]:
        """Return micro-batches, and whether each counts (1 or 0); as many in every process.

        Sharded models gather weights in each pass, so a process that has fewer passes than another goes along with one
        that does not count.
        """
        parts = split(rows, self.micro_batch_tokens, share_prefix=self.share_prefix)
        idle = self.over_processes(len(parts), "max") - len(parts)
        return [(part, 1) for part in parts] + [([_any_row(dataset)], 0) for _ in range(idle)]

    def over_processes(self, number: int, how: str = "sum") -> int:
        """Return the sum (or `max`) of a number over all processes, the same in each."""
        if self.accelerator.num_processes == 1:
            return number
        everyone = self.accelerator.gather(torch.tensor([number], device=self.args.device))
        return int(everyone.max() if how == "max" else everyone.sum())

    def _synchronised(self, model: Any, *, last: bool) -> AbstractContextManager[Any]:
        """Share gradients with the other processes in the last pass only, where the engine lets us choose."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last or engine() == "deepspeed":
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _refuse_non_finite(self, total: torch.Tensor) -> None:
        everyone = self.accelerator.reduce(total.clone(), "sum")
        if torch.isfinite(everyone):
            self._unlogged.add(everyone.item() / self.accelerator.num_processes)
            return
        own = {int(row) for losses, owners in self._seen for row in owners[~torch.isfinite(losses).cpu()]}
        rows = set(gather_object(list(own)))
        raise NonFiniteError(
            f"the loss is {everyone.item()} at step {self.state.global_step + 1}",
            rows=sorted(rows),
            next_step="Nothing is saved. Lower training.learning_rate, use precision: fp32, check the base.",
        )

    def _refuse_exploding(self, model: Any) -> None:
        if self._stop_at_grad_norm is None:
            return
        scaler = getattr(self.accelerator, "scaler", None)
        norm = gradient_norm(model) / (scaler.get_scale() if scaler else 1)
        if math.isfinite(norm) and norm > self._stop_at_grad_norm:
            raise NonFiniteError(
                f"the gradients' norm is {norm:.4g} at step {self.state.global_step + 1}, above "
                f"training.stop_at_grad_norm = {self._stop_at_grad_norm:g}",
                next_step="Nothing is saved. Look at the rows, lower training.learning_rate, or allow more.",
            )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batch of the next step; none after the last step, from whose checkpoint a run may resume."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """Log figures; the loss is the mean over the steps since the last line, in a resumed run too."""
        super().log({**logs, "loss": self._unlogged.take()} if "loss" in logs else logs, *given, **named)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out loss: the mean over all supervised tokens, in nats.

        Trainer's own is a mean of batch means, which weighs short rows more.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch in self.get_eval_dataloader(dataset):
            for rows, counts in self._passes(step_rows(batch), dataset):
                with torch.no_grad(), self.compute_loss_context_manager():
                    losses, _ = self._losses(self.model_wrapped, rows)
                totals += counts * torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        totals = self.accelerator.reduce(totals, "sum")
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
