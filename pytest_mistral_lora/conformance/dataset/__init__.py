"""Subject `dataset`: a recipe, and every row of its files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import (
    InputError,
    MachineError,
    NoOracleError,
    NoTemplateError,
    RecipeError,
    TokenizerError,
)

CASES = (
    "rows-are-valid",
    "split-has-rows",
    "laws-hold",
    "backends-agree",
    "something-is-supervised",
    "nothing-is-cut",
    "no-duplicates",
    "no-leakage",
    "no-control-literals",
    "turns-stay-apart",
    "answers-are-not-empty",
    "texts-are-whole",
    "tool-calls-fit-the-tools",
    "statistics",
)
"""Every case, in the order of the report."""


def checks(target: RecipeTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a recipe's rows; the first that runs makes the pass for all."""
    results = cache(partial(_shared, target, settings))

    def judge(case: str) -> Result:
        return results()[case]

    for case in CASES:
        yield Check(target, "dataset", case, partial(judge, case))


def recipe_checks(target: RecipeTarget, settings: Settings) -> Iterator[Check]:
    """Yield the check that `mistral-lora train` accepts the recipe; `checks` judge its rows."""
    yield Check(target, "dataset", "recipe", partial(_judge_recipe, target))


def _judge_recipe(target: RecipeTarget) -> Result:
    """Judge a recipe by the functions that refuse it before a run.

    Raises:
        RecipeError: If it cannot be read.
        PinError: If its base is missing, or is not the one that is pinned.
        TokenizerError: If its base's tokenizer does not load.
    """
    from pytest_mistral_lora.training.prepare import check_machine, check_output, plan_run

    recipe, place, findings = target.recipe, str(target.path), []

    def refused(rule: str, error: InputError) -> Finding:
        where = f"{place}, {error.place}" if isinstance(error, RecipeError) else error.place
        return Finding(rule, error.found, where, error.expected, error.next_step)

    base = target.base_folder
    steps = (check_output, check_machine, lambda one: plan_run(one, base, lambda folder: target.tokenizer))
    for step in steps:
        try:
            step(recipe)
        except MachineError as error:
            findings.append(refused("ML642", error))
        except TokenizerError as error:
            if not isinstance(error, NoOracleError | NoTemplateError):
                raise
            if isinstance(error, NoOracleError) and target.tokenizer.declared != NO_ORACLE:
                # the check `oracle` of the tokenizer reports it
                return Result(tuple(findings), not_checked="" if findings else str(error))
            findings.append(refused("ML641", error))
        except InputError as error:
            findings.append(refused("ML641", error))
    return Result(tuple(findings))


def check_dataset(
    recipe: str | Path, *, processes: int | None = None, progress: TextIO | None = None
) -> dict[str, Result]:
    """Check every row of a recipe's files, and return the result of each check by case.

    Args:
        recipe: The recipe file.
        processes: Number of processes that judge rows; None for one if the files are short, else one for each CPU.
        progress: Stream for a progress bar, such as `sys.stderr`; drawn if it is a terminal and the pass takes long.

    Raises:
        RecipeError: If the recipe cannot be used.
        PinError: If its base is missing, or is not the one that is pinned.
        TokenizerError: If the base has no tokenizer that can be used.
    """
    path = Path(recipe)
    return dataset_results(RecipeTarget(path.stem, path), processes=processes, progress=progress)


def dataset_results(
    target: RecipeTarget, *, processes: int | None = None, progress: TextIO | None = None
) -> dict[str, Result]:
    """Check the dataset of a target like `check_dataset`; its tokenizer may be loaded already.

    Raises:
        RecipeError: As `check_dataset`.
        PinError: As `check_dataset`.
        TokenizerError: As `check_dataset`.
    """
    from pytest_mistral_lora.chat.reading.chunks import DataFile, is_long
    from pytest_mistral_lora.conformance.dataset.report import report, scan
    from pytest_mistral_lora.conformance.dataset.rows import ScanPlan

    data = target.recipe.data
    files = [*(DataFile(path, False) for path in data.train), *(DataFile(path, True) for path in data.eval)]
    no_comparison = _no_comparison(target)
    plan = ScanPlan(
        target.tokenizer.path,
        target.recipe.backend,
        target.recipe.training.policy,
        data.held_out,
        compares=not no_comparison,
        oracle_name=target.tokenizer.declared,
        official=not no_comparison
        and is_long(files)
        and target.tokenizer.template.source == target.oracle.chat_template(),
    )
    tally = scan(plan, files, tokenizer=target.tokenizer, processes=processes, progress=progress)
    results = report(tally, files, plan, place=f"{target.path}, data.held_out", no_comparison=no_comparison)
    return {case: results[case] for case in CASES}


def _no_comparison(target: RecipeTarget) -> str:
    """Return why the two backends cannot be compared, or nothing if they can.

    Raises:
        TokenizerError: If the backend of the recipe cannot be used.
    """
    backend = target.recipe.backend
    needs: dict[str, Callable[[], Any]] = {
        "mistral-common": lambda: target.oracle,
        "chat-template": lambda: target.tokenizer.template,
    }
    # outside the try: a recipe whose own backend cannot be used has no dataset to check at all
    needs[backend]()
    try:
        for need in needs.values():
            need()
    except TokenizerError as error:
        return f"the two backends cannot be compared: {error}"
    return ""


def _shared(target: RecipeTarget, settings: Settings) -> dict[str, Result]:
    """Return the results of a pass that this process makes, or that another worker of the session has made."""
    # workers of pytest-xdist judge cases of the same dataset: the first makes the pass, the others wait for its file
    from filelock import FileLock

    from pytest_mistral_lora.chat.reading import read_json
    from pytest_mistral_lora.records.files import canonical_json, sha256_bytes, write_json

    data = target.recipe.data
    # by size and time, not by content, because each worker does this, and data can be long
    states = [(str(path), *_state(path)) for path in (*data.train, *data.eval)]
    identity = sha256_bytes(canonical_json([str(target.path), target.recipe.as_written(), states]))[:16]
    file = settings.work_folder / f"dataset-{identity}.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            results = dataset_results(target, progress=sys.__stderr__)
            plain = {
                case: {
                    "findings": [asdict(finding) for finding in result.findings],
                    "not_checked": result.not_checked,
                    "facts": dict(result.facts),
                }
                for case, result in results.items()
            }
            write_json(file, plain)
    return {
        case: Result(
            tuple(Finding(**one) for one in kept["findings"]), kept["not_checked"], tuple(kept["facts"].items())
        )
        for case, kept in read_json(file).items()
    }


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        # a missing file is a finding of the pass, which cannot be made before this
        return (-1, -1)
    return status.st_size, status.st_mtime_ns
