"""One run from a recipe to a finished folder, or to a `failure.json` that says why there is none."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.format_checks import FormatCheck
from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.checkpoint.base import load_base, load_nf4, require_trainable
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, PinError, RecipeError
from pytest_mistral_lora.records.files import read_json, write_json
from pytest_mistral_lora.records.hashing import canonical_json, sha256_bytes
from pytest_mistral_lora.records.identity import base_weights_command, base_weights_sha256
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter, saved_modules
from pytest_mistral_lora.training.arguments import Progress
from pytest_mistral_lora.training.data import RunData, load_data
from pytest_mistral_lora.training.devices import device_count, device_of, precision_of
from pytest_mistral_lora.training.facts import evaluation_facts, run_facts, training_facts
from pytest_mistral_lora.training.failure import leave_failure
from pytest_mistral_lora.training.kernels import apply_kernels
from pytest_mistral_lora.training.libraries import require_environment
from pytest_mistral_lora.training.loggers import check_loggers, loggers
from pytest_mistral_lora.training.loop import evaluated, follow, make_trainer
from pytest_mistral_lora.training.recipe import Base, Recipe
from pytest_mistral_lora.training.save import Adapter, write_run
from pytest_mistral_lora.training.smoke import Completion, Probe, probe
from pytest_mistral_lora.training.step import LoraTrainer
from pytest_mistral_lora.training.transcripts import BASE_FACTS, adapter_identity, record
from pytest_mistral_lora.training.watching import GENERATIONS, Watching, format_checks

_PROBED_ROWS = 8


@dataclass(frozen=True)
class RunResult:
    """What a finished run left, on disk and in memory.

    Attributes:
        output: The adapter folder.
        manifest: Its manifest.
        log: The training log: one mapping a line, with `step` and `loss` or `eval_loss` (nats a supervised token), or
            with the `loss_scale` of a step that overflowed in fp16 and was skipped.
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


def train(recipe: Recipe, *, resume: bool = False, progress: Progress = "none") -> RunResult:
    """Train a recipe's adapter and write its folder.

    Checkpoints, and `failure.json` if the run fails, are in the folder `work_folder(recipe)` beside the output; a
    finished run removes it.

    Args:
        recipe: What to train.
        resume: Go on from the last checkpoint of a killed run, if there is one.
        progress: How to show on standard error what has been done.

    Raises:
        InputError: If recipe, rows, base or an existing output do not allow the run.
        TrainingError: If the run must not go on; nothing is saved.
    """
    work = work_folder(recipe)
    try:
        run = _Run.prepare(recipe)
        checkpoint = _checkpoint(work, run.identity, resume)
        return run.train(work, checkpoint, progress)
    except BaseException as error:
        leave_failure(work, error)
        raise


