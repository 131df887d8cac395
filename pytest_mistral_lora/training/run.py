"""One run from a recipe to a finished folder, or to a `failure.json` that says why there is none."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4
from pytest_mistral_lora.errors import NonFiniteError, StoppedError
from pytest_mistral_lora.training.adapter import adapter_tensors, attach_adapter
from pytest_mistral_lora.training.arguments import Progress, loggers
from pytest_mistral_lora.training.devices import device_of, precision_of
from pytest_mistral_lora.training.failure import StopAtRequest, StopRequest, leave_failure
from pytest_mistral_lora.training.finish import RunResult, finish
from pytest_mistral_lora.training.generate.callback import GENERATIONS, GenerationCallback
from pytest_mistral_lora.training.loop import apply_kernels, evaluated, follow, make_trainer
from pytest_mistral_lora.training.prepare import Preparation, prepare
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.step.trainer import LoraTrainer
from pytest_mistral_lora.training.work_folder import (
    BAD_ROWS,
    KeepWhole,
    OtherRunError,
    SaveByTime,
    WorkFolder,
    with_rows,
    work_folder_of,
    write_rows,
)


def train(
    recipe: Recipe, *, resume: bool = False, progress: Progress = "none", stop: StopRequest | None = None
) -> RunResult:
    """Train a recipe's adapter and write its folder.

    Checkpoints, and `failure.json` if the run fails, are in the folder `work_folder(recipe)` beside the output; a
    finished run removes it. A folder that is another run's, or waits for `resume`, is left as it is.

    Args:
        recipe: What to train.
        resume: Go on from the last whole checkpoint of a run that ended early, if there is one.
        progress: How to show on standard error what has been done.
        stop: What may ask the run to stop after a step.

    Raises:
        InputError: If recipe, rows, base or folders do not allow the run; before any weight is loaded.
        TrainingError: If the run must not go on; no adapter is written.
        MemoryShortageError: If a step does not fit into memory.
        DiskError: If a checkpoint or the adapter cannot be written; the checkpoints before it stay.
        StoppedError: If it was asked to stop; it has a checkpoint.
    """
    try:
        work = WorkFolder(recipe.output, resume=resume)
        prepared = prepare(recipe)
        checkpoint = work.claim(prepared.identity)
        return _train(prepared, work, checkpoint, progress, stop or StopRequest())
    except OtherRunError:
        raise
    except BaseException as error:
        leave_failure(work_folder(recipe), error)
        raise


def work_folder(recipe: Recipe) -> Path:
    """Return the folder for checkpoints and `failure.json`: `OUTPUT.work`, beside the output."""
    return work_folder_of(recipe.output)


def _train(
    prepared: Preparation, work: WorkFolder, checkpoint: Path | None, progress: Progress, stop: StopRequest
) -> RunResult:
    recipe, training, data = prepared.recipe, prepared.recipe.training, prepared.data
    load = load_nf4 if recipe.base.quantization else load_base
    model = load(prepared.base, precision_of(training), device_of(training))
    apply_kernels(model, training)
    model = attach_adapter(model, recipe.lora, prepared.layers, seed=training.seed)
    initial = adapter_tensors(model)
    trainer = make_trainer(
        model, training, data.train.encoded, data.held_out.encoded, work=work.path, progress=progress
    )  # fmt: skip
    watching = _watched(prepared, trainer, work.path)
    _step_to_the_end(prepared, trainer, work, checkpoint, stop)
    if data.held_out.rows and not evaluated(trainer):
        trainer.evaluate()
    return finish(prepared, trainer, initial, watching, work, checkpoint)


def _watched(prepared: Preparation, trainer: LoraTrainer, work: Path) -> GenerationCallback:
    """Let the recipe's loggers and generations follow the run."""
    evaluation, data, output = prepared.recipe.evaluation, prepared.data, prepared.recipe.output
    watching = GenerationCallback(
        trainer,
        trainer.model,
        prepared.encoder,
        (data.held_out.rows or data.train.rows)[: evaluation.generations],
        prepared.checks,
        evaluation.max_new_tokens,
        evaluation.generation_steps,
        work / GENERATIONS,
    )
    logs = output.with_name(f"{output.name}.logs")
    names = prepared.recipe.training.report_to
    follow(trainer, [*loggers(names, logs, writes=trainer.accelerator.is_main_process), watching])
    return watching


def _step_to_the_end(
    prepared: Preparation, trainer: LoraTrainer, work: WorkFolder, checkpoint: Path | None, stop: StopRequest
) -> None:
    trainer.add_callback(StopAtRequest(stop, trainer.reduce_over_processes))
    if minutes := prepared.recipe.training.checkpoint_minutes:
        trainer.add_callback(SaveByTime(minutes, trainer.reduce_over_processes))
    trainer.add_callback(KeepWhole())
    # what was measured before the first step is in the checkpoint's log
    trainer.args.eval_on_start &= checkpoint is None
    try:
        with stop.after_the_step(), work.explains_failed_writes():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteError as error:
        raise _named(error, prepared, trainer, work.path / BAD_ROWS) from error
    number = trainer.reduce_over_processes(stop.signal, "max")  # one may have come after the last step
    if number:
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, with a checkpoint",
            signal=number,
            place=str(work.path),
            next_step="Go on with --resume.",
        )


def _named(error: NonFiniteError, prepared: Preparation, trainer: LoraTrainer, file: Path) -> NonFiniteError:
    """Name the rows of all processes, and write them down."""
    processes: list[Any] = gather_object([(error.rows, trainer.step_rows)])
    rows = {row for own, _ in processes for row in own} or {row for _, step in processes for row in step}
    named = with_rows(error, sorted(rows), prepared.data.train, file)
    if trainer.accelerator.is_main_process:
        write_rows(file, named, prepared.data.train, prepared.encoder)
    return named
