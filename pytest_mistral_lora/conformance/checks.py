"""Checks, and the settings of a run that they depend on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import NoOracleError, NoTemplateError, PinError, TokenizerError

ROOT = "mistral-golden"
"""First part of every node id."""

Subject = Literal[
    "tokenizer", "template", "mask", "dataset", "encoded", "runner", "adapter", "manifest", "transcript", "train"
]  # fmt: skip
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
"""Every subject, in the order in which its checks run."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run that checks depend on.

    Attributes:
        examples: Hypothesis examples for each law.
        seed: Seed of the examples; None for the same ones in every run.
        device: The device of the models: `cpu` or `cuda`; `auto` picks one.
        skip_training: Whether the end-to-end train is left out.
        golden_folders: The user's own goldens.
        update: Whether to record them instead of judging by them.
        work_folder: The folder of training runs and extractions; the workers of one session share it.
        require_manifest: Whether an adapter folder without a manifest is an error, not just not checked.
    """

    examples: int
    seed: int | None
    device: str
    skip_training: bool
    golden_folders: tuple[Path, ...]
    update: bool
    work_folder: Path
    require_manifest: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one target.

    Attributes:
        target: The target.
        subject: The part of the target that is judged.
        case: Name of the check, unique within target and subject.
        judge: Runs it; a `TokenizerError` that it raises is the finding ML201, a `PinError` ML208.
    """

    target: Target
    subject: Subject
    case: str
    judge: Callable[[], Result]

    @property
    def name(self) -> str:
        """The check's part of the node id: `<target>::<subject>::<case>`."""
        return f"{self.target.name}::{self.subject}::{self.case}"

    def run(self) -> Result:
        """Run the check; a base or tokenizer that does not load is the same finding in every subject."""
        try:
            with _rare_collections():
                return self.judge()
        except (NoOracleError, NoTemplateError) as error:
            return Result(not_checked=str(error))
        except PinError as error:
            return Result((Finding("ML208", error.found, error.place, error.expected, error.next_step),))
        except TokenizerError as error:
            return Result((Finding("ML201", error.found, error.place, error.expected),))

    def record(self, result: Result | None, *, outcome: str, seconds: float) -> dict[str, Any]:
        """Return the outcome of a check as plain data, for tables and reports.

        Args:
            result: Its findings; None if it stopped with an error.
            outcome: `passed`, `failed`, `known` or `skipped` (not checked).
            seconds: How long it took.
        """
        return {
            "nodeid": f"{ROOT}::{self.name}",
            "outcome": outcome,
            "seconds": round(seconds, 4),
            "target": self.target.name,
            "subject": self.subject,
            "case": self.case,
            "findings": [finding.to_json() for finding in result.findings] if result else [],
            "known": [],
            "not_checked": result.not_checked if result else "",
            "facts": dict(result.facts) if result else {},
        }


@contextmanager
def _rare_collections() -> Iterator[None]:
    # A tokenizer file is 131,000 small dictionaries, and they are not garbage: with Python's limit of 700 new objects,
    # the collector walks them again and again, and takes a tenth of the suite's time.
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
