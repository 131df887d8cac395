"""A check of a target, the settings of a run that it depends on, and the errors that several checks share."""

from __future__ import annotations

import gc
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import (
    EntryPointError,
    MistralLoraError,
    NoOracleError,
    NoTemplateError,
    PinError,
    RecipeError,
    TokenizerError,
    is_disk_fault,
    is_out_of_memory,
    is_raised_here,
    one_line,
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
        folder: A folder that all workers of the run share; None for a run in one process, which needs no file.
    """

    folder: Path | None
    _reporters: dict[str, str] = field(default_factory=dict, repr=False)

    def reporter(self, error: Exception, name: str) -> str:
        """Return the name of the check that reports an error: the first check that met it, in any process."""
        text = f"{type(error).__name__}: {error}"
        if self.folder is None:
            return self._reporters.setdefault(text, name)
        from filelock import FileLock

        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        file = self.folder / f"cause-{digest[:16]}.txt"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.write_text(name, encoding="utf-8")
            return file.read_text(encoding="utf-8")


class MadeFolder:
    """A temporary folder that is made when it is first asked for: many runs need no file."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mistral-check-")
        return Path(self._folder.name)

    def remove(self) -> None:
        """Remove the folder, if it was made."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


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
        shared_folder: The folder that the workers of one session share for `work_folder`; None for a session in one
            process, which makes its folder when it needs one.
        require_manifest: Whether an adapter folder without a manifest is an error, not just not checked.
    """

    examples: int
    seed: int | None
    device: str
    skip_training: bool
    golden_folders: tuple[Path, ...]
    update: bool
    shared_folder: Path | None
    require_manifest: bool = False
    _made: MadeFolder = field(default_factory=MadeFolder, repr=False, compare=False)

    @property
    def work_folder(self) -> Path:
        """The folder of training runs and extractions."""
        return self._made.path if self.shared_folder is None else self.shared_folder

    def close(self) -> None:
        """Remove the folder that the session has made."""
        self._made.remove()


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
        findings = self.target.in_words(result.findings)
        if any(finding.names_paths for finding in findings):
            paths = self.target.fix_paths
            findings = tuple(finding.with_paths(paths) for finding in findings)
        facts = result.facts
        if self.target.declaration is not None:
            facts = (*facts, ("objective", self.target.declaration.words))
        # targets share a result, which stays the same object
        is_same = findings == result.findings and facts == result.facts
        return result if is_same else replace(result, findings=findings, facts=facts)

    def _result(self) -> Result:
        with interruptions_kept():
            try:
                return self._judged()
            except (NoOracleError, NoTemplateError, MissingExtraError, EntryPointError) as error:
                return Result(not_checked=str(error))
            except (RecipeError, PinError, TokenizerError) as error:
                rule = next(rule for kind, rule in UNLOADABLE.items() if isinstance(error, kind))
                reporter = self.causes.reporter(error, self.name) if self.causes else self.name
                if reporter != self.name:
                    return Result(not_checked=f"{reporter} failed ({rule})")
                return Result((Finding(rule, error.found, error.place, error.expected, fix=error.next_step),))
            except ImportError as error:
                missing = missing_extra(error)
                if missing is None:
                    raise
                return Result(not_checked=str(missing))
            finally:
                gc.collect(0)  # it would run at the next allocation, where interruptions are lost

    def _judged(self) -> Result:
        try:
            return self.judge()
        except (MistralLoraError, ImportError):
            raise
        except Exception as error:
            # the tokenizer of a program may raise any error, wherever it is called
            is_of_machine = is_disk_fault(error) or is_out_of_memory(error)
            if not self.target.is_in_memory or is_of_machine or is_raised_here(error):
                raise
            found = f"it raises {type(error).__name__}: {one_line(error)}"
            raise TokenizerError(found, place=self.target.tokenizer.place) from error
