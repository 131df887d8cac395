"""One pass over rows of any source: a plan, and the processes that judge the parts of the rows by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pytest_mistral_lora.chat.reading.chunks import SizedPart, in_order
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


class PassPlan(Protocol[ResultT_co]):
    """The settings for judging rows, in a form that crosses process boundaries."""

    @property
    def tokenizer(self) -> Path:
        """The tokenizer file or checkpoint folder."""

    @property
    def oracle_name(self) -> str | None:
        """The declared oracle of a folder without a Mistral tokenizer file, or None."""

    def judge(self, tokenizer: CheckpointTokenizer) -> Callable[..., ResultT_co]:
        """Return the judge of a part of the rows.

        Args:
            tokenizer: The tokenizer of the plan.
        """


def loaded_judge(fast: Any, plan: PassPlan[ResultT]) -> Callable[..., ResultT]:
    """Load the tokenizer of a plan in a process, and return the judge.

    Args:
        fast: The `transformers` tokenizer of the parent process, because converting takes long; None if it has none.
        plan: The plan.
    """
    tokenizer = CheckpointTokenizer(plan.tokenizer, plan.oracle_name)
    if fast is not None:
        tokenizer.use_fast(fast)
    return plan.judge(tokenizer)


def judged_parts(
    plan: PassPlan[ResultT],
    parts: Iterable[SizedPart],
    processes: int,
    tokenizer: CheckpointTokenizer | None = None,
    here: Callable[..., ResultT] | None = None,
) -> Iterator[tuple[ResultT, int]]:
    """Yield the result of each part, in order, with the number of bytes that were read for it.

    Args:
        plan: The plan.
        parts: The parts.
        processes: The number of processes; a tokenizer in memory is used in this process alone.
        tokenizer: The plan's tokenizer, if it is loaded: then this process judges, too.
        here: The judge of this process, if it has one already.

    Raises:
        MistralLoraError: If a process that judges rows dies.
    """
    if tokenizer is None:
        return in_order(partial(loaded_judge, None), plan, parts, processes)
    here = here or plan.judge(tokenizer)
    processes = processes if tokenizer.is_on_disk else 1
    return in_order(partial(loaded_judge, tokenizer.loaded_fast), plan, parts, processes, here)
