"""One run from a recipe to a finished folder, or to a `failure.json` with the reason."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4, unquantized_share
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import NonFiniteError, StoppedError, and_more
from pytest_mistral_lora.records.adapter_folder import BASE_FACTS
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.records.tensors import sha256_tensors
from pytest_mistral_lora.training.adapter import adapter_tensors, attach_adapter
from pytest_mistral_lora.training.callbacks import MeasureLastStep, SaveByTime, StopAtRequest, StopRequest
from pytest_mistral_lora.training.curves import PAGE, WriteCurves, training_page
from pytest_mistral_lora.training.devices import device_of, precision_of
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.gate.measure import adapter_gate
from pytest_mistral_lora.training.generate import Completion, Probe, probe
from pytest_mistral_lora.training.generate.record import GENERATIONS, GenerationCallback
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.output_folder import explain_disk_errors
from pytest_mistral_lora.training.prepare import Preparation, logger_callbacks, prepare
from pytest_mistral_lora.training.progress import ShowProgress, data_facts, header, summary
from pytest_mistral_lora.training.recipe import Recipe, load_recipe
from pytest_mistral_lora.training.rows.loading import RunData
from pytest_mistral_lora.training.run_folder import RunFolder, opened_run, step_of
from pytest_mistral_lora.training.run_metadata import dequantization, run_facts
from pytest_mistral_lora.training.save import Adapter, SealCheckpoint, rendered, write_run
from pytest_mistral_lora.training.start import load_start
from pytest_mistral_lora.training.start_loss import CompareFirstLoss, parent_loss
from pytest_mistral_lora.training.step.trainer import LoraTrainer

_LOG = logging.getLogger(__name__)
_PROBED_ROWS = 8
_NAMED_ROWS = 20


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run, on disk and in memory.

    Attributes:
        output: The adapter folder.
        manifest: Its manifest.
        log: The training log: one mapping a line, with `step` and `loss` or `eval_loss` (nats a supervised token), with
            rates of `eval_format/…`, or with the `loss_scale` of a step that overflowed in fp16 and was skipped.
        adapter: The adapter's tensors before and after.
        probe: Teacher-forced logits of the first training rows, of the model in memory.
        completions: The answers that the model in memory generated, as the recipe's `evaluation` asked for.
        model: The trained model in memory (PEFT).
        encoder: The backend.
        data: The encoded rows.
        base_folder: The base checkpoint on disk.
        gate: The comparison of base and adapter, if the recipe asked for it with `evaluation.gate`; else None. A gate
            that failed does not keep the adapter from being written.
    """

    output: Path
    manifest: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    adapter: Adapter
    probe: Probe
    completions: Sequence[Completion]
    model: Any
    encoder: Encoder
    data: RunData
    base_folder: Path
    gate: Gate | None = None


