"""Checks, the settings of a run that they depend on, and their collection for its targets."""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import AdapterTarget, GgufTarget
from pytest_mistral_lora.conformance.path_kinds import recognised, targets_of
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import DatasetTarget, EncodedTarget, RecipeTarget, RunnerTarget, Target
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
    "adapter", "merged", "manifest", "transcript", "gguf", "server", "train",
]  # fmt: skip
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
"""Every subject, in the order in which its checks run."""

UNLOADABLE: Mapping[type[MistralLoraError], str] = {RecipeError: "ML640", PinError: "ML208", TokenizerError: "ML201"}
"""The rule of each error that keeps every check of a target from judging."""


@dataclass(frozen=True, slots=True)
class Causes:
    """The errors that keep checks of a run from judging, such as a missing base: one check reports each of them.

    Attributes:
        folder: A folder that all workers of the run share.
    """

    folder: Path

    def reporter(self, error: Exception, name: str) -> str:
        """Return the name of the check that reports an error: the first that met it, in any process."""
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
        judge: Runs it; a `RecipeError` that it raises is the finding ML640, a `TokenizerError` ML201, a `PinError`
            ML208.
        causes: The errors of the run that one check reports for all; None if this check reports its own.
    """

    target: Target
    subject: Subject
    case: str
    judge: Callable[[], Result]
    causes: Causes | None = None

    @property
    def name(self) -> str:
        """The check's part of the node id: `<target>::<subject>::<case>`."""
        return f"{self.target.name}::{self.subject}::{self.case}"

    def run(self) -> Result:
        """Run the check; a recipe, base or tokenizer that does not load is the finding of one check in all subjects."""
        # A tokenizer file is 131,000 small dictionaries, and they are not garbage: with Python's limit of 700 new
        # objects, the collector walks them again and again, and takes a tenth of the suite's time.
        before = gc.get_threshold()
        gc.set_threshold(200_000, *before[1:])
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
            gc.set_threshold(*before)

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
            "commands": {},
        }


_ROOM = "pytest_mistral_lora.conformance"
# Each subject by the function that yields its checks: a subject is imported when one of its targets is collected.
_SUBJECTS = {
    "tokenizer": ("tokenizer", "checks"),
    "template": ("template", "checks"),
    "user goldens": ("user_goldens", "rendering_checks"),
    "mask": ("mask", "checks"),
    "recipe": ("dataset.recipe", "recipe_checks"),
    "dataset": ("dataset", "checks"),
    "encoded": ("encoded.audit", "checks"),
    "adapter": ("adapter", "checks"),
    "merged": ("merged", "checks"),
    "manifest": ("manifest", "checks"),
    "transcript": ("transcript", "checks"),
    "train": ("train", "checks"),
    "runner": ("runner", "checks"),
    "gguf": ("gguf", "checks"),
    "server": ("server", "checks"),
}
_OF_TOKENIZER = ("tokenizer", "template", "user goldens", "mask")
_OF_TARGET: dict[type[Target], tuple[str, ...]] = {
    Target: _OF_TOKENIZER,
    # first: a recipe, base or tokenizer that cannot be used is then its finding
    RecipeTarget: ("recipe", *_OF_TOKENIZER, "dataset"),
    DatasetTarget: ("dataset",),
    EncodedTarget: ("encoded",),
    RunnerTarget: ("runner",),
    AdapterTarget: ("adapter", "manifest", "transcript"),
    GgufTarget: ("gguf",),
    ServerTarget: ("server",),
}
"""The subjects of each kind of target, in order; of a merged model, `merged` is in the place of `adapter`."""

_Results = dict[tuple[Path, str | None, str, str], Result]
"""Results by the place of the tokenizer, its declared oracle, the subject and the case."""


