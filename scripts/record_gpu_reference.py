"""Record the tiny runs of a CPU with which `mistral-lora doctor --gpu` compares those of a GPU.

    $ python scripts/record_gpu_reference.py

Run it after a change that moves a loss of the tiny run, or with newer libraries; tests/training/test_gpu_trial.py
computes them again and compares.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pytest_mistral_lora.records.files import json_text, write_text
from pytest_mistral_lora.training.gpu_trial.reference import FILE
from pytest_mistral_lora.training.gpu_trial.trials import Trials


def main() -> int:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Trials(Path(folder), device="cpu", devices=0, has_bf16=True).record()
    write_text(FILE, json_text(reference.to_json()))
    sys.stdout.write(f"{FILE}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
