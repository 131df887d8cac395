"""Ask a saved adapter in a process that has not trained it: only its files can carry it there."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.errors import MistralLoraError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_MAX_NEW_TOKENS = 64


def in_a_new_process(folder: Path, device: str) -> dict[str, Any]:
    """Run `mistral-lora smoke` on the `adapter` of a folder, with its `base` and `rows.jsonl`; return its JSON.

    Raises:
        MistralLoraError: If the process fails.
    """
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "smoke", str(folder / "adapter")]
    command += ["--base", str(folder / "base"), "--rows", str(folder / "rows.jsonl"), "--json"]
    command += ["--max-new-tokens", str(_MAX_NEW_TOKENS), "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise _failure(folder, f"exit code {process.returncode}", process.stderr)
    return dict(json.loads(process.stdout))


class ForkedProcess:
    """A process that is forked before anything is trained, and waits for the folder of a trained adapter.

    It has imported the libraries and nothing else, so it knows as little of the adapter as a new interpreter does. The
    imports are most of the time of a smoke run, and are paid once in place of twice.
    """

    def __init__(self) -> None:
        # fork, because the other start methods import everything again; on Linux alone, because Apple's frameworks
        # do not survive it
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection), daemon=True)
        self._process.start()
        theirs.close()

    @staticmethod
    def is_possible() -> bool:
        """Whether this process can be forked and the copy can run a model: CUDA does not work in a forked process."""
        import torch

        return sys.platform == "linux" and not torch.cuda.is_available()

    def ask(self, folder: Path, device: str) -> dict[str, Any]:
        """Return the same as `in_a_new_process`.

        Raises:
            MistralLoraError: If the process fails.
        """
        self._connection.send((folder, device))
        try:
            answer, failure = self._connection.recv()
        except EOFError:
            self._process.join()
            raise _failure(folder, f"exit code {self._process.exitcode}", "") from None
        if failure:
            raise _failure(folder, "an exception", failure)
        return dict(json.loads(answer))


def _serve(connection: Connection, other_end: Connection) -> None:
    other_end.close()  # as long as it is open here, too, the end of the first process would go unnoticed
    try:
        folder, device = connection.recv()
    except EOFError:
        return
    try:
        connection.send((_smoked(folder, device), ""))
    except Exception as error:
        connection.send(("", f"{type(error).__name__}: {error}"))


def _smoked(folder: Path, device: str) -> str:
    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke

    spec = model_spec(folder / "adapter", folder / "base", device=device)
    result = smoke(spec, list(read_rows(folder / "rows.jsonl")), max_new_tokens=_MAX_NEW_TOKENS)
    return json.dumps(result, allow_nan=False)


def _failure(folder: Path, reason: str, detail: str) -> MistralLoraError:
    return MistralLoraError(
        f"the saved adapter cannot be used in a new process ({reason}): {detail}", place=str(folder / "adapter")
    )
