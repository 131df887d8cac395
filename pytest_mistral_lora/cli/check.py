"""`mistral-lora check`: the suite without pytest."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_oracle_option, add_verb, print_json
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError

SUMMARY = "check recipes and their rows, tokenizers and adapters"

_DESCRIPTION = """\
Run the checks of `pytest --mistral-golden` without pytest, and print every finding and a table.

A path is a recipe, an adapter or merged folder, a checkpoint folder or a tokenizer file. With no path, check every
tokenizer that mistral-common ships, and train a tiny LoRA adapter with one of them."""


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
            "mistral-lora check lora-out --base models/base",
            "mistral-lora check merged lora-out --base models/base",
        ),
        failure="a check finds an error, or no check could judge anything",
    )
    parser.add_argument(
        "paths", type=Path, nargs="*", metavar="PATH", help="recipe, folder or file to check (default: see above)"
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
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check the paths, or the embedded default; return 1 if a check finds an error."""
    if args.base is not None and not args.paths:
        raise InputError("--base is the base of an adapter, and no path is given", expected="the adapter's folder")
    # Set before the first import that reads it: otherwise each small model that is loaded draws a bar
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pytest_mistral_lora.conformance.checks import check
    from pytest_mistral_lora.report import nothing_was_judged, oracle_lines, outcome_table, report_data

    # the embedded default has the tiny train, as the plugin's; for a user's own tokenizers it takes minutes
    train = not args.paths if args.train is None else args.train
    records = []
    outcomes = check(args.paths, base=args.base, oracle=args.oracle, examples=max(1, args.examples), train=train)
    for record, result in outcomes:
        records.append(record)
        if not args.json and (result.findings or result.not_checked):
            states = {"failed": "FAILED", "skipped": f"not checked: {result.not_checked}", "passed": "note"}
            name = record["nodeid"].partition("::")[2]
            texts = [f"{name} {states[record['outcome']]}", *(finding.text() for finding in result.findings)]
            sys.stdout.write("\n".join(texts) + "\n\n")
    failed = any(record["outcome"] == "failed" for record in records)
    code = EXIT_FINDING if failed or nothing_was_judged(records) else EXIT_OK
    if args.json:
        print_json(report_data(records, code, deselected=0, not_run=0))
    else:
        lines = [*outcome_table(records, shutil.get_terminal_size().columns), *oracle_lines(records)]
        if nothing_was_judged(records):
            lines.append("No check could judge anything, so that this run is no pass.")
        sys.stdout.write("\n".join(lines) + "\n")
    return code
