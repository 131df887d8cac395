"""The folders of a run: names, checkpoints, remains of an earlier run, and the refusals that need no torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pytest_mistral_lora.chat.fields import is_utf8
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.weights import weight_files
from pytest_mistral_lora.errors import (
    FindingsError,
    InputError,
    MistralLoraError,
    NonFiniteError,
    RecipeError,
    RowsError,
    exit_code_of,
    interruption,
    is_out_of_memory,
)
from pytest_mistral_lora.escaping import safe_json
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.records.files import canonical_json, clash, listing, write_json, write_text
from pytest_mistral_lora.training.devices import is_main
from pytest_mistral_lora.training.output_folder import disk_error, ensure_writable_folder, sole_writer

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

LIST = "files.json"
"""The list of a complete checkpoint's files, with size and SHA-256 of each."""


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of `checkpoint-STEP`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """Return every checkpoint of a work folder, complete or not, the oldest first."""
    found = (path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Report whether a checkpoint was written completely; later damage is not checked."""
    return (checkpoint / LIST).is_file()


def fault_of(checkpoint: Path) -> str:
    """Return the first fault of a checkpoint, such as a file that has changed since; empty if it is sound."""
    if not is_complete(checkpoint):
        return "it was not written to its end"
    try:
        expected, found = read_json(checkpoint / LIST), listing(checkpoint)
    except (InputError, OSError) as error:
        return str(error)
    return next((f"{name} is not as it was written" for name in expected if found.get(name) != expected[name]), "")


class OtherRunError(InputError):
    """The work folder belongs to another run, or to a run that `resume` would continue; it is not changed."""


class RunFolder:
    """The folders of a run: its output, and beside it `OUTPUT.work` for an unfinished run.

    Attributes:
        output: The finished adapter's folder.
        work: Checkpoints, and `failure.json` if the run fails; a finished run removes it.
        logs: Files of the loggers; they stay.
        failure: The reason of a failure, as `describe_failure` has it.
        bad_rows: The rows of a step whose loss or gradient is not finite, rendered.
    """

    def __init__(self, output: Path) -> None:
        self.output: Path = output
        self.work: Path = output.with_name(f"{output.name}.work")
        self.logs: Path = output.with_name(f"{output.name}.logs")
        self.failure: Path = self.work / "failure.json"
        self.bad_rows: Path = self.work / "bad_rows.jsonl"
        self._identity = self.work / "run.json"

    def open(self, *, resume: bool) -> None:
        """Check whether a run may start or resume, and create the folder; its content is not changed.

        Raises:
            InputError: If the output exists, if nothing can be written, or if there is an unfinished run and `resume`
                is false.
        """
        ensure_writable_folder(self.output.parent)
        if self.output.exists():
            step = "Remove it or name another output."
            if resume and (self.output / "manifest.json").is_file():
                step = "The run came to its end, and nothing is left to resume. To train again, name another output."
            raise InputError("exists already", place=str(self.output), next_step=step)
        unfinished = [path for path in checkpoints(self.work) if is_complete(path)]
        if unfinished and not resume:
            raise OtherRunError(
                f"an unfinished run is there, at step {step_of(unfinished[-1])}",
                place=str(self.work),
                next_step="Go on from it with --resume, or remove the folder.",
            )
        ensure_writable_folder(self.work)

    def claim(self, identity: Mapping[str, Any]) -> Path | None:
        """Make the folder this run's, remove remains of a killed process, and return the newest sound checkpoint.

        Args:
            identity: Everything that decides the steps of the run, as JSON data.

        Returns:
            The checkpoint to resume from; None to start from the first step.

        Raises:
            OtherRunError: If the folder has checkpoints of another run.
        """
        digest = sha256_bytes(canonical_json(identity))
        if any(map(is_complete, checkpoints(self.work))):
            recorded = read_json(self._identity)
            if not isinstance(recorded, Mapping) or recorded.get("identity") != digest:
                from pytest_mistral_lora.records.compare_runs import changed_settings

                raise OtherRunError(
                    f"the unfinished run there had another {changed_settings(recorded, identity)}",
                    place=str(self.work),
                    next_step="Restore it to go on, or remove the folder to begin anew.",
                )
        checkpoint = None
        for found in reversed(checkpoints(self.work)):
            if not (fault := fault_of(found)):
                checkpoint = found
                break
            if is_main():
                sys.stderr.write(f"warning: {found} is removed: {fault}\n")
                shutil.rmtree(found, ignore_errors=True)
        if is_main():
            for remains in (*self.work.glob(".*"), self.failure, self.bad_rows):
                remains.unlink(missing_ok=True)
            write_json(self._identity, {"identity": digest, "settings": dict(identity)})
        return checkpoint

    @contextmanager
    def wrap_disk_errors(self) -> Iterator[None]:
        """If the block fails to write a checkpoint, explain the error and remove the incomplete checkpoint.

        Raises:
            DiskError: If the block ends in an error while a checkpoint was being written.
        """
        try:
            yield
        # torch.save raises a plain RuntimeError if a write fails
        except (OSError, RuntimeError, SafetensorError) as error:
            incomplete = next((path for path in checkpoints(self.work) if not is_complete(path)), None)
            if incomplete is None or is_out_of_memory(error) or interruption(error):
                raise
            # the newest file is the one that failed
            file = max(incomplete.iterdir(), key=lambda path: path.stat().st_mtime, default=incomplete)
            # measured before the removal, which frees space
            failed = disk_error(file, error)
            if is_main():
                shutil.rmtree(incomplete, ignore_errors=True)
            raise failed from error

    def write_failure(self, error: BaseException) -> None:
        """Write `failure.json`; if that fails, too, warn, so that `error` is still reported.

        A launcher may drop the exit code; the file remains.
        """
        # the error of the process that ended first is the cause: the others only lost their connection to it
        if _lost_another_process(error) and self.failure.exists():
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_text(self.failure, f"{safe_json(describe_failure(error), indent=2)}\n")
        except OSError as refused:
            sys.stderr.write(f"warning: {self.failure} cannot be written: {refused.strerror}\n")


def _lost_another_process(error: BaseException) -> bool:
    # torch has no type for this error, only a sentence for each backend and phase
    gone = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError")
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and any(words in text for words in gone)


def describe_failure(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data: `error`, `cause`, `rows` (places of bad rows), `advice`, `exit_code`."""
    error = interruption(error) or error
    advice = error.next_step if isinstance(error, MistralLoraError) else ""
    if isinstance(error, KeyboardInterrupt):
        advice = "Go on with --resume: from the last checkpoint, or from the start if there is none."
    if is_out_of_memory(error):
        advice = "Lower training.micro_batch_tokens, set activation_checkpointing: true, or use precision: bf16."
    if _lost_another_process(error):
        advice = "Another process of this run ended first: read its message, or the system's log. Then use --resume."
    rows: list[str] = []
    if isinstance(error, RowsError):
        rows = [str(row_error.place) for row_error in error.errors]
    elif isinstance(error, NonFiniteError):
        rows = list(map(str, error.places))
    elif isinstance(error, FindingsError) and error.verdict is not None:
        rows = [str(finding.place) for finding in error.verdict.findings if finding.severity == "error"]
    return {
        "error": type(error).__name__,
        "cause": str(error) or type(error).__name__,
        "rows": rows,
        "advice": advice,
        "exit_code": exit_code_of(error),
    }


def work_folder(recipe: Recipe) -> Path:
    """Return the folder for checkpoints and `failure.json`: `OUTPUT.work`, beside the output."""
    return RunFolder(recipe.output).work


def check_output(recipe: Recipe) -> None:
    """Refuse an output that cannot be a folder, or that lies in a folder that the run only reads.

    `RunFolder` judges an existing folder: after a run, it is the recipe's own adapter.

    Raises:
        RecipeError: If a file has the output's name; if the output is inside the base's folder; or if the output, or
            its work folder (which a finished run removes), holds a file of the recipe or the adapter to start from.
    """
    output, work = recipe.output, work_folder(recipe)
    existing = next(folder for folder in (output, *output.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise RecipeError(
            f"{existing} is not a folder", place=NOWHERE / "output", expected="a path at which a folder can be made"
        )
    base = recipe.base.path
    inputs = [*([base] if base else []), *recipe.data_paths]
    if recipe.lora.start is not None:
        _check_start(recipe.lora.start, output, work)
    if base is not None and clash(output, base) in ("is", "is inside"):
        raise RecipeError(
            f"{output} is inside the base {base}", place=NOWHERE / "output", expected="a folder outside the base"
        )
    for path in inputs:
        met = clash(output, path)
        if path != base and met == "is inside":
            # its files would be read as data in the next run
            raise RecipeError(
                f"{output} is inside the data {path}", place=NOWHERE / "output", expected="a folder outside of it"
            )
        if met:
            raise RecipeError(f"{output} holds {path}", place=NOWHERE / "output", expected="a folder of its own")
        if clash(work, path) in ("is", "holds"):
            found = f"{path} is in {work}, which a finished run removes"
            raise RecipeError(found, place=NOWHERE / "output", expected="another name, or that file elsewhere")


def _check_start(start: Path, output: Path, work: Path) -> None:
    """Refuse to start from a folder that the run itself writes or removes.

    Raises:
        RecipeError: If the start is the output or the work folder, in one of them, or holds the output.
    """
    place, expected = NOWHERE.within("lora", "start"), "the folder of an adapter that another run wrote"
    met = clash(output, start)
    if met == "is inside":
        found = f"{output} is inside {start}, the adapter that the run starts from"
        raise RecipeError(found, place=NOWHERE / "output", expected="a folder outside of it")
    if met:
        where = "the output of this recipe" if met == "is" else f"in {output}, the output of this recipe"
        step = "Name another output; to go on with an unfinished run, use --resume."
        raise RecipeError(f"{start} is {where}", place=place, expected=expected, next_step=step)
    if clash(work, start) in ("is", "holds"):
        found = f"{start} is in {work}, which a finished run removes"
        raise RecipeError(found, place=place, expected=expected, next_step="Copy it elsewhere.")


@contextmanager
def opened_run(recipe: Recipe, *, resume: bool) -> Iterator[RunFolder]:
    """Yield the folders of a run, which no other process writes within the block; an error goes into `failure.json`.

    Raises:
        InputError: As for `check_output` and `RunFolder.open`, or if another process holds the output.
    """
    check_output(recipe)  # first: failure.json would be written beside the output
    # outside the block below: a refused run writes nothing into the folder of the run that holds the lock
    folder = RunFolder(recipe.output)
    with sole_writer(recipe.output):
        try:
            folder.open(resume=resume)
            yield folder
        except OtherRunError:
            # its failure.json would be written into the other run's folder
            raise
        except BaseException as error:
            folder.write_failure(error)
            raise


def missing_start(start: Path) -> RecipeError:
    """Return the error for an adapter to start from that is missing, or is no folder."""
    found = f"{start} is a file" if start.exists() else f"{start}: no such folder"
    return RecipeError(found, place=NOWHERE.within("lora", "start"), expected="the folder of an adapter")


def refuse_missing_inputs(recipe: Recipe) -> None:
    """Refuse a recipe whose local base or data files are missing or cannot be recorded, before any slow import.

    Raises:
        InputError: With the first missing file, as the run itself would; or with the first name that is not UTF-8, in
            which the records of a run are written.
    """
    for path in (recipe.base.path, *recipe.data_paths, recipe.lora.start, recipe.output):
        if path is not None and not is_utf8(str(path)):
            step = "Rename it, or change into its folder if that has the name."
            raise InputError("a name that is not UTF-8 cannot be recorded", place=str(path), next_step=step)
    if recipe.base.path is not None:
        weight_files(recipe.base.path)
    if recipe.lora.start is not None and not recipe.lora.start.is_dir():
        raise missing_start(recipe.lora.start)
    retained = recipe.evaluation.retention.rows if recipe.evaluation.retention is not None else ()
    for file in (path for path in (*recipe.data.train, *recipe.data.eval, *retained) if isinstance(path, Path)):
        try:
            file.stat()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", place=str(file)) from error
