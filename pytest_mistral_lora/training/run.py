"""One run from a recipe to a finished folder, or to a `failure.json` that says why there is none."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.checkpoint.base import load_base, require_trainable
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import NonFiniteError, PinError, RecipeError, StoppedError
from pytest_mistral_lora.records.hashing import canonical_json, sha256_bytes, sha256_ids
from pytest_mistral_lora.records.identity import base_weights_command, base_weights_sha256
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter
from pytest_mistral_lora.training.arguments import Progress
from pytest_mistral_lora.training.bad_rows import BAD_ROWS, with_rows, write_rows
from pytest_mistral_lora.training.checkpoints import KeepWhole, SaveByTime, step_of
from pytest_mistral_lora.training.data import RunData, load_data
from pytest_mistral_lora.training.devices import device_count, device_of, on_gpu, precision_of
from pytest_mistral_lora.training.facts import evaluation_facts, run_facts, training_facts
from pytest_mistral_lora.training.failure import leave_failure
from pytest_mistral_lora.training.interruption import StopAtRequest, StopRequest
from pytest_mistral_lora.training.loop import evaluated, make_trainer
from pytest_mistral_lora.training.recipe import Base, Recipe
from pytest_mistral_lora.training.save import Adapter, write_run
from pytest_mistral_lora.training.smoke import Completion, Probe, generate, probe
from pytest_mistral_lora.training.step import LoraTrainer
from pytest_mistral_lora.training.work import OtherRunError, WorkFolder, work_folder_of

_PROBED_ROWS = 8


@dataclass(frozen=True)
class RunResult:
    """What a finished run left, on disk and in memory.

    Attributes:
        output: The adapter folder.
        manifest: Its manifest.
        log: The training log: one mapping a line, with `step` and `loss` or `eval_loss` (nats a supervised token).
        adapter: The adapter's tensors before and after.
        probe: Teacher-forced logits of the first training rows, of the model in memory.
        completions: What the model in memory generated, as the recipe's `evaluation` asked for.
        model: The trained model in memory (PEFT).
        encoder: The backend.
        data: The encoded rows.
        base_folder: The base checkpoint on disk.
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
        DiskError: If a checkpoint or the adapter cannot be written; the checkpoints before it stay.
        StoppedError: If it was asked to stop; it has a checkpoint.
    """
    work = WorkFolder(recipe.output, resume=resume)
    try:
        run = _Run.prepare(recipe)
        checkpoint = work.claim(run.identity)
        return run.train(work, checkpoint, progress, stop or StopRequest())
    except OtherRunError:
        raise
    except BaseException as error:
        leave_failure(work.path, error)
        raise


def work_folder(recipe: Recipe) -> Path:
    """Return the folder for checkpoints and `failure.json`: `OUTPUT.work`, beside the output."""
    return work_folder_of(recipe.output)


def resolve_base(base: Base) -> Path:
    """Return the base checkpoint's folder, its pin checked.

    Raises:
        PinError: If it is not there, or its weights are not the pinned ones.
    """
    if base.path is None:
        from pytest_mistral_lora.checkpoint.pins import resolve

        return resolve(str(base.repo), str(base.revision), weights=True)
    found = base_weights_sha256(base.path)
    if found != base.weights_sha256:
        raise PinError(
            f"the weights of {base.path} have SHA-256 {found}",
            place="base.weights_sha256",
            expected=str(base.weights_sha256),
            next_step=f"Pin these weights or restore those; the hash is printed by: {base_weights_command(base.path)}",
        )
    return base.path


@dataclass(frozen=True)
class _Run:
    """A recipe whose base, rows and layers are checked; no weight is loaded yet."""

    recipe: Recipe
    base: Path
    config: Mapping[str, Any]
    encoder: Encoder
    layers: Sequence[str]
    data: RunData

    @classmethod
    def prepare(cls, recipe: Recipe) -> _Run:
        on_gpu(recipe.training)
        base = resolve_base(recipe.base)
        config = require_trainable(base)
        layers = adapted_layers(base, recipe.lora.target_modules)
        encoder = Encoder(recipe.backend, CheckpointTokenizer(base))
        if encoder.vocab_size > config["vocab_size"]:
            raise RecipeError(
                f"the tokenizer has {encoder.vocab_size} ids, the model {config['vocab_size']}", place=str(base)
            )
        return cls(recipe, base, config, encoder, layers, load_data(recipe, encoder))

    @property
    def identity(self) -> str:
        """What must be the same for a run to go on from a checkpoint."""
        saving = {"checkpoint_steps", "checkpoint_minutes"}
        recipe = self.recipe.model_dump(mode="json", exclude={"output": True, "evaluation": True, "training": saving})
        ids = sha256_ids(row.input_ids for split in (self.data.train, self.data.held_out) for row in split.encoded)
        return sha256_bytes(canonical_json({"recipe": recipe, "ids": ids, "devices": device_count()}))

    def train(self, work: WorkFolder, checkpoint: Path | None, progress: Progress, stop: StopRequest) -> RunResult:
        training = self.recipe.training
        model = load_base(self.base, precision_of(training), device_of(training))
        model = attach_adapter(model, self.recipe.lora, self.layers, seed=training.seed)
        initial = adapter_tensors(model)
        trainer = make_trainer(
            model,
            training,
            self.data.train.encoded,
            self.data.held_out.encoded,
            work=work.path,
            progress=progress,
        )
        self._step_to_the_end(trainer, work, checkpoint, stop)
        if self.data.held_out.rows and not evaluated(trainer):
            trainer.evaluate()
        return self._finish(trainer, model, initial, work, checkpoint)

    def _step_to_the_end(
        self, trainer: LoraTrainer, work: WorkFolder, checkpoint: Path | None, stop: StopRequest
    ) -> None:
        trainer.add_callback(StopAtRequest(stop, trainer.over_processes))
        if self.recipe.training.checkpoint_minutes:
            trainer.add_callback(SaveByTime(self.recipe.training.checkpoint_minutes, trainer.over_processes))
        trainer.add_callback(KeepWhole())
        # what was measured before the first step is in the checkpoint's log
        trainer.args.eval_on_start &= checkpoint is None
        try:
            with stop.after_the_step(), work.explains_failed_writes():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NonFiniteError as error:
            raise self._named(error, trainer, work.path) from error
        number = trainer.over_processes(stop.signal, "max")  # one may have come after the last step
        if number:
            raise StoppedError(
                f"stopped by {signal.Signals(number).name} after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}, with a checkpoint",
                signal=number,
                place=str(work.path),
                next_step="Go on with --resume.",
            )

    def _named(self, error: NonFiniteError, trainer: LoraTrainer, work: Path) -> NonFiniteError:
        """Name the rows of all processes, and write them down."""
        processes = gather_object([(error.rows, trainer.step_rows)])
        rows = {row for own, _ in processes for row in own} or {row for _, step in processes for row in step}
        named = with_rows(error, sorted(rows), self.data.train, work / BAD_ROWS)
        if trainer.accelerator.is_main_process:
            write_rows(work / BAD_ROWS, named, self.data.train, self.encoder)
        return named

    def _finish(
        self, trainer: LoraTrainer, model: Any, initial: Any, work: WorkFolder, checkpoint: Path | None
    ) -> RunResult:  # fmt: skip
        tensors = adapter_tensors(model, trainer.accelerator.get_state_dict(trainer.model_wrapped))
        adapter = Adapter(tensors, initial, self.layers, model.peft_config["default"])
        first = self.data.train
        completions = self._generations(model)
        result = probe(model, first.encoded[:_PROBED_ROWS])
        log = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
        manifest: Mapping[str, Any] = {}
        if trainer.accelerator.is_main_process:
            resumed_from = step_of(checkpoint) if checkpoint else None
            facts = run_facts(
                self.recipe,
                self.base,
                self.data,
                training_facts(
                    self.recipe.training,
                    self.config,
                    trainer.state,
                    resumed_from=resumed_from,
                    relief=trainer.relief.taken,
                ),
                evaluation_facts(log, completions),
            )
            with work.explains_failed_output():
                manifest = write_run(
                    self.recipe.output,
                    adapter,
                    encoder=self.encoder,
                    base_folder=self.base,
                    first_row=(first.rows[0], first.encoded[0]),
                    log=log,
                    facts=facts,
                    recipe=self.recipe.as_written(),
                )
            shutil.rmtree(work.path, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        return RunResult(
            self.recipe.output, manifest, log, adapter, result, completions, model, self.encoder, self.data, self.base
        )

    def _generations(self, model: Any) -> list[Completion]:
        rows = (self.data.held_out.rows or self.data.train.rows)[: self.recipe.evaluation.generations]
        return generate(model, self.encoder, rows, max_new_tokens=self.recipe.evaluation.max_new_tokens)
