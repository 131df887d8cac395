"""The checks of the rows of a recipe or of a single file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.dataset.cases import CASES, OF_A_RECIPE, OF_AN_ORACLE
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, Target
from pytest_mistral_lora.errors import InputError, RecipeError, TokenizerError, counted

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, ScanPlan


def checks(target: RecipeTarget | DatasetTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a target's rows; the first check that runs makes the pass for all."""
    results = cache(partial(_shared, target, settings))
    left_out = OF_A_RECIPE if isinstance(target, DatasetTarget) else ()
    if isinstance(target, DatasetTarget) and not target.compares:
        left_out = (*left_out, "backends-agree")
    if isinstance(target, DatasetTarget) and target.judge.oracle_name == "none":
        # the tokenizer is declared to be none of Mistral's
        left_out = (*left_out, *OF_AN_ORACLE)
    for case in CASES:
        if case not in left_out:
            yield Check(target, "dataset", case, partial(lambda case: results()[case], case))


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
        PinError: If its base is missing, or is not the pinned one.
        TokenizerError: If the base has no usable tokenizer.
    """
    path = Path(recipe)
    return dataset_results(RecipeTarget(path.stem, path), processes=processes, progress=progress)


def file_results(path: Path, tokenizer: CheckpointTokenizer) -> dict[str, Result]:
    """Check every row of a file by a tokenizer, and return the result of each check by case.

    Raises:
        TokenizerError: If the tokenizer cannot be used.
    """
    return dataset_results(DatasetTarget(path.name, path, judge=Target.of_loaded(tokenizer)))


def dataset_results(
    target: RecipeTarget | DatasetTarget, *, processes: int | None = None, progress: TextIO | None = None
) -> dict[str, Result]:
    """Check the dataset of a target like `check_dataset`; its tokenizer may already be loaded.

    Raises:
        RecipeError: As `check_dataset`.
        PinError: As `check_dataset`.
        TokenizerError: As `check_dataset`.
    """
    no_comparison = why_not_compared(target)
    try:
        files = target.files
    except InputError as error:
        if isinstance(error, RecipeError):
            raise
        found = Finding("ML602", error.found, error.place, error.expected, error.next_step)
        results = {case: Result(not_checked="rows-are-valid failed (ML602)") for case in CASES}
        return {**results, "rows-are-valid": Result((found,))}
    results = _judged(target, files, no_comparison, processes=processes, progress=progress)
    return {case: results[case] for case in CASES}


def dataset_statistics(
    target: RecipeTarget | DatasetTarget, files: Sequence[DataFile] | None = None, **how: Any
) -> dict[str, Any]:
    """Return the figures of a dataset, as plain JSON data: one pass over its rows, which compares no backends.

    Args:
        target: The recipe, or the rows.
        files: Its data files, if they are already open.
        how: `processes` and `progress`, as for `check_dataset`.

    Raises:
        InputError: As `check_dataset`; and if a file cannot be read, or no row can be used.
    """
    files = target.files if files is None else files
    results = _judged(target, files, "not compared", near=True, **how)
    figures = dict(results["statistics"].facts)
    for finding in results["rows-are-valid"].findings:
        # without one file, the other files' figures would pass for the dataset's
        if finding.rule == "ML602" or not figures["rows"]:
            raise InputError(finding.found, place=finding.place, expected=finding.expected, next_step=finding.detail)
    return figures


def _judged(
    target: RecipeTarget | DatasetTarget, files: Sequence[DataFile], no_comparison: str, near: bool = False, **how: Any
) -> dict[str, Result]:
    """Make the pass over the rows of a target, and return the result of each check by case.

    Args:
        target: The target.
        files: Its data files.
        no_comparison: Why the backends are not compared; empty if they are.
        near: Whether to count nearly equal rows although no row is held out.
        how: `processes` and `progress`, as for `check_dataset`.
    """
    from pytest_mistral_lora.conformance.dataset.report import scan

    plan = scan_plan(target, files, no_comparison, near)
    found = scan(plan, files, tokenizer=target.tokenizer, **how)
    return results_of(target, files, plan, found, no_comparison)


def scan_plan(
    target: RecipeTarget | DatasetTarget, files: Sequence[DataFile], no_comparison: str, near: bool = False
) -> ScanPlan:
    """Return the settings by which the rows of a target are judged; the arguments are as for `_judged`."""
    from pytest_mistral_lora.chat.encoded import Policy
    from pytest_mistral_lora.chat.oracle import WRITES_TEMPLATES
    from pytest_mistral_lora.chat.reading.chunks import is_long
    from pytest_mistral_lora.conformance.dataset.repeats import sketches_available
    from pytest_mistral_lora.conformance.dataset.rows import ScanPlan

    policy, held_out = Policy(max_length=sys.maxsize), 0.0
    if isinstance(target, RecipeTarget):
        policy, held_out = target.recipe.training.policy, target.recipe.data.held_out
    return ScanPlan(
        target.tokenizer.path,
        target.backend,
        policy,
        held_out,
        compares=not no_comparison,
        oracle_name=target.tokenizer.declared,
        official=not no_comparison
        and WRITES_TEMPLATES
        and is_long(files)
        and target.tokenizer.template.source == target.oracle.chat_template(),
        # in a check, they are only worth their time and memory for a split
        sketches=sketches_available() and (near or bool(held_out) or any(file.is_held_out for file in files)),
        alone=isinstance(target, DatasetTarget),
    )


def results_of(
    target: RecipeTarget | DatasetTarget,
    files: Sequence[DataFile],
    plan: ScanPlan,
    found: DatasetPass,
    no_comparison: str,
) -> dict[str, Result]:
    """Return the result of each check by case, once the pass has seen all rows.

    Args:
        target: The target.
        files: Its data files, which the pass has read.
        plan: The settings by which the rows were judged.
        found: The pass.
        no_comparison: Why the backends were not compared; empty if they were.
    """
    from pytest_mistral_lora.conformance.dataset.report import epoch, report

    _note_exchanged(found, files)
    if plan.alone:
        _note_columns(found, files)
    prompts = found.compare_prompts(target.tokenizer) if plan.compares else {}
    results = report(found, files, plan, recipe=target.place, no_comparison=no_comparison, prompts=prompts)
    facts = results["statistics"].facts
    if isinstance(target, RecipeTarget):
        facts += (("epoch", epoch(target.recipe.training, dict(facts))),)
    results["statistics"] = replace(results["statistics"], facts=(*facts, *_basis(target, files, found)))
    return results


def results_to_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the results of checks as plain JSON data, for another process or a later run."""
    return {
        case: {
            "findings": [finding.to_json() for finding in result.findings],
            "not_checked": result.not_checked,
            "facts": dict(result.facts),
        }
        for case, result in results.items()
    }


