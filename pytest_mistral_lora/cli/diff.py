"""`mistral-lora diff`: compare two runs."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb, print_json
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK

SUMMARY = "compare two runs: manifest, tensors and answers"

_DESCRIPTION = """\
Compare two adapters or merged models: each value of their manifests, their tensors, and the answers in their
transcripts. With two manifest.json files, compare only the manifests."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "diff",
        run,
        description=_DESCRIPTION,
        examples=("mistral-lora diff lora-out lora-new",),
        failure="the two differ",
    )
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="adapter or merged folder, or manifest.json")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the differences; return 1 if there is one."""
    from pytest_mistral_lora.records.compare_runs import compare_runs
    from pytest_mistral_lora.report.differences import diff_data, diff_lines

    found = compare_runs(args.a, args.b)
    if args.json:
        # NaN in a tensor is null in the data, so that strict parsers of JSON can read them
        print_json(diff_data(found), allow_nan=False)
    else:
        sys.stdout.write("\n".join(diff_lines(found, shutil.get_terminal_size().columns)) + "\n")
    return EXIT_OK if found.equal else EXIT_FINDING
