"""The first steps of a guarded run of transformers' Trainer, whose model, loss and settings a change may replace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guarded_runs import chat_rows, encoded, lora_model, make_trainer

from pytest_mistral_lora import guard
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.finding import Finding


def guarded_findings(
    base: Path,
    compute_loss_func: Callable[..., Any] | None,
    *,
    model: Callable[[Path], Any] = lora_model,
    change: Callable[[Any], None] = lambda trainer: None,
) -> list[Finding]:
    """Return what the guard finds in a run: of one step if its loss is replaced, else of three.

    Args:
        base: The folder of the model, with the tokenizer `spm-v3`.
        compute_loss_func: As for `transformers.Trainer`.
        model: Returns the model of the run.
        change: Changes the trainer.
    """
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and Trainer warn of one another
        rows = encoded(Oracle(shipped_tokenizer("spm-v3")), chat_rows(4))
        settings = {"max_steps": 3 if compute_loss_func is None else 1, "gradient_accumulation_steps": 1}
        trainer = make_trainer(base, rows, Path(folder), model=model(base), **settings)
        trainer.compute_loss_func = compute_loss_func
        change(trainer)
        callback = guard(trainer, on_finding="warn")
        trainer.train()
    assert callback.verdict is not None
    return list(callback.verdict.findings)
