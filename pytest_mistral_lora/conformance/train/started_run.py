"""Start the first tiny run of a session in a process beside the checks: a copy of this one, or a new interpreter."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from pytest_mistral_lora.checkpoint.tiny_model import TinyKind
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.saved_adapter import ForkedProcess
from pytest_mistral_lora.extras import require_extra

_NEEDED_BY_BOTH = ("torch", "transformers.models.auto.tokenization_auto")
"""Libraries that the checks of a tokenizer need, and the tiny run: a copy of this process has them imported."""


def start(target: Target, work_folder: Path, *, device: str) -> Callable[[], None] | None:
    """Start the tiny run of a target, for `attempt` to wait for.

    If its process ends early, `attempt` makes the run itself.

    Returns:
        The function that ends the process; None if the run cannot start.
    """
    try:
        require_extra("train")
        file, label = target.oracle.path, TinyKind.of(target.checkpoint).label
    except Exception:  # missing torch, or a tokenizer, base or recipe that does not load: a check reports it
        return None
    run = (str(file), str(work_folder), device, label)
    return (_in_a_copy if _can_be_copied() else _in_a_new_interpreter)(*run)


def _can_be_copied() -> bool:
    """Import the libraries, and return whether a copy of this process can train as a new interpreter does.

    It cannot if a conftest.py has used the libraries before: a default dtype, or a patch, would change the run.
    """
    changed = any(name.partition(".")[0] in sys.modules for name in (*_NEEDED_BY_BOTH, "peft"))
    # a thread may hold a lock that its copy never gives back; a tracer would trace the training
    if changed or threading.active_count() > 1 or sys.gettrace() is not None or sys.platform != "linux":
        return False
    # what is garbage now would stay
    gc.collect()
    for name in _NEEDED_BY_BOTH:
        import_module(name)
    # their objects are never garbage, and each collection would walk them, in both processes; pytest's end makes five
    gc.freeze()
    return ForkedProcess.is_possible()


def _in_a_copy(*run: str) -> Callable[[], None]:
    process = multiprocessing.get_context("fork").Process(target=_make, args=run)
    process.start()

    def end() -> None:
        process.kill()
        process.join()

    return end


def _make(tokenizer: str, folder: str, device: str, label: str) -> None:
    """Make a tiny run in this process, which was started for it alone."""
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.conformance.train.tiny_run import attempt

    # transformers' Trainer imports it, and pandas with it, to recognise data that a tiny run does not have
    sys.modules.setdefault("datasets", None)  # type: ignore[arg-type]
    # pytest's captured output is a file that the two processes share
    with Path(os.devnull).open("r+b") as nowhere:
        for descriptor in range(3):
            os.dup2(nowhere.fileno(), descriptor)
    attempt(Oracle(tokenizer), Path(folder), device=device, kind=TinyKind.labelled(label), is_new=True)


def _in_a_new_interpreter(*run: str) -> Callable[[], None]:
    command = [sys.executable, "-m", __name__, *run]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.kill()
        process.wait()

    return end


if __name__ == "__main__":
    _make(*sys.argv[1:])