def collect(targets: Sequence[Target], settings: Settings) -> Iterator[Check]:
    """Yield every check of the targets; no tokenizer or model is loaded before a check runs.

    The checks of the tiny train come last, so that it can run beside the others.
    """
    results: _Results = {}
    causes = Causes(settings.work_folder)
    for target in targets:
        yield from (replace(check, causes=causes) for check in _checks(target, settings, results))
    for target in targets:
        if target.trains and not settings.skip_training:
            yield from (replace(check, causes=causes) for check in _subject_checks("train", target, settings))


def _checks(target: Target, settings: Settings, results: _Results) -> Iterator[Check]:
    for named in next(_OF_TARGET[kind] for kind in type(target).mro() if kind in _OF_TARGET):
        is_merged = named == "adapter" and isinstance(target, AdapterTarget) and target.is_merged
        subject = "merged" if is_merged else named
        # which of the user's goldens apply depends on the target's name
        is_shared = subject in _OF_TOKENIZER and subject != "user goldens"
        for check in _subject_checks(subject, target, settings):
            yield replace(check, judge=partial(_judge_once, check, results)) if is_shared else check
    if isinstance(target, RecipeTarget) and target.made is not None:
        yield from _checks(target.made, settings, results)


def _subject_checks(subject: str, target: Target, settings: Settings) -> Iterator[Check]:
    module, function = _SUBJECTS[subject]
    found: Iterator[Check] = getattr(import_module(f"{_ROOM}.{module}"), function)(target, settings)
    return found


def _judge_once(check: Check, results: _Results) -> Result:
    """Return the result of a check, or of the same check of another target with the same tokenizer.

    A recipe and its base folder, or two recipes with one base, are such targets: each has every check, and the hundred
    checks of their tokenizer are paid once.
    """
    # here and not in `collect`: the base of a recipe is looked for when its first check runs
    tokenizer = check.target.tokenizer
    key = (tokenizer.path.resolve(), tokenizer.declared, check.subject, check.case)
    if key not in results:
        results[key] = check.judge()
    return results[key]


def check(
    paths: Sequence[Path],
    *,
    base: Path | None = None,
    tokenizer: Path | None = None,
    oracle: str | None = None,
    examples: int = 20,
    device: str = "auto",
    train: bool = False,
) -> Iterator[tuple[dict[str, Any], Result]]:
    """Judge paths and yield the outcome of each check, as `run_checks` does.

    Args:
        paths: Recipes, rows, encoded rows, adapter folders, and tokenizers (a checkpoint folder, or a single file); if
            empty, every tokenizer that mistral-common ships.
        base: The base checkpoint's folder of the adapters, or None.
        tokenizer: The tokenizer of rows, or None for those of the paths.
        oracle: The oracle of folders without a Mistral tokenizer file: a name, a path or `none`; None to recognise it.
        examples: Hypothesis examples for each law.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        train: Whether the tiny train runs with the tokenizers too.

    Raises:
        InputError: If there is nothing at a path, or nothing that is checked.
    """
    targets = targets_of([recognised(path, base) for path in paths], base, oracle, tokenizer)
    yield from run_checks(targets, examples=examples, device=device, train=train)


def run_checks(
    targets: Sequence[Target], *, examples: int = 20, device: str = "auto", train: bool = False
) -> Iterator[tuple[dict[str, Any], Result]]:
    """Judge targets and yield the outcome of each check: its record as plain data, and its result.

    Args:
        targets: The targets.
        examples: Hypothesis examples for each law.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        train: Whether the tiny train runs with the tokenizers too.
    """
    with tempfile.TemporaryDirectory(prefix="mistral-check-") as folder:
        settings = Settings(examples, None, device, not train, (), False, Path(folder))
        for one in collect(targets, settings):
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries' warnings are not about the user's code
                result = one.run()
            outcome = "skipped" if result.not_checked else "passed"
            if any(finding.severity == "error" for finding in result.findings):
                outcome = "failed"
            yield one.record(result, outcome=outcome, seconds=time.perf_counter() - start), result
