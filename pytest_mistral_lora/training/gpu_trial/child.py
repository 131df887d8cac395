"""Train one tiny run of a GPU trial, and write its evidence: `python -m ….child RECIPE EVIDENCE`."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch

from pytest_mistral_lora.errors import StoppedError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.devices import is_main
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.run import train


def main() -> None:
    """Train, and write losses, gradient norms, memory and time as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("--stop-after-a-step", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    display, stop = RunDisplay(), StopRequest()
    if given.stop_after_a_step:
        stop.signal = signal.SIGTERM
        try:
            train(given.recipe, display=display, stop=stop)
        except StoppedError:
            return
        raise SystemExit("the run was to stop after its first step, and went on")
    result = train(given.recipe, resume=given.resume, display=display, stop=stop)
    steps = [line for line in result.log if "loss" in line]
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
