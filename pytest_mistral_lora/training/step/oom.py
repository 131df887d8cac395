"""The handling of a step that needs more memory than there is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch.distributed.tensor import DTensor

from pytest_mistral_lora.errors import MemoryShortageError, is_out_of_memory
from pytest_mistral_lora.training.step.memory_need import (
    checkpoint_activations,
    checkpointed_layers,
    in_words,
    measure_need,
    memory_limit,
    memory_savings,
)
from pytest_mistral_lora.training.step.packing import StepRow, micro_batches

OnOom = Literal["stop", "shrink"]
_T = TypeVar("_T")


class OutOfMemoryHandler:
    """Runs an action that may need too much memory, and repeats it with less, or stops, by the recipe's `on_oom`.

    Attributes:
        changes: The settings that were changed so that the run could go on, in words; for the log and the manifest.
    """

    def __init__(self, trainer: Any, on_oom: OnOom) -> None:
        """Make a handler.

        Args:
            trainer: The trainer, whose `micro_batch_tokens` may be lowered.
            on_oom: `stop`, or `shrink` if the step can stay the same.
        """
        self._trainer, self._on_oom = trainer, on_oom
        self.changes: list[str] = []

    def attempt(self, action: str, rows: Sequence[StepRow], act: Callable[[], _T]) -> _T:
        """Return the result of `act` on some rows; after an out-of-memory error, try again with fewer tokens at a time.

        Args:
            action: Name of the action, for the message.
            rows: The rows that are fed.
            act: Computes gradients, and changes no weight.

        Raises:
            MemoryShortageError: If there is not enough memory, and nothing may or can be changed.
        """
        # the second attempt must draw the dropout of the first
        random = torch.get_rng_state() if self._on_oom == "shrink" else None
        cuda_random = torch.cuda.get_rng_state_all() if random is not None and torch.cuda.is_available() else []
        while True:
            try:
                return act()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # outside the handler: its traceback would hold the tensors of the failed pass
            self._trainer.model.zero_grad(set_to_none=True)
            if random is not None:
                torch.set_rng_state(random)
                for device, state in enumerate(cuda_random):
                    torch.cuda.set_rng_state(state, device)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._shrink_or_stop(action, rows, reason)

    def _shrink_or_stop(self, action: str, rows: Sequence[StepRow], reason: str) -> None:
        trainer = self._trainer
        batches = micro_batches(rows, trainer.micro_batch_tokens)
        tokens = max((sum(row.num_input_tokens for row in batch) for batch in batches), default=0)
        longest = max((row.num_input_tokens for row in rows), default=0)
        # several processes would have to agree: their numbers of passes must be equal
        may_shrink = self._on_oom == "shrink" and trainer.accelerator.num_processes == 1
        if may_shrink and tokens > longest:
            trainer.micro_batch_tokens = max(longest, tokens // 2)
            change = f"micro_batch_tokens: {trainer.micro_batch_tokens}"
        elif may_shrink and not checkpointed_layers(trainer.model):
            checkpoint_activations(trainer.model)
            change = "activation_checkpointing: true"
        else:
            raise self._shortage(f"{action} ran out of memory ({reason})", tokens, longest)
        self.changes.append(f"{change} from step {trainer.state.global_step + 1} on")
        sys.stderr.write(f"{action} ran out of memory ({reason}); going on with {change}, which changes no gradient\n")

    def _shortage(self, failure: str, tokens: int, longest: int) -> MemoryShortageError:
        model, device = self._trainer.model, self._trainer.args.device
        # sharded by FSDP2, or by ZeRO-3, which marks its parameters by ds_id
        if any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters()):
            # measuring the need takes a pass, and the other processes do not take part in it
            return MemoryShortageError(
                f"{failure}: {tokens} tokens at once",
                next_step="Lower training.micro_batch_tokens, set activation_checkpointing: true, or share the base "
                "over more devices.",
            )
        limit, checkpointed = memory_limit(device), bool(checkpointed_layers(model))
        need = measure_need(model)
        # these tokens did not fit: an estimate that says they do is too small
        unexplained = limit - need.total(tokens, checkpointed=checkpointed)
        if unexplained > 0 and tokens:
            more = unexplained // tokens + 1
            need = replace(need, token=need.token + more, checkpointed_token=need.checkpointed_token + more)
        advice = ["These settings need less, in the order of least harm:"]
        for saving in memory_savings(need, limit, tokens=tokens, longest=longest, checkpointed=checkpointed):
            fits = "fits" if saving.bytes <= limit else "does not fit"
            advice.append(f"  {saving.setting}: about {in_words(saving.bytes)}, {fits}; {saving.cost}")
        return MemoryShortageError(
            f"{failure}: {tokens} tokens at once need about "
            f"{in_words(need.total(tokens, checkpointed=checkpointed))}, and there are {in_words(limit)} on {device}",
            next_step="\n".join(advice),
        )