def train(
    recipe: Recipe | str | Path,
    *,
    resume: bool = False,
    xfails: str | Path | None = None,
    unjudged: bool = False,
    display: RunDisplay | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train a recipe's adapter and write its folder.

    The rows are judged in the pass that encodes them, by the rules of `mistral-lora check recipe.yaml`.

    Checkpoints, and `failure.json` if the run fails, are in the folder `work_folder(recipe)` beside the output; a
    finished run removes it. A folder of another run, or one that waits for `resume`, is not changed.

    Args:
        recipe: The recipe, or its YAML file.
        resume: Whether to continue an unfinished run from its last complete checkpoint.
        xfails: A file of known deviations, beside that of the recipe; the manifest records those that were found.
        unjudged: Whether to train on rows that nobody judges; the manifest and the decision note record it.
        display: Display of the progress; None to show nothing.
        stop: A request to stop after a step, from signals; by default the run does not stop early.

    Raises:
        RecipeError: If the file of the recipe cannot be read, or a value is wrong.
        InputError: If recipe, rows, base or folders do not allow the run, or another process writes its output; before
            any weight is loaded.
        FindingsError: If the rows have an error that no known deviation accepts; before any weight is loaded. Its
            `verdict` has the findings.
        TrainingError: If the run must stop; no adapter is written.
        MemoryShortageError: If a step does not fit into memory.
        DiskError: If a checkpoint or the adapter cannot be written; earlier checkpoints stay.
        StoppedError: If a signal stopped the run; it has a checkpoint.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    # before the data is encoded, which can take minutes
    with recipe.naming_lines(), opened_run(recipe, resume=resume) as folder:
        display = RunDisplay() if display is None else display
        display.phase("reading base, tokenizer and rows")
        prepared = prepare(recipe, xfails=None if xfails is None else Path(xfails), unjudged=unjudged)
        for note in prepared.judgement.notes:
            display.line(note)
        checkpoint = folder.claim(prepared.identity)
        with display:
            return _train(prepared, folder, checkpoint, display, stop or StopRequest())


def _train(
    prepared: Preparation, folder: RunFolder, checkpoint: Path | None, display: RunDisplay, stop: StopRequest
) -> RunResult:
    recipe, training, data = prepared.recipe, prepared.recipe.training, prepared.data
    if dequantized := dequantization(training, prepared.base):
        stored, full = (dequantized[key] / 1e9 for key in ("stored_bytes", "bytes"))
        _LOG.warning(
            "base: FP8, %s, %.3g GB on disk; dequantised to %s, it takes %.3g GB of memory",
            dequantized["scaling"],
            stored,
            precision_of(training),
            full,
        )
    if display.is_shown:
        display.facts(header(prepared, folder.work))
    display.phase(f"loading the base in {recipe.base.quantization or precision_of(training)}")
    model = _load_with_adapter(prepared)
    initial = adapter_tensors(model)
    trainer = make_trainer(model, training, data.train.encoded, data.held_out.encoded, work=folder.work)
    generations = _add_callbacks(prepared, trainer, folder, stop)
    progress = ShowProgress(display, trainer, generations)
    if display.is_shown:
        trainer.add_callback(progress)
    # a resumed run has the held-out loss from before the first step in its checkpoint's log
    trainer.args.eval_on_start &= checkpoint is None
    display.start_bar()
    if checkpoint is not None:
        display.phase(f"going on from step {step_of(checkpoint)}, with {checkpoint}")
    if training.tries_largest(training.planned_steps(len(data.train.rows))):
        display.phase("trying the largest micro-batch")
    try:
        with stop.after_the_step(), folder.wrap_disk_errors():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NonFiniteError as error:
        raise _gather_and_write_bad_rows(error, prepared, trainer, folder.bad_rows) from error
    number = trainer.reduce_over_processes(stop.signal, "max")  # one may have come after the last step
    if number:
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, with a checkpoint",
            signal=number,
            place=str(folder.work),
            next_step=recipe.resume_step,
        )
    step, log = trainer.state.global_step, trainer.state.log_history
    # a run that resumes from its last step makes no step, so the loop evaluates nothing
    if data.held_out.rows and not any("eval_loss" in line and line["step"] == step for line in log):
        trainer.evaluate()
    result = save_run(prepared, trainer, initial, generations, folder, checkpoint, display)
    display.close()
    display.facts(summary(result.log, progress, display.seconds))
    return result


def _load_with_adapter(prepared: Preparation) -> Any:
    """Return the base, in the recipe's precision and on its device, with a new adapter or the one to go on from."""
    recipe, training = prepared.recipe, prepared.recipe.training
    load = load_nf4 if recipe.base.quantization else load_base
    model = load(prepared.base, precision_of(training), device_of(training))
    model = attach_adapter(model, recipe.lora, prepared.layers, seed=training.seed)
    if prepared.start is not None:
        load_start(model, prepared.start)  # here: an engine has not sharded the model yet
    return model


def _add_callbacks(
    prepared: Preparation, trainer: LoraTrainer, folder: RunFolder, stop: StopRequest
) -> GenerationCallback:
    evaluation, data, training = prepared.recipe.evaluation, prepared.data, prepared.recipe.training
    generations = GenerationCallback(
        trainer,
        trainer.model,
        prepared.encoder,
        (data.held_out.rows or data.train.rows)[: evaluation.generations],
        prepared.checks,
        evaluation.max_new_tokens,
        evaluation.generation_steps,
        folder.work / GENERATIONS,
    )
    # The order counts. The first callbacks act at the last step of a run: after StopAtRequest, they would mistake the
    # step of a signal for the last. A checkpoint is sealed when all others have written their part.
    trainer.add_callback(MeasureLastStep(has_held_out=trainer.eval_dataset is not None))
    for callback in logger_callbacks(training.report_to, folder.logs, writes=trainer.accelerator.is_main_process):
        trainer.add_callback(callback)
    trainer.add_callback(generations)
    if prepared.start is not None:
        trainer.add_callback(CompareFirstLoss(parent_loss(prepared)))
    trainer.add_callback(StopAtRequest(stop, trainer.reduce_over_processes))
    if training.checkpoint_minutes:
        trainer.add_callback(SaveByTime(training.checkpoint_minutes, trainer.reduce_over_processes))
    trainer.add_callback(SealCheckpoint())
    trainer.add_callback(WriteCurves(folder.work / PAGE, data_facts(prepared), generations.answered_rows))
    return generations


