"""A transformers Trainer with an exact step: its loss is the mean over the supervised tokens of the whole step.

Trainer is kept for accelerate, FSDP2, DeepSpeed, checkpoints and loggers; batches, loss and evaluation are replaced.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from peft.helpers import disable_input_dtype_casting
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from pytest_mistral_lora.errors import NonFiniteError, is_out_of_memory
from pytest_mistral_lora.training.callbacks import RunningLoss, gradient_error
from pytest_mistral_lora.training.devices import engine
from pytest_mistral_lora.training.rows import input_tokens_of
from pytest_mistral_lora.training.step.forward import collate, step_rows, supervised_losses
from pytest_mistral_lora.training.step.memory_need import shrink_or_stop
from pytest_mistral_lora.training.step.packing import StepRow, StepSampler, fed_tokens, first_fit, micro_batches

OnOom = Literal["stop", "shrink"]
_T = TypeVar("_T")


class LoraTrainer(Trainer):
    """A Trainer whose loss is the mean over the supervised tokens of the whole optimizer step.

    A batch of its loader is one process's rows of one step. Micro-batches and processes only split its sum.

    Attributes:
        step_rows: This process's rows of the current step: their places in the dataset.
        step_longest: The input tokens of the longest of these rows that is computed.
        step_tokens: Supervised tokens of the current step, over all processes.
        gradient_norm: The L2 norm of all gradients of the current step together, before they are scaled down; 0 if
            there is no gradient.
        memory_changes: The settings that were changed because memory ran out, in words; for the log and the manifest.
    """

    control: Any
    is_fsdp_enabled: bool
    step_rows: Sequence[int] = ()
    step_longest: int = 0
    gradient_norm: float = 0.0

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
            micro_batch_tokens: Most input tokens of a micro-batch.
            order_seed: Decides the order of the rows.
            share_prefix: Whether rows of a micro-batch with the same prefix share its passes.
            on_oom: `stop`, or `shrink` to go on with smaller passes, if memory runs out.
            stop_at_grad_norm: Largest L2 norm that the gradients may have, before they are scaled down.
            settings: Other arguments of `transformers.Trainer`.
        """
        super().__init__(data_collator=collate, **settings)
        set_seed((self.args.seed + self.accelerator.process_index) % 2**32)  # each process its own dropout masks
        # else Trainer would count the supervised tokens of each batch as well
        self.model_accepts_loss_kwargs = False
        self.batch_size, self.micro_batch_tokens, self.order_seed = batch_size, micro_batch_tokens, order_seed
        self.share_prefix = share_prefix
        self.on_oom: OnOom = on_oom
        self.memory_changes: list[str] = []
        self._step_losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stop_at_grad_norm = stop_at_grad_norm
        self._norm = torch.zeros(())
        self._running_loss = RunningLoss()
        self.add_callback(self._running_loss)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; also with sharding on CPUs."""
        super().create_accelerator_and_postprocess()
        # accelerate silently turns every launch on CPUs into DDP
        if engine() == "fsdp" and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            for state in (PartialState(), self.accelerator.state):
                state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        # of this trainer alone: Trainer asks for the norm once to clip, and once to log
        self.accelerator.clip_grad_norm_ = self._clip_by_known_norm

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: autocast for a bf16 base, unless accelerate autocasts already."""
        # sharding engines get no bf16 argument (they would cast the adapter), so accelerate does not autocast for them
        if self.model.dtype == torch.bfloat16 and not self.args.bf16:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return cast(AbstractContextManager[Any], super().compute_loss_context_manager())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the rows of each step, in the order of the seed."""
        return self._loader(self.train_dataset, self.order_seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's share of the held-out rows."""
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def _loader(self, dataset: Any, seed: int | None = None) -> DataLoader[Any]:
        sampler = self._sampler(dataset, seed)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    def _sampler(self, dataset: Any, seed: int | None) -> StepSampler:
        sampler = StepSampler(
            input_tokens_of(dataset.encoded),
            self.batch_size,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            seed=seed,
            epoch=lambda: self.state.global_step // len(sampler),
        )
        return sampler

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
        self.step_longest = max((row.num_input_tokens for row in rows), default=0)
        action = f"step {self.state.global_step + 1}"
        total: torch.Tensor = self._attempt(action, rows, lambda: self._accumulate_gradient(model, rows))
        self._refuse_bad_step(model, total)
        return total

    def _attempt(self, action: str, rows: Sequence[StepRow], act: Callable[[], _T]) -> _T:
        """Return the result of `act`, which computes gradients; after an out-of-memory error, try again with less."""
        # the second attempt must draw the dropout of the first
        random = torch.get_rng_state() if self.on_oom == "shrink" else None
        cuda_random = [] if random is None else torch.cuda.get_rng_state_all()
        while True:
            try:
                with self._inputs_as_they_are():
                    return act()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # outside the handler: its traceback would hold the tensors of the failed pass
            self.model.zero_grad(set_to_none=True)
            if random is not None:
                torch.set_rng_state(random)
                torch.cuda.set_rng_state_all(cuda_random)
            gc.collect()
            torch.cuda.empty_cache()
            self.memory_changes.append(shrink_or_stop(self, f"{action} ran out of memory ({reason})", rows))

    def _inputs_as_they_are(self) -> AbstractContextManager[None]:
        """Keep PEFT from casting the input of each adapted layer to float32, within the block.

        Autocast would cast it back, and each layer would keep a copy. Without autocast a layer needs the cast, and DoRA
        takes its norms in the dtype of the input.
        """
        has_autocast = self.model.dtype == torch.bfloat16 or self.args.fp16
        has_dora = any(config.use_dora for config in getattr(self.model, "peft_config", {}).values())
        active = has_autocast and not has_dora
        return cast(AbstractContextManager[None], disable_input_dtype_casting(self.model, active=active))

    def _accumulate_gradient(self, model: Any, rows: Sequence[StepRow]) -> torch.Tensor:
        # the mean of the step, not of a micro-batch or a process: all divide by the same count
        self.step_tokens = self.reduce_over_processes(sum(len(row.targets) for row in rows))
        tokens = max(1, self.step_tokens)
        passes = self._passes(rows, self.train_dataset)
        self.current_gradient_accumulation_steps = len(passes)  # for Trainer; this class does not divide by it
        self._step_losses = []
        total = torch.zeros((), device=self.args.device)
        for number, (batch, counts) in enumerate(passes, 1):
            total += self._add_gradient(model, batch, tokens=tokens, counts=counts, last=number == len(passes))
        if not passes:  # rows without a label, which the recipe kept: a loss of zero has a gradient of zero
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return total

    def _add_gradient(
        self, model: Any, batch: Sequence[StepRow], *, tokens: int, counts: int = 1, last: bool = True
    ) -> torch.Tensor:
        """Add a micro-batch to the gradient, and return its share of the loss."""
        # Trainer would set this for each batch of its own; here a batch of the loader is the whole step
        self.accelerator.gradient_state._set_sync_gradients(last)
        # DDP and FSDP2 exchange gradients in the last pass only; DeepSpeed decides by itself and refuses no_sync
        waits = not last and engine() != "deepspeed"
        with self.accelerator.no_sync(model) if waits else nullcontext():
            with self.compute_loss_context_manager():
                loss: torch.Tensor = counts * self.compute_loss(model, batch, num_items_in_batch=tokens)
            # outside autocast, as https://pytorch.org/docs/stable/amp.html asks: it uses the dtypes of the forward pass
            self.accelerator.backward(loss)
        return loss.detach()

    def try_largest(self) -> int:
        """Compute and keep the gradient of the largest micro-batch of the run, beside the optimizer's moments.

        All processes try the same one.

        Returns:
            Input tokens of its longest row; 0 if no row has a supervised token.
        """
        largest = cache(self._largest_micro_batch)
        rows = [*largest(self.micro_batch_tokens)]
        if not rows:
            return 0

        def run_largest() -> None:
            # another one, if memory ran out and micro-batches became smaller
            rows[:] = largest(self.micro_batch_tokens)
            self.current_gradient_accumulation_steps = 1
            self._add_gradient(self.model_wrapped, rows, tokens=sum(len(row.targets) for row in rows))

        # the first step must draw the same dropout as without a dry run
        with torch.random.fork_rng(), self._room_for_moments():
            self.model.train()
            self._attempt("a dry run of the largest micro-batch", rows, run_largest)
        return max(row.num_input_tokens for row in rows)

    def _largest_micro_batch(self, most_tokens: int) -> list[StepRow]:
        """Return the micro-batch that feeds the most tokens in the rest of the run, among those of all processes."""
        sampler = self._sampler(self.train_dataset, self.order_seed)
        tokens = input_tokens_of(self.train_dataset.encoded).tolist()
        possible = max(most_tokens, max(tokens))
        largest: list[int] = []
        most = 0
        for share in sampler.shares(self.state.global_step, self.state.max_steps):
            for places, fed in self._fed_together(share, tokens, most_tokens):
                if fed > most:
                    largest, most = places, fed
            if most == possible:
                break
        return self._rows_at(largest)

    def _rows_at(self, places: Sequence[int]) -> list[StepRow]:
        return step_rows(collate([self.train_dataset[place] for place in places]))

    def _fed_together(
        self, share: Sequence[int], tokens: Sequence[int], most_tokens: int
    ) -> Iterator[tuple[list[int], int]]:
        """Yield the rows of each micro-batch of a process's rows, with the tokens that are fed for them."""
        if self.share_prefix:
            # ids decide which tokens are shared
            for batch in micro_batches(self._rows_at(share), most_tokens, share_prefix=True):
                yield [row.index for row in batch], fed_tokens(batch, share_prefix=True)
            return
        supervised = [place for place in share if tokens[place]]
        for chosen in first_fit([tokens[place] for place in supervised], most_tokens):
            places = [supervised[number] for number in chosen]
            yield places, sum(tokens[place] for place in places)

    @contextmanager
    def _room_for_moments(self) -> Iterator[None]:
        """Hold the memory of the optimizer's two moments within the block, unless the optimizer has it already."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        dtype = torch.uint8 if "8bit" in str(self.args.optim) else torch.float32
        held = [] if self.optimizer.state else [torch.zeros_like(one, dtype=dtype) for one in (*trained, *trained)]
        yield
        held.clear()

    def compute_loss(
        self, model: Any, inputs: Sequence[StepRow], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> Any:
        """Return the share of a micro-batch in the step's loss, in nats a token (a scalar tensor, float32).

        Args:
            model: The model with the engine's wrapper.
            inputs: The rows of the micro-batch.
            return_outputs: Not used: there are no logits to return.
            num_items_in_batch: The supervised tokens of the whole step, over all processes.
        """
        losses, row_indices = supervised_losses(model, inputs, inner=self.model, share_prefix=self.share_prefix)
        self._step_losses.append((losses.detach(), row_indices))
        # engines average the gradients of the processes: the factor turns the mean into a sum
        return losses.sum() * (self.accelerator.num_processes / num_items_in_batch)

    def _passes(self, rows: Sequence[StepRow], dataset: Any) -> list[tuple[list[StepRow], int]]:
        """Return micro-batches, and whether each counts (1 or 0); the same number in every process."""
        batches = micro_batches(rows, self.micro_batch_tokens, share_prefix=self.share_prefix)
        # sharded models gather weights in each pass: a process with fewer passes joins in with passes that do not count
        idle = self.reduce_over_processes(len(batches), "max") - len(batches)
        filler: list[StepRow] = []
        if idle:
            candidates = (row for place in range(len(dataset)) for row in step_rows(collate([dataset[place]])))
            filler = [next(row for row in candidates if row.num_input_tokens)]
        return [(batch, 1) for batch in batches] + [(filler, 0)] * idle

    def reduce_over_processes(self, number: int, how: str = "sum") -> int:
        """Return the sum (or `max`) of a number over all processes, the same in each; every process must call it."""
        if self.accelerator.num_processes == 1:
            return number
        numbers = self.accelerator.gather(torch.tensor([number], device=self.args.device))
        return int(numbers.max() if how == "max" else numbers.sum())

    def _refuse_bad_step(self, model: Any, total: torch.Tensor) -> None:
        step = self.state.global_step + 1
        self._norm = self._measured_norm(model)
        # reduced first: a process that raised alone would leave the others waiting
        loss = self.accelerator.reduce(total.clone(), "sum")
        # read together, once: each reading waits for the GPU
        both = torch.stack([loss.double(), self._norm.to(loss.device, torch.float64)])
        summed, self.gradient_norm = both.tolist()
        if not math.isfinite(summed):
            bad_rows = {int(row) for losses, rows in self._step_losses for row in rows[~torch.isfinite(losses).cpu()]}
            raise NonFiniteError(
                f"the loss is {summed} at step {step}",
                rows=sorted(set(gather_object(list(bad_rows)))),
                next_step="Nothing is saved. Lower training.learning_rate, use precision: fp32, check the base.",
            )
        self._running_loss.add(summed / self.accelerator.num_processes)
        is_finite, limit = math.isfinite(self.gradient_norm), self._stop_at_grad_norm
        # DeepSpeed's engine steps inside backward(), before the callback that looks at gradients elsewhere
        if engine() == "deepspeed" and not is_finite:
            raise gradient_error(step)
        if limit is not None and is_finite and self.gradient_norm > limit:
            raise NonFiniteError(
                f"the gradients' norm is {self.gradient_norm:.4g} at step {step}, above training.stop_at_grad_norm = "
                f"{limit:g}",
                next_step="Nothing is saved. Look at the rows, lower training.learning_rate, or allow more.",
            )

    def _measured_norm(self, model: Any) -> torch.Tensor:
        """Return the L2 norm of all gradients together, a scalar; the scale of fp16 is taken out of them first."""
        if engine() == "deepspeed":
            # the engine keeps the gradients in flat buffers, and measures their norm in each step
            return torch.as_tensor(model.get_global_grad_norm())
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
        # a sharded gradient is a DTensor, and so is its norm: each process has a part of the sum
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _clip_by_known_norm(self, parameters: Iterable[Any], max_norm: float, norm_type: float = 2) -> float:
        """Scale gradients down to a norm, as accelerate does, by the norm that was measured; return that norm."""
        if engine() != "deepspeed" and max_norm != math.inf:  # DeepSpeed scales by itself; Trainer only asks with inf
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, self._norm)
        return self.gradient_norm

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batch of the next step; empty after the last step, from whose checkpoint a run may resume."""
        # Trainer would make another step in a run that resumes from the checkpoint of its last step
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return cast(tuple[list[Any], Any], super().get_batch_samples(epoch_iterator, num_batches, device))

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """Log figures; the loss is the mean over the steps since the last line, in a resumed run too."""
        super().log({**logs, "loss": self._running_loss.take()} if "loss" in logs else logs, *given, **named)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out loss: the mean over all supervised tokens, in nats.

        Trainer's own loss is a mean of batch means, which gives short rows more weight.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch in self.get_eval_dataloader(dataset):
            for rows, counts in self._passes(step_rows(batch), dataset):
                with torch.no_grad(), self._inputs_as_they_are(), self.compute_loss_context_manager():
                    losses, _ = supervised_losses(
                        self.model_wrapped, rows, inner=self.model, share_prefix=self.share_prefix
                    )
                totals += counts * torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        totals = self.accelerator.reduce(totals, "sum")
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
