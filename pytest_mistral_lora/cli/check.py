"""`mistral-lora check`: the suite without pytest."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.verb import (
    Verbs,
    add_format_option,
    add_oracle_option,
    add_verb,
    print_json,
    print_judged,
    print_line,
)
from pytest_mistral_lora.conformance.named_targets import is_shipped
from pytest_mistral_lora.conformance.path_kinds import KINDS, recognised, targets_of
from pytest_mistral_lora.conformance.targets import EMBEDDED
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, MistralLoraError, did_you_mean

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.groups import FindingGroups
    from pytest_mistral_lora.conformance.known import Xfail
    from pytest_mistral_lora.conformance.targets import Target

SUMMARY = "check recipes and their rows, tokenizers and adapters"

_DESCRIPTION = """\
Run the checks of `pytest --mistral-golden` without pytest, and print a table, and each finding once,
however many rows or checks it breaks.

A path is a recipe, a file of rows, a file of encoded rows, an adapter or merged folder, a GGUF file, a checkpoint
folder or a tokenizer file. It is recognised by its content, and the first line names its kind. Rows need a tokenizer:
--tokenizer names one that is not judged itself, or else each tokenizer and recipe among the paths encodes them. With no
path, check every tokenizer that mistral-common ships, and train a tiny LoRA adapter with one of them."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "check",
        run,
        description=_DESCRIPTION,
        examples=(
            "mistral-lora check",
            "mistral-lora check recipe.yaml",
            "mistral-lora check recipe.yaml --device-memory 80GB",
            "mistral-lora check rows.jsonl --tokenizer checkpoints/my-mistral",
            "mistral-lora check rows.jsonl --tokenizer spm-v3",
            "mistral-lora check lora-out --base models/base",
            "mistral-lora check merged lora-out --base models/base",
        ),
        failure="a check finds an error, or no check could judge anything",
    )
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="PATH", help="recipe, folder or file to check (default: see above)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer of rows, encoded rows and GGUF files: checkpoint folder, tekken.json, tokenizer.model.vN, or "
        "the name of a shipped one, such as spm-v3",
    )
    parser.add_argument(
        "--as",
        dest="kind",
        choices=[*KINDS],
        default="",
        help="kind of every path (default: recognised by its content)",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="base checkpoint of the adapters and merged models")
    add_oracle_option(parser)
    parser.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="train a tiny model with each tokenizer, too (default: only if you give no path)",
    )
    parser.add_argument(
        "--examples", type=int, default=20, metavar="N", help="generated rows for each law (default: 20)"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="report whether each recipe fits into the memory of a device, such as 80GB, and which settings need less",
    )
    parser.add_argument(
        "--xfails",
        type=Path,
        metavar="FILE",
        help="known deviations, which do not fail: a rule id or a node id a line, each with '# reason'",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="write what is found to this new file, with empty reasons to fill in, as --xfails reads it",
    )
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check the paths, or the embedded default; return 1 if a check finds an error."""
    if args.base is not None and not args.paths:
        raise InputError("--base is the base of an adapter, and no path is given", expected="the adapter's folder")
    if args.tokenizer is not None and not args.tokenizer.exists() and not is_shipped(args.tokenizer):
        expected = f"a tokenizer folder or file, or one of {', '.join(EMBEDDED)}"
        found = f"no such file or folder{did_you_mean(str(args.tokenizer), EMBEDDED)}"
        raise InputError(found, place=str(args.tokenizer), expected=expected)
    paths = [recognised(path, args.base, args.kind) for path in args.paths]
    if args.tokenizer is not None and not any(one.kind in ("rows", "encoded", "gguf") for one in paths):
        found = "--tokenizer is for rows and GGUF files, and no path is one"
        raise InputError(found, expected="a tokenizer to check as a path")
    if args.device_memory is not None and not any(one.kind == "recipe" for one in paths):
        raise InputError("--device-memory is for recipes, and no path is one", expected="a recipe.yaml")
    if args.baseline is not None and args.baseline.exists():
        found = f"{args.baseline} exists, and its reasons would be lost"
        raise InputError(found, place="--baseline", expected="a new file")
    # the embedded default has the tiny train, as the plugin's; for a user's own tokenizers it takes minutes
    train = not args.paths if args.train is None else args.train
    targets = targets_of(paths, args.base, args.oracle, args.tokenizer)
    if args.output_format == "text":
        sys.stdout.write("".join(f"{one.path}: {one.title}\n" for one in paths))
        sys.stdout.flush()
    kinds = [{"path": str(one.path), "kind": one.kind, "title": one.title} for one in paths]
    memory = _memory([one.path for one in paths if one.kind == "recipe"], args.device_memory)
    options = {"examples": max(1, args.examples), "train": train}
    accepted = {"xfails": _known_deviations(args.xfails), "baseline": args.baseline}
    return judge(targets, args.output_format, paths=kinds, memory=memory, **accepted, **options)


def _known_deviations(file: Path | None) -> tuple[Xfail, ...]:
    from pytest_mistral_lora.conformance.known import read_xfails

    try:
        return () if file is None else read_xfails(file)
    except (OSError, ValueError) as error:
        raise InputError(str(error), place="--xfails") from error


def judge(
    targets: Sequence[Target],
    output_format: str,
    *,
    command: str = "check",
    paths: Sequence[Any] = (),
    memory: Sequence[Mapping[str, Any]] = (),
    xfails: Sequence[Xfail] = (),
    baseline: Path | None = None,
    **options: Any,
) -> int:
    """Judge targets, print the outcome in a format, and return the exit code.

    Args:
        targets: The targets.
        output_format: A choice of `--output-format`.
        command: The verb.
        paths: The paths that were given and what they are.
        memory: The estimates of memory, one for each recipe.
        xfails: Known deviations that do not fail.
        baseline: The file for the list of all that was found, or None.
        options: Those of `run_checks`.
    """
    # Set before the first import that reads it: otherwise each small model that is loaded draws a bar
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pytest_mistral_lora.conformance.checks import run_checks
    from pytest_mistral_lora.conformance.groups import cause_texts, group_findings
    from pytest_mistral_lora.conformance.known import baseline_text, known_among, unknown_among
    from pytest_mistral_lora.records.files import write_text
    from pytest_mistral_lora.report import nothing_was_judged, report_data, verdict_line
    from pytest_mistral_lora.report.github import commands_stopped
    from pytest_mistral_lora.report.judged import cases_of

    records, texts = [], []
    outcomes = run_checks(targets, **options)
    with _progress() as show:
        for record, result in outcomes:
            findings = unknown_among(result.findings, record["nodeid"], xfails)
            known = known_among(result.findings, record["nodeid"], xfails)
            if record["outcome"] == "failed" and all(one.severity != "error" for one in findings):
                record["outcome"] = "known"
            record["findings"] = [one.to_json() for one in findings]
            record["known"] = [{"id": one.id, "reason": one.reason} for one in known]
            records.append(record)
            texts.append("\n\n".join(cause_texts(findings)))
            show(f"{len(records)} checks; {record['nodeid']}")
    failed = any(record["outcome"] == "failed" for record in records)
    failed |= not all(one.get("fits", True) for one in memory)
    matched = {known["id"] for record in records for known in record["known"]}
    # without the tiny train, its deviations are not met
    unmatched = [one for one in xfails if one.id not in matched and (options.get("train") or not _is_of_train(one))]
    code = EXIT_FINDING if failed or unmatched or nothing_was_judged(records) else EXIT_OK
    if baseline is not None:
        write_text(baseline, baseline_text(records))
    sys.stderr.write("".join(f"{one.unmatched}\n" for one in unmatched))
    causes = group_findings(records)
    if output_format == "json":
        data = [cause.to_json() for cause in causes]
        report = report_data(records, code, causes=data, deselected=0, not_run=0)
        print_json({**report, "paths": list(paths), "memory": list(memory)})
    elif output_format == "text":
        with commands_stopped(print_line):
            _print(records, causes, [f"{one['path']}: {one['text']}" for one in memory])
    else:
        verdict = verdict_line(records, [one.count for one in causes])
        subject = paths[0]["path"] if paths else ""
        print_judged(output_format, command, causes, [*cases_of(records, texts)], verdict, subject)
    return code


def _is_of_train(xfail: Xfail) -> bool:
    from pytest_mistral_lora.conformance.finding import RULES

    return RULES[xfail.id].subject == "train" if xfail.id in RULES else "::train::" in xfail.id


def _memory(recipes: Sequence[Path], size: str | None) -> list[dict[str, Any]]:
    """Return the estimate of memory for each recipe, as plain data with a text; empty if no size is given.

    Raises:
        InputError: If the size is none.
    """
    if size is None:
        return []
    from pytest_mistral_lora.training.memory import parse_size, recipe_memory
    from pytest_mistral_lora.training.recipe import load_recipe
    from pytest_mistral_lora.training.recipe.pinning import resolve_base

    memory, found = parse_size(size, place="--device-memory"), []
    for path in recipes:
        try:
            recipe = load_recipe(path)
            estimate = recipe_memory(recipe, resolve_base(recipe.base, weights=False))
            found.append({"path": str(path), "text": estimate.text(memory), **estimate.to_json(memory)})
        except MistralLoraError as error:  # a check has reported it
            found.append({"path": str(path), "text": f"memory: no estimate: {error.found}"})
    return found


def _print(records: list[dict[str, Any]], causes: FindingGroups, memory: Sequence[str]) -> None:
    """Print a text for each cause, the table, the reasons why something was not checked, memory, and the verdict."""
    from pytest_mistral_lora.report import (
        basis_lines,
        nothing_was_judged,
        outcome_table,
        unchecked_lines,
        verdict_line,
        write_styled,
    )
    from pytest_mistral_lora.report.statistics import summary_lines

    width = shutil.get_terminal_size().columns
    for cause in causes:
        state = "FAILED" if cause.simplest.severity == "error" else "note"
        write_styled(f"{cause.check} {state}\n{cause.text(width)}\n")
    lines = [
        *outcome_table(records, width),
        *basis_lines(records),
        *summary_lines(records, width),
        *unchecked_lines(records),
        *memory,
        "",
        *(["No check could judge anything, so that this run is no pass."] if nothing_was_judged(records) else []),
        verdict_line(records, [one.count for one in causes]),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows how far the checks are, on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
