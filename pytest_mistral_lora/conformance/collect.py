"""The checks of each kind of target."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import (
    AdapterTarget,
    EncodedTarget,
    RecipeTarget,
    RunnerTarget,
    Target,
    embedded_targets,
    named_targets,
)
from pytest_mistral_lora.errors import InputError

_ROOM = "pytest_mistral_lora.conformance"
# Each subject by the function that yields its checks: a subject is imported when one of its targets is collected.
_SUBJECTS = {
    "tokenizer": ("tokenizer.checks", "checks"),
    "template": ("template", "checks"),
    "user goldens": ("user_goldens", "rendering_checks"),
    "mask": ("mask.checks", "checks"),
    "dataset": ("dataset.checks", "checks"),
    "encoded": ("encoded.audit", "checks"),
    "adapter": ("adapter.checks", "checks"),
    "manifest": ("manifest", "checks"),
    "transcript": ("transcript", "checks"),
    "train": ("train", "checks"),
    "runner": ("runner", "checks"),
}
# The user's goldens are not among them: which of them apply depends on the target's name.
_OF_TOKENIZER = ("tokenizer", "template", "mask")

_Results = dict[tuple[Path, str, str], Result]
"""Results by the place of the tokenizer, the subject and the case."""


def collect(targets: Sequence[Target], settings: Settings) -> Iterator[Check]:
    """Yield every check of the targets; no tokenizer or model is loaded before a check runs.

    The checks of the tiny train come last, so that it can run beside the others.
    """
    results: _Results = {}
    for target in targets:
        yield from _checks(target, settings, results)
    for target in targets:
        if target.trains and not settings.skip_training:
            yield from _subject_checks("train", target, settings)


def _checks(target: Target, settings: Settings, results: _Results) -> Iterator[Check]:
    if isinstance(target, EncodedTarget):
        subjects = ["encoded"]
    elif isinstance(target, RunnerTarget):
        subjects = ["runner"]
    elif isinstance(target, AdapterTarget):
        subjects = ["adapter", "manifest", "transcript"]
    else:
        subjects = ["tokenizer", "template", "user goldens", "mask"]
    if isinstance(target, RecipeTarget):
        subjects.append("dataset")
    for subject in subjects:
        for check in _subject_checks(subject, target, settings):
            yield _judged_once(check, results) if subject in _OF_TOKENIZER else check
    if isinstance(target, RecipeTarget) and target.made is not None:
        yield from _checks(target.made, settings, results)


def _subject_checks(subject: str, target: Target, settings: Settings) -> Iterator[Check]:
    module, function = _SUBJECTS[subject]
    found: Iterator[Check] = getattr(import_module(f"{_ROOM}.{module}"), function)(target, settings)
    return found


def _judged_once(check: Check, results: _Results) -> Check:
    """Return a check that takes its result from the same check of another target with the same tokenizer.

    A recipe and its base folder, or two recipes with one base, are such targets: each has every check, and the hundred
    checks of their tokenizer are paid once.
    """

    def judge() -> Result:
        # here and not in `collect`: the base of a recipe is looked for when its first check runs
        key = (check.target.tokenizer.path.resolve(), check.subject, check.case)
        if key not in results:
            results[key] = check.judge()
        return results[key]

    return replace(check, judge=judge)


_RECIPES = (".yaml", ".yml")
_ADAPTERS = ("adapter_config.json", "manifest.json")


def check(
    paths: Sequence[Path], *, base: Path | None = None, examples: int = 20, device: str = "auto", train: bool = False
) -> Iterator[tuple[dict[str, Any], Result]]:
    """Judge paths and yield the outcome of each check: its record as plain data, and its result.

    Args:
        paths: Recipes (`*.yaml`), adapter folders, and tokenizers (a checkpoint folder, or a single file); if empty,
            every tokenizer that mistral-common ships.
        base: The base checkpoint's folder of the adapters, or None.
        examples: Hypothesis examples for each law.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        train: Whether the tiny train runs with the tokenizers too.

    Raises:
        InputError: If there is nothing at a path, or a recipe cannot be used.
    """
    targets = targets_of(paths, base)
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


def targets_of(paths: Sequence[Path], base: Path | None = None) -> list[Target]:
    """Return a target for each path, by the kind of file or folder at it; with no path, the embedded default.

    Raises:
        InputError: If a path does not exist.
    """
    if not paths:
        return embedded_targets()
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", place=str(path))
    recipes = [path for path in paths if path.suffix in _RECIPES]
    adapters = [path for path in paths if any((path / name).is_file() for name in _ADAPTERS)]
    tokenizers = [path for path in paths if path not in recipes and path not in adapters]
    return named_targets(tokenizers=tokenizers, recipes=recipes, adapters=adapters, base=base)
