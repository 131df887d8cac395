"""`mistral-lora compare`: what is new since the report of another commit."""

from __future__ import annotations

import argparse
import sys

from pytest_mistral_lora.cli.verb import INPUT, Verb, print_json
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK

_DESCRIPTION = """\
Compare two reports of `check` or pytest, such as that of the main branch and that of a change: which causes are new,
worse, fixed, accepted as known, or not judged any more. A cause keeps its key if its rows move to other lines. A cause
counts as fixed only if its check ran again and found nothing.

`mistral-lora check --report FILE.json` and `pytest --mistral-golden --mistral-report FILE.json` write the reports."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=INPUT, metavar="BEFORE", help="report (JSON) to compare with, such as main.json")
    parser.add_argument("after", type=INPUT, metavar="AFTER", help="report (JSON) of the change")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown, for a comment on the change")
    form.add_argument("--json", action="store_true", help="print JSON instead of text")


def run_compare(args: argparse.Namespace) -> int:
    """Print what is new; return 1 if an error is new or worse."""
    from pytest_mistral_lora.report.compare_reports import ReportComparison, read_report

    comparison = ReportComparison(read_report(args.before), read_report(args.after))
    if args.json:
        print_json(comparison.to_json())
    elif args.markdown:
        sys.stdout.write(comparison.markdown())
    else:
        sys.stdout.write("".join(f"{line}\n" for line in comparison.lines()))
    return EXIT_FINDING if comparison.fails else EXIT_OK


VERB = Verb(
    "compare",
    "compare two reports of check or pytest: new, worse, fixed causes",
    _add_options,
    run_compare,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora check recipe.yaml --report pr.json; mistral-lora compare main.json pr.json",
        "mistral-lora compare main.json pr.json --markdown > comment.md",
    ),
    failure="an error is new, or has more findings than before",
)
