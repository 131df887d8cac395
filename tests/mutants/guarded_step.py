"""The first step of a guarded run of transformers' Trainer, whose loss a change may replace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guarded_runs import chat_rows, encoded, make_trainer

from pytest_mistral_lora import guard
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.finding import Finding


def first_step_findings(base: Path, compute_loss_func: Callable[..., Any]) -> list[Finding]:
    """Return what the guard finds in a run of one step.

    Args:
        base: The folder of the model, with the tokenizer `spm-v3`.
        compute_loss_func: As for `transformers.Trainer`.
    """
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and Trainer warn of one another
        rows = encoded(Oracle(shipped_tokenizer("spm-v3")), chat_rows(4))
        trainer = make_trainer(base, rows, Path(folder), max_steps=1, gradient_accumulation_steps=1)
        trainer.compute_loss_func = compute_loss_func
        callback = guard(trainer, on_finding="warn")
        trainer.train()
    assert callback.verdict is not None
    return list(callback.verdict.findings)