def work_folder(recipe: Recipe) -> Path:
    """Return the folder for checkpoints and `failure.json`: `OUTPUT.work`, beside the output."""
    return recipe.output.with_name(f"{recipe.output.name}.work")


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
    saved: Sequence[str]
    checks: Sequence[FormatCheck]
    data: RunData

    @classmethod
    def prepare(cls, recipe: Recipe) -> _Run:
        if recipe.output.exists():
            raise InputError("exists already", place=str(recipe.output), next_step="Remove it or name another output.")
        require_environment(recipe)
        check_loggers(recipe.training.report_to)
        base = resolve_base(recipe.base)
        config = require_trainable(base)
        layers = adapted_layers(base, recipe.lora.target_modules)
        saved = saved_modules(base, recipe.lora.modules_to_save)
        encoder = Encoder(recipe.backend, CheckpointTokenizer(base))
        if encoder.vocab_size > config["vocab_size"]:
            raise RecipeError(
                f"the tokenizer has {encoder.vocab_size} ids, the model {config['vocab_size']}", place=str(base)
            )
        checks = format_checks(recipe.evaluation, encoder)
        return cls(recipe, base, config, encoder, layers, saved, checks, load_data(recipe, encoder))

    @property
    def identity(self) -> str:
        """What must be the same for a run to go on from a checkpoint."""
        # what a run shows is not what it does
        seen: Any = {"output": True, "evaluation": True, "training": {"report_to"}}
        recipe = self.recipe.model_dump(mode="json", exclude=seen)
        rows = [dict(split.figures.sha256) for split in (self.data.train, self.data.held_out)]
        return sha256_bytes(canonical_json({"recipe": recipe, "rows": rows, "devices": device_count()}))

    def train(self, work: Path, checkpoint: Path | None, progress: Progress) -> RunResult:
        training = self.recipe.training
        load = load_nf4 if self.recipe.base.quantization else load_base
        model = load(self.base, precision_of(training), device_of(training))
        apply_kernels(model, training)
        model = attach_adapter(model, self.recipe.lora, self.layers, seed=training.seed)
        initial = adapter_tensors(model)
        trainer = make_trainer(
            model,
            training,
            self.data.train.encoded,
            self.data.held_out.encoded,
            work=work,
            progress=progress,
        )
        watching = self._watched(trainer, model, work)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.data.held_out.rows and not evaluated(trainer):
            trainer.evaluate()
        return self._finish(trainer, model, initial, work, checkpoint, watching)

    def _watched(self, trainer: LoraTrainer, model: Any, work: Path) -> Watching:
        """Let the recipe's loggers and generations follow the run."""
        evaluation, names = self.recipe.evaluation, self.recipe.training.report_to
        watching = Watching(
            trainer,
            model,
            self.encoder,
            (self.data.held_out.rows or self.data.train.rows)[: evaluation.generations],
            self.checks,
            evaluation.max_new_tokens,
            evaluation.generation_steps,
            work / GENERATIONS,
        )
        logs = self.recipe.output.with_name(f"{self.recipe.output.name}.logs")
        follow(trainer, [*loggers(names, logs, writes=trainer.accelerator.is_main_process), watching])
        return watching

    def _finish(
        self,
        trainer: LoraTrainer,
        model: Any,
        initial: Any,
        work: Path,
        checkpoint: Path | None,
        watching: Watching,
    ) -> RunResult:
        tensors = adapter_tensors(model, trainer.accelerator.get_state_dict(trainer.model_wrapped))
        adapter = Adapter(tensors, initial, self.layers, model.peft_config["default"], self.saved)
        first = self.data.train
        completions = watching.completions()
        # accelerate's wrapper stays around forward, and computes otherwise than the adapter that is loaded afresh
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        result = probe(model, first.encoded[:_PROBED_ROWS])
        # the last line of transformers has the time of day's figures, which no two runs share
        log = [line for line in trainer.state.log_history if "train_runtime" not in line]
        main = trainer.accelerator.is_main_process
        facts = self._facts(trainer, log, watching, checkpoint) if main else {}
        texts = self._texts(model, watching, tensors, facts)  # by all processes: a sharded model is called by all
        manifest: Mapping[str, Any] = {}
        if main:
            manifest = write_run(
                self.recipe.output,
                adapter,
                encoder=self.encoder,
                base_folder=self.base,
                first_row=(first.rows[0], first.encoded[0]),
                log=log,
                facts=facts,
                recipe=self.recipe.as_written(),
                texts=texts,
            )
            shutil.rmtree(work, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        return RunResult(
            self.recipe.output, manifest, log, adapter, result, completions, model, self.encoder, self.data, self.base
        )

    def _facts(
        self, trainer: LoraTrainer, log: Sequence[Mapping[str, Any]], watching: Watching, checkpoint: Path | None
    ) -> dict[str, Any]:  # fmt: skip
        resumed_from = _step(checkpoint) if checkpoint else None
        training = training_facts(
            self.recipe, self.config, trainer.state, resumed_from=resumed_from, relief=trainer.relief.taken
        )
        evaluation = evaluation_facts(log, watching.completions(), watching.rates)
        return run_facts(self.recipe, self.base, self.data, training, evaluation)

    def _texts(
        self, model: Any, watching: Watching, tensors: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> dict[str, str]:  # fmt: skip
        """Return the files of what was generated, by name; none where nothing was asked for."""
        transcripts = record(
            model,
            self.encoder,
            watching.rows,
            watching.completions(),
            identity=adapter_identity(tensors, **{name: facts.get(name) for name in BASE_FACTS}),
            precision=precision_of(self.recipe.training),
            max_new_tokens=watching.max_new_tokens,
            checks=self.checks,
        )
        texts = {f"{TRANSCRIPTS}/{one.case}.json": one.to_text() for one in transcripts}
        return texts | ({GENERATIONS: watching.history} if transcripts else {})


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoint(work: Path, identity: str, resume: bool) -> Path | None:
    """Return the last whole checkpoint of the same run, or None; prepare the work folder.

    Raises:
        InputError: If there are checkpoints that this run was not asked to go on from, or of another run.
    """
    # transformers writes trainer_state.json last, so a checkpoint that has it is whole
    found = sorted((path.parent for path in work.glob("checkpoint-*/trainer_state.json")), key=_step)
    note = work / "run.json"
    if found and not resume:
        raise InputError(
            f"an unfinished run is there, at step {_step(found[-1])}",
            place=str(work),
            next_step="Go on from it with --resume, or remove the folder.",
        )
    if found and read_json(note) != {"identity": identity}:
        raise InputError(
            "the unfinished run there was of another recipe, data or number of devices",
            place=str(work),
            next_step="Restore them, or remove the folder.",
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(note, {"identity": identity})
    return found[-1] if found else None
