"""What happens where memory runs out: a dry run finds out before the first step, and a way on is taken or told."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.errors import MemoryShortageError, is_out_of_memory
from pytest_mistral_lora.training.devices import engine, is_divided
from pytest_mistral_lora.training.step.memory import (
    Need,
    checkpoint_activations,
    is_checkpointed,
    memory_limit,
    need_of,
    ways,
)
from pytest_mistral_lora.training.step.packing import StepRow, split

OnOom = Literal["stop", "shrink"]
_ADVICE = "Lower training.micro_batch_tokens, set activation_checkpointing: true, or share the base over more devices."
_T = TypeVar("_T")


class Relief:
    """Runs what may need too much memory, and does what the recipe says where it does.

    Attributes:
        taken: What was changed so that the run could go on, in words; for the log and the manifest.
    """

    def __init__(self, trainer: Any, on_oom: OnOom) -> None:
        """Make it.

        Args:
            trainer: The trainer, whose `micro_batch_tokens` may be lowered.
            on_oom: `stop`, or `shrink` where the step can stay the same.
        """
        self._trainer, self._on_oom = trainer, on_oom
        self.taken: list[str] = []

    def attempt(self, what: str, rows: Sequence[StepRow], act: Callable[[], _T]) -> _T:
        """Return what `act` does with some rows; again, with less at a time, where memory ran out.

        Args:
            what: What is done, for the message.
            rows: The rows that are fed.
            act: Computes gradients, and changes no weight.

        Raises:
            MemoryShortageError: If there is not enough memory, and nothing may or can be changed.
        """
        random = _random_state() if self._on_oom == "shrink" else None
        while True:
            try:
                return act()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            # outside the handler: its traceback would hold the tensors of the failed pass
            self._trainer.model.zero_grad(set_to_none=True)
            if random is not None:
                _set_random_state(random)
            _free()
            self._shrink(what, rows, said)

    def _shrink(self, what: str, rows: Sequence[StepRow], said: str) -> None:
        trainer = self._trainer
        tokens = max((sum(row.fed for row in part) for part in split(rows, trainer.micro_batch_tokens)), default=0)
        longest = max((row.fed for row in rows), default=0)
        if self._on_oom == "stop" or trainer.accelerator.num_processes > 1:
            raise self._error(what, tokens, longest, said)
        if tokens > longest:
            trainer.micro_batch_tokens = max(longest, tokens // 2)
            change = f"micro_batch_tokens: {trainer.micro_batch_tokens}"
        elif not is_checkpointed(trainer.model):
            checkpoint_activations(trainer.model)
            change = "activation_checkpointing: true"
        else:
            raise self._error(what, tokens, longest, said)
        self.taken.append(f"{change} from step {trainer.state.global_step + 1} on")
        sys.stderr.write(f"{what} ran out of memory ({said}); going on with {change}, which changes no gradient\n")

    def _error(self, what: str, tokens: int, longest: int, said: str) -> MemoryShortageError:
        model, device = self._trainer.model, self._trainer.args.device
        limit, checkpointed = memory_limit(device), is_checkpointed(model)
        if is_divided(model):
            # measuring what is needed takes a pass, and the other processes do not go along with it
            raise MemoryShortageError(f"{what} ran out of memory ({said}): {tokens} tokens at once", next_step=_ADVICE)
        need = _at_least(need_of(model), limit, tokens, checkpointed)
        found = (
            f"{what} ran out of memory ({said}): {tokens} tokens at once need about "
            f"{_size(need.total(tokens, checkpointed=checkpointed))}, and there are {_size(limit)} on {device}"
        )
        advice = ["What needs less, in the order of least harm:"]
        advice += [
            f"  {way.setting}: about {_size(way.bytes)}, {'fits' if way.bytes <= limit else 'does not fit'}; {way.cost}"
            for way in ways(need, limit, tokens=tokens, longest=longest, checkpointed=checkpointed)
        ]
        return MemoryShortageError(found, next_step="\n".join(advice))


def _at_least(need: Need, limit: int, tokens: int, checkpointed: bool) -> Need:
    """Correct an estimate by what is known: these tokens did not fit."""
    short = limit - need.total(tokens, checkpointed=checkpointed)
    if short <= 0 or not tokens:
        return need
    more = short // tokens + 1
    return replace(need, token=need.token + more, checkpointed_token=need.checkpointed_token + more)


class DryRun(TrainerCallback):  # type: ignore[misc]
    """Before the first step, try the largest micro-batch there can be: better now than after hours."""

    def __init__(self, trainer: Any) -> None:
        """Make it for a trainer."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the pass; weights, gradients and random state are as before.

        Raises:
            MemoryShortageError: If there is not enough memory for it.
        """
        # DeepSpeed's engine would take the gradient for that of a step
        if engine() != "deepspeed":
            self._trainer.try_largest()


def _random_state() -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.0f} MiB"