def _gather_and_write_bad_rows(
    error: NonFiniteError, prepared: Preparation, trainer: LoraTrainer, file: Path
) -> NonFiniteError:
    """Return the error with the rows of all processes named; the main process writes them, rendered, into `file`."""
    processes: list[Any] = gather_object([(error.rows, trainer.step_rows)])
    # a gradient belongs to all rows of its step: then all are named
    indices = {row for processed_rows, _ in processes for row in processed_rows} or {
        row for _, step in processes for row in step
    }
    split = prepared.data.train
    rows = [(split.rows[index], split.encoded[index]) for index in sorted(indices)]
    places = [row.place for row, _ in rows]
    if trainer.accelerator.is_main_process:
        lines = [{"place": str(row.place), **rendered(prepared.encoder, row, encoded)} for row, encoded in rows]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    more = and_more(_NAMED_ROWS, len(places))
    return NonFiniteError(
        f"{error.found}; the rows: {', '.join(map(str, places[:_NAMED_ROWS]))}{more}",
        rows=sorted(indices),
        places=places,
        next_step=f"They are rendered in {file}. {error.next_step}",
    )


def save_run(
    prepared: Preparation,
    trainer: LoraTrainer,
    initial: Mapping[str, Any],
    generations: GenerationCallback,
    folder: RunFolder,
    checkpoint: Path | None,
    display: RunDisplay,
) -> RunResult:
    """Write the folder of a run that has made all its steps, and remove its work folder; every process must call it.

    The gate comes first, if the recipe asks for it; a run that ends in it resumes from its last checkpoint.

    Args:
        prepared: The recipe with its data.
        trainer: The trainer, at its end.
        initial: The adapter's tensors before the first step: new ones, or those of the adapter to go on from.
        generations: The callback that has generated answers.
        folder: The folders of the run.
        checkpoint: The checkpoint that the run resumed from, or None.
        display: Display of the progress.

    Raises:
        TrainingError: If the adapter is not sound; then nothing is written.
        DiskError: If the folder cannot be written.
    """
    model: Any = trainer.model
    tensors = adapter_tensors(model)
    adapter = Adapter(tensors, initial, prepared.layers, model.peft_config["default"], prepared.saved)
    # accelerate's wrapper stays around forward, and computes differently from an adapter loaded from disk
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    completions = generations.answer_rows()
    probed = probe(model, prepared.data.train.encoded[:_PROBED_ROWS])
    # in all processes: each pass of a sharded model needs them all
    gate = _gate(prepared, model, display) if prepared.recipe.evaluation.gate else None
    display.phase(f"writing {prepared.recipe.output}")
    # transformers' last line has times of this machine: equal runs would write unequal logs
    log = [line for line in trainer.state.log_history if "train_runtime" not in line]
    main = trainer.accelerator.is_main_process
    facts: dict[str, Any] = {}
    if main:
        resumed_from, changes = step_of(checkpoint) if checkpoint else None, trainer.memory_changes
        rates, unquantized = generations.latest_rates(), unquantized_share(model)
        facts = run_facts(prepared, trainer.state, log, completions, rates, resumed_from, changes, unquantized, gate)
    # in all processes: each pass of a sharded model needs them all
    identity = {"kind": "adapter", "tensors_sha256": sha256_tensors(tensors)} | {
        fact: facts.get(fact) for fact in BASE_FACTS
    }
    texts = generations.files(identity, precision_of(prepared.recipe.training))
    texts[PAGE] = training_page(log, trainer.state.max_steps, data_facts(prepared), generations.answered_rows(), gate)
    manifest: Mapping[str, Any] = {}
    output, encoder, data, base = prepared.recipe.output, prepared.encoder, prepared.data, prepared.base.path
    if main:
        first_row = (data.train.rows[0], data.train.encoded[0])
        with explain_disk_errors(output):
            manifest = write_run(
                output,
                adapter,
                encoder=encoder,
                base_folder=base,
                first_row=first_row,
                log=log,
                facts=facts,
                texts=texts,
            )
        shutil.rmtree(folder.work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return RunResult(output, manifest, log, adapter, probed, completions, model, encoder, data, base, gate)


def _gate(prepared: Preparation, model: Any, display: RunDisplay) -> Gate:
    precision, device = precision_of(prepared.recipe.training), torch.device(model.device).type
    rows = prepared.gate_rows
    return adapter_gate(model, prepared.encoder, rows, precision=precision, device=device, display=display)
