"""What a finished run leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.training.answers.smoke import Completion, Probe
from pytest_mistral_lora.training.rows.loading import RunData
from pytest_mistral_lora.training.save import Adapter


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
