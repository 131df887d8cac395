"""The processes of a run: what one of them finds stops all of them, and the first one reports."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch

from pytest_mistral_lora.errors import GuardError, one_line
from pytest_mistral_lora.escaping import safe_text
from pytest_mistral_lora.judging import Verdict

_LOG = logging.getLogger(__name__)


def count_processes() -> int:
    """Return the number of processes of the run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def is_first_process() -> bool:
    """Return whether this is the process that reports."""
    return count_processes() == 1 or torch.distributed.get_rank() == 0


def from_each_process(value: Any) -> list[Any]:
    """Return a value of each process, in the order of their ranks; every process must call it."""
    if count_processes() == 1:
        return [value]
    found: list[Any] = [None] * count_processes()
    torch.distributed.all_gather_object(found, value)
    return found


def failures_of_each(failure: str) -> list[tuple[int, str]]:
    """Return the rank and the failure of each process that has one; every process must call it.

    Args:
        failure: That of this process; empty for none.
    """
    return [(rank, text) for rank, text in enumerate(from_each_process(failure)) if text]


def raise_together(moment: str, failures: Sequence[tuple[int, str]], verdict: Verdict | None) -> NoReturn:
    """Stop the run, in each process with the failure of the first one that has one.

    Args:
        moment: When it is stopped, in words.
        failures: The rank and the verdict of each process that found an error.
        verdict: The verdict of this process.

    Raises:
        GuardError: Always.
    """
    rank, text = failures[0]
    of_process = f" (process {rank} of {count_processes()})" if count_processes() > 1 else ""
    raise GuardError(f"the run is stopped {moment}{of_process}\n{text}", verdict=verdict)


def say(line: str) -> None:
    """Print a line, if there is somewhere to print it to."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stdout.write(f"{safe_text(line)}\n")
        sys.stdout.flush()


def log_crash(error: Exception) -> None:
    """Log an error of the guard itself, with which the run goes on."""
    _LOG.warning("not checked: the guard ended with %s: %s", type(error).__name__, one_line(error))
    _LOG.debug("the error of the guard", exc_info=error)
