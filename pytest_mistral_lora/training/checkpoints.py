"""Checkpoints of a run: a folder each, complete once the list of its files is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import listing, write_json

LIST = "files.json"
"""The list of a complete checkpoint's files, with size and SHA-256 of each."""

_KEPT_CHECKPOINTS = 2
"""The newest, and one to fall back to."""


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of `checkpoint-STEP`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """Return every checkpoint of a work folder, complete or not, the oldest first."""
    found = (path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Report whether a checkpoint was written to its end; later damage is not looked for."""
    return (checkpoint / LIST).is_file()


def fault_of(checkpoint: Path) -> str:
    """Return the first fault of a checkpoint, such as a file that is not as it was written; empty if there is none."""
    if not is_complete(checkpoint):
        return "it was not written to its end"
    try:
        expected, found = read_json(checkpoint / LIST), listing(checkpoint)
    except (InputError, OSError) as error:
        return str(error)
    return next((f"{name} is not as it was written" for name in expected if found.get(name) != expected[name]), "")


class SealCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Lists the files of each checkpoint once all processes have written theirs; only then removes an older one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        # Trainer's save_total_limit removes an old checkpoint first: a kill in between would leave no complete one
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            work = Path(args.output_dir)
            checkpoint = work / f"checkpoint-{state.global_step}"
            write_json(checkpoint / LIST, listing(checkpoint))
            complete = [path for path in checkpoints(work) if is_complete(path)]
            for old in complete[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)
