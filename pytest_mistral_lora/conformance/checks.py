"""A check of a target, the settings of a run that it depends on, and the errors that several checks share."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import (
    MistralLoraError,
    NoOracleError,
    NoTemplateError,
    PinError,
    RecipeError,
    TokenizerError,
)
from pytest_mistral_lora.extras import MissingExtraError, missing_extra

ROOT = "mistral-golden"
"""First part of every node id."""

Subject = Literal[
    "tokenizer", "template", "mask", "dataset", "encoded", "runner",
    "adapter", "merged", "manifest", "transcript", "gguf", "server", "answer", "train",
]  # fmt: skip
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
"""Every subject, in the order in which its checks run."""

UNLOADABLE: Mapping[type[MistralLoraError], str] = {RecipeError: "ML640", PinError: "ML208", TokenizerError: "ML201"}
"""The rule of each error that stops every check of a target."""


@dataclass(frozen=True, slots=True)
class Causes:
    """The errors that stop several checks of a run, such as a missing base: one check reports each error.

    Attributes:
        folder: A folder that all workers of the run share.
    """

    folder: Path

    def reporter(self, error: Exception, name: str) -> str:
        """Return the name of the check that reports an error: the first check that met it, in any process."""
        from filelock import FileLock

        digest = hashlib.sha256(f"{type(error).__name__}: {error}".encode("utf-8", "surrogatepass")).hexdigest()
        file = self.folder / f"cause-{digest[:16]}.txt"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.write_text(name, encoding="utf-8")
            return file.read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a run that checks depend on.

    Attributes:
        examples: Hypothesis examples for each law.
        seed: Seed of the examples; None for the same examples in every run.
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


@contextmanager
def interruptions_kept() -> Iterator[None]:
    """At the end, raise an interruption that Python has only reported.

    The garbage collector takes long over the suite's heap, and calls Hypothesis at its end: Ctrl-C often arrives there,
    and Python cannot raise an exception out of a callback of the collector.

    Raises:
        KeyboardInterrupt: If there was an interruption; `Terminated` for SIGTERM.
    """
    before, lost = sys.unraisablehook, list[type[BaseException]]()

    def note(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            lost.append(unraisable.exc_type)
        else:
            before(unraisable)

    sys.unraisablehook = note
    try:
        yield
    finally:
        sys.unraisablehook = before
        if lost:
            raise lost[0]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one target.

    Attributes:
        target: The target.
        subject: The judged part of the target.
        case: Name of the check, unique within target and subject.
        judge: Runs it; a `RecipeError` that it raises is the finding ML640, a `TokenizerError` ML201, a `PinError`
            ML208.
        causes: The errors of the run that one check reports for all; None if this check reports its own.
        is_kept: Whether `judge` returns the result of an earlier run.
    """

    target: Target
    subject: Subject
    case: str
    judge: Callable[[], Result]
    causes: Causes | None = None
    is_kept: bool = False

    @property
    def name(self) -> str:
        """The check's part of the node id: `<target>::<subject>::<case>`."""
        return f"{self.target.name}::{self.subject}::{self.case}"

    def run(self) -> Result:
        """Run the check; the fixes of its findings name the paths of the target.

        A recipe, base or tokenizer that does not load is the finding of one check in all subjects.
        """
        result = self._result()
        if not any(finding.names_paths for finding in result.findings):
            return result
        paths = self.target.fix_paths
        return replace(result, findings=tuple(finding.with_paths(paths) for finding in result.findings))

    def _result(self) -> Result:
        with interruptions_kept():
            try:
                return self.judge()
            except (NoOracleError, NoTemplateError, MissingExtraError) as error:
                return Result(not_checked=str(error))
            except (RecipeError, PinError, TokenizerError) as error:
                rule = next(rule for kind, rule in UNLOADABLE.items() if isinstance(error, kind))
                reporter = self.causes.reporter(error, self.name) if self.causes else self.name
                if reporter != self.name:
                    return Result(not_checked=f"{reporter} failed ({rule})")
                return Result((Finding(rule, error.found, error.place, error.expected, error.next_step),))
            except ImportError as error:
                missing = missing_extra(error)
                if missing is None:
                    raise
                return Result(not_checked=str(missing))
            finally:
                gc.collect(0)  # it would run at the next allocation, where interruptions are lost
