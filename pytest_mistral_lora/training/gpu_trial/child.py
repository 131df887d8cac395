"""Train one tiny run of a GPU trial, and write its evidence: `python -m ….child RECIPE EVIDENCE`."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.errors import StoppedError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.adapter import attach_adapter
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.devices import is_main
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.run import train

_SCALE = 2.0**16
"""Factor of the loss in fp16: a power of two, so that it rounds nothing."""


def log_of_fp16_on_cpu(recipe_file: Path) -> list[dict[str, Any]]:
    """Train in fp16 on a CPU, which accelerate refuses, and return the log.

    The base and autocast are in fp16, and the loss is scaled by a factor that never changes.

    Args:
        recipe_file: A recipe in fp32.
    """
    recipe = load_recipe(recipe_file)
    prepared = prepare(recipe)
    model = load_base(prepared.base, "fp16", "cpu")
    model = attach_adapter(model, recipe.lora, prepared.layers, seed=recipe.training.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient / _SCALE)
    work = recipe.output.with_name("fp16")
    trainer: Any = make_trainer(model, recipe.training, prepared.data.train.encoded, [], work=work)
    trainer.compute_loss_context_manager = lambda: torch.autocast("cpu", torch.float16)
    trainer.accelerator.backward = lambda loss: (loss * _SCALE).backward()
    trainer.train()
    log: list[dict[str, Any]] = trainer.state.log_history
    return log


def main() -> None:
    """Train, and write losses, gradient norms, memory and time as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("--stop-after-a-step", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fp16-on-cpu", action="store_true")
    given = parser.parse_args()
    display, stop = RunDisplay(), StopRequest()
    if given.stop_after_a_step:
        stop.signal = signal.SIGTERM
        try:
            train(given.recipe, display=display, stop=stop)
        except StoppedError:
            return
        raise SystemExit("the run was to stop after its first step, and went on")
    if given.fp16_on_cpu:
        log: Sequence[Mapping[str, Any]] = log_of_fp16_on_cpu(given.recipe)
    else:
        log = train(given.recipe, resume=given.resume, display=display, stop=stop).log
    steps = [line for line in log if "loss" in line]
    if is_main():
        write_json(
            given.evidence,
            {
                "losses": [line["loss"] for line in steps],
                "gradient_norms": [line["grad_norm"] for line in steps],
                "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                "seconds": display.seconds,
            },
        )


if __name__ == "__main__":
    main()
