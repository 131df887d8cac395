"""What a finished run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.adapter import adapter_tensors
from pytest_mistral_lora.training.devices import precision_of
from pytest_mistral_lora.training.generate.callback import GENERATIONS, GenerationCallback
from pytest_mistral_lora.training.generate.generate import Completion, Probe, probe
from pytest_mistral_lora.training.generate.record import BASE_FACTS, adapter_identity, record
from pytest_mistral_lora.training.prepare import Preparation
from pytest_mistral_lora.training.rows.loading import RunData
from pytest_mistral_lora.training.run_metadata import evaluation_facts, run_facts, training_facts
from pytest_mistral_lora.training.save import Adapter, write_run
from pytest_mistral_lora.training.step.trainer import LoraTrainer
from pytest_mistral_lora.training.work_folder import WorkFolder, step_of


@dataclass(frozen=True)
class RunResult:
    """What a finished run left, on disk and in memory.

    Attributes:
        output: The adapter folder.
        manifest: Its manifest.
        log: The training log: one mapping a line, with `step` and `loss` or `eval_loss` (nats a supervised token), with
            rates of `eval_format/…`, or with the `loss_scale` of a step that overflowed in fp16 and was skipped.
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


_PROBED_ROWS = 8


def finish(
    prepared: Preparation,
    trainer: LoraTrainer,
    initial: Mapping[str, Any],
    watching: GenerationCallback,
    work: WorkFolder,
    checkpoint: Path | None,
) -> RunResult:
    """Write the folder of a run that has made all its steps, and remove its work folder; by all processes.

    Args:
        prepared: What was trained.
        trainer: The trainer, at its end.
        initial: The adapter's tensors before the first step.
        watching: What was generated.
        work: The work folder.
        checkpoint: What the run went on from, or None.

    Raises:
        TrainingError: If the adapter is not sound; then nothing is written.
        DiskError: If the folder cannot be written.
    """
    model: Any = trainer.model
    tensors = adapter_tensors(model)
    adapter = Adapter(tensors, initial, prepared.layers, model.peft_config["default"], prepared.saved)
    completions = watching.answer_rows()
    # accelerate's wrapper stays around forward, and computes otherwise than the adapter that is loaded afresh
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    probed = probe(model, prepared.data.train.encoded[:_PROBED_ROWS])
    # the last line of transformers has the time of day's figures, which no two runs share
    log = [line for line in trainer.state.log_history if "train_runtime" not in line]
    main = trainer.accelerator.is_main_process
    facts = _facts(prepared, trainer, log, watching, checkpoint) if main else {}
    texts = _texts(prepared, model, watching, tensors, facts)  # by all processes: a sharded model is called by all
    manifest: Mapping[str, Any] = {}
    if main:
        with work.explains_failed_output():
            manifest = write_run(
                prepared.recipe.output,
                adapter,
                encoder=prepared.encoder,
                base_folder=prepared.base,
                first_row=(prepared.data.train.rows[0], prepared.data.train.encoded[0]),
                log=log,
                facts=facts,
                texts=texts,
            )
        shutil.rmtree(work.path, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return RunResult(
        prepared.recipe.output,
        manifest,
        log,
        adapter,
        probed,
        completions,
        model,
        prepared.encoder,
        prepared.data,
        prepared.base,
    )


def _facts(
    prepared: Preparation,
    trainer: LoraTrainer,
    log: Sequence[Mapping[str, Any]],
    watching: GenerationCallback,
    checkpoint: Path | None,
) -> dict[str, Any]:
    training = training_facts(
        prepared.recipe,
        prepared.config,
        trainer.state,
        resumed_from=step_of(checkpoint) if checkpoint else None,
        relief=trainer.oom_handler.changes,
    )
    evaluation = evaluation_facts(log, watching.answer_rows(), watching.latest_rates())
    return run_facts(prepared.recipe, prepared.base, prepared.data, training, evaluation)


def _texts(
    prepared: Preparation,
    model: Any,
    watching: GenerationCallback,
    tensors: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """Return the files of what was generated, by name; none where nothing was asked for."""
    transcripts = record(
        model,
        prepared.encoder,
        watching.rows,
        watching.answer_rows(),
        identity=adapter_identity(tensors, **{name: facts.get(name) for name in BASE_FACTS}),
        precision=precision_of(prepared.recipe.training),
        max_new_tokens=watching.max_new_tokens,
        checks=prepared.checks,
    )
    texts = {f"{TRANSCRIPTS}/{one.case}.json": one.to_text() for one in transcripts}
    return texts | ({GENERATIONS: watching.history} if transcripts else {})
