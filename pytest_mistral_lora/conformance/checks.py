"""What a check is, and which checks a target has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_mistral_lora.conformance.findings import Result
from pytest_mistral_lora.conformance.targets import Target

Subject = Literal["tokenizer", "template", "mask", "train"]
SUBJECTS: tuple[Subject, ...] = ("tokenizer", "template", "mask", "train")
"""Every subject, in the order in which its checks run."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the checks need to know of a run.

    Attributes:
        examples: Hypothesis examples for each law.
        seed: Seed of the examples; None for the same ones in every run.
        device: `cpu` or `cuda`, where models run; `auto` picks.
        skip_training: Whether the end-to-end train is left out.
        golden_folders: The user's own goldens.
        update: Whether to record them instead of judging by them.
        work_folder: Where a training run may write; shared by the workers of one session.
    """

    examples: int
    seed: int | None
    device: str
    skip_training: bool
    golden_folders: tuple[Path, ...]
    update: bool
    work_folder: Path


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one target.

    Attributes:
        target: What is judged.
        subject: What is looked at.
        case: Name of the check, unique within target and subject.
        run: Does it.
    """

    target: Target
    subject: Subject
    case: str
    run: Callable[[], Result]

    @property
    def name(self) -> str:
        """The check's part of the node id: `<target>::<subject>::<case>`."""
        return f"{self.target.name}::{self.subject}::{self.case}"


def collect(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield every check of a target; nothing heavy is imported or loaded before a check runs."""
    from pytest_mistral_lora.conformance import mask, own_goldens, template, tokenizer, train

    yield from tokenizer.checks(target, settings)
    yield from template.checks(target, settings)
    yield from own_goldens.checks(target, settings)
    yield from mask.checks(target, settings)
    if target.trains and not settings.skip_training:
        yield from train.checks(target, settings)