def results_from_json(data: Mapping[str, Any]) -> dict[str, Result]:
    """Return the results that `results_to_json` has made data of."""
    return {
        case: Result(
            tuple(Finding.from_json(finding) for finding in kept["findings"]),
            kept["not_checked"],
            tuple(kept["facts"].items()),
        )
        for case, kept in data.items()
    }


def _note_exchanged(found: DatasetPass, files: Sequence[DataFile]) -> None:
    """Note the declarations that read prompts as answers, or the like, by the names of their columns or roles."""
    from pytest_mistral_lora.formats.sources import ConvertedSource

    for index, file in enumerate(files):
        if isinstance(file.source, ConvertedSource) and (words := file.source.source.layout.exchanged):
            place = file.place
            found.look_at(index, place)
            found.findings.add(Finding("ML676", f"its declaration reads {words}", place, "each as what its name says"))


def _note_columns(found: DatasetPass, files: Sequence[DataFile]) -> None:
    """Note the columns of converted files that another trainer reads otherwise, as the import has counted them."""
    from pytest_mistral_lora.conformance.dataset.declared_answers import letters_finding
    from pytest_mistral_lora.conformance.dataset.row_findings import column_finding
    from pytest_mistral_lora.formats.sources import ConvertedSource

    for index, file in enumerate(files):
        if isinstance(file.source, ConvertedSource):
            place = file.place
            found.look_at(index, place)
            for keys, rows in file.source.report.unread.items():
                found.findings.add(column_finding(keys, place, file.path, f"each of {counted(rows, 'row')}"))
            letters = file.source.report.changes.get("label-letters")
            # a table of CSV has nothing but letters
            if letters is not None and not any("CSV" in one["container"] for one in file.source.report.sources):
                effect = "which trainers take for neither; it is read as true or false here"
                found.findings.add(letters_finding(sorted(letters.details), letters.count, place, effect))


def _basis(
    target: RecipeTarget | DatasetTarget, files: Sequence[DataFile], found: DatasetPass
) -> Iterator[tuple[str, str]]:
    """Yield, for summaries, the tokenizer that judged rows without a recipe, and what was converted."""
    from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
    from pytest_mistral_lora.formats.report import conversion_parts
    from pytest_mistral_lora.formats.sources import ConvertedSource

    # a recipe's base, and a tokenizer that is a target, have their own checks
    judge = target.judge if isinstance(target, DatasetTarget) else None
    alone = "" if judge is None or judge.trains else ", which is not checked itself"
    if judge is not None and target.backend == "chat-template":
        yield "oracle of", f"none, but the chat template of {judge.name}{alone}"
    elif judge is not None:
        known = "" if oracle_file(target.tokenizer.path) else f"; {target.tokenizer.recognition.text}"
        yield "oracle of", f"{judge.name} ({target.oracle.version}){alone}{known}"
    reports = [file.source.report for file in files if isinstance(file.source, ConvertedSource)]
    formats = dict.fromkeys(
        f"{source['container']}, {source['format']}" for report in reports for source in report.sources
    )
    parts = [f"converted from {'; '.join(formats)}"] if formats else []
    parts += conversion_parts(reports, found.converted.counts, found.converted.first_place)
    if parts:
        yield "rows of", "; ".join(parts)


def why_not_compared(target: RecipeTarget | DatasetTarget) -> str:
    """Return why the two backends cannot be compared; empty if they can.

    Raises:
        TokenizerError: If the backend cannot be used.
    """
    needs: dict[str, Callable[[], Any]] = {
        "mistral-common": lambda: target.oracle,
        "chat-template": lambda: target.tokenizer.template,
    }
    # outside the try: a recipe whose own backend cannot be used has no dataset to check at all
    needs[target.backend]()
    # mistral-common's generated template agrees with mistral-common: load nothing for it
    if isinstance(target, DatasetTarget) and not (target.compares and target.tokenizer.has_template):
        return f"{target.tokenizer.path} has no chat template to compare with"
    try:
        for need in needs.values():
            need()
    except TokenizerError as error:
        return f"the two backends cannot be compared: {error}"
    return ""


def _shared(target: RecipeTarget | DatasetTarget, settings: Settings) -> dict[str, Result]:
    """Return the results of a pass by this process or by another worker of the session."""
    if settings.shared_folder is None:
        return dataset_results(target, progress=sys.__stderr__)
    # workers of pytest-xdist judge cases of the same dataset: the first makes the pass, the others wait for its file
    from filelock import FileLock

    from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
    from pytest_mistral_lora.records.files import write_text

    paths: list[Path] = []
    settled: list[Any]
    if isinstance(target, DatasetTarget):
        settled = [str(target.tokenizer.path), target.tokenizer.declared, target.backend]
        with suppress(InputError):
            paths = [file.path for file in target.files]
    else:
        # a declaration may now lead to other files
        paths = [*target.recipe.data_paths, *(file.path for file in target.files)]
        settled = [target.recipe.as_written()]
    # by size and time, not by content, because each worker does this, and data can be long
    states: list[tuple[str, int, int]] = []
    for path in paths:
        # a missing file is a finding of the pass, which comes later
        status = path.stat() if path.exists() else None
        states.append((str(path), status.st_size if status else -1, status.st_mtime_ns if status else -1))
    # in ASCII, here and below: the name of a file may have bytes that are not UTF-8
    identity = sha256_bytes(json.dumps([str(target.path), *settled, states], sort_keys=True).encode())[:16]
    file = settings.shared_folder / f"dataset-{identity}.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            results = dataset_results(target, progress=sys.__stderr__)
            write_text(file, json.dumps(results_to_json(results)))
    # our own file, of any size, in which names may have bytes that are not UTF-8: `read_json` refuses both
    return results_from_json(json.loads(file.read_bytes()))
