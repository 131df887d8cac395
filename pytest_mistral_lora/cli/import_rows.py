"""`mistral-lora import`: rows from other formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_mistral_lora.chat.formats import FORMATS
from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb, print_json
from pytest_mistral_lora.data.report import LOSSES
from pytest_mistral_lora.errors import EXIT_OK

SUMMARY = "convert ShareGPT, Alpaca, OpenAI, Parquet and other data to rows"

_DESCRIPTION = """\
Convert data to the rows that every other verb reads. The format is recognised by its keys, and the container by its
bytes: JSON Lines, a JSON array, CSV, TSV, Parquet, Arrow, a folder of `save_to_disk`, each of the texts also compressed
(gzip, zstd, bzip2, xz) or in UTF-16. SOURCE may also be the configuration that declares your data: a YAML file of
TRL, Axolotl or LLaMA-Factory, or a dataset_info.json.

The report lists each kind of change with its number of rows and the first of them. Parts of a record that a row cannot
keep are an error, and nothing is written, unless you allow the loss by its name with --lossy."""
_KINDS = f"The names of losses: {', '.join(LOSSES)}."


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "import",
        run,
        description=f"{_DESCRIPTION}\n\n{_KINDS}",
        examples=(
            "mistral-lora import sharegpt.json --to rows.jsonl",
            "mistral-lora import train-*.parquet --to rows.jsonl --lossy rejected",
            "mistral-lora import data/dataset_info.json --dataset identity --to rows.jsonl",
            "mistral-lora import axolotl.yaml --to rows.jsonl",
        ),
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="file, folder or configuration")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help="JSONL file to write")
    parser.add_argument(
        "--format", choices=[*FORMATS], help="format of the records (default: recognised by their keys)"
    )
    parser.add_argument(
        "--lossy",
        action="append",
        default=[],
        metavar="KIND",
        help="a loss that is allowed, by its name (repeatable)",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="data set of a dataset_info.json to import (repeatable; default: the only one)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the rows, and print the report."""
    from pytest_mistral_lora.data import Source, import_rows
    from pytest_mistral_lora.data.messages import Layout
    from pytest_mistral_lora.data.sources import sources_of

    sources: list[Source] = []
    remarks: list[str] = []
    for path in args.sources:
        found, notes = sources_of(path, Layout(args.format or ""), args.dataset)
        sources += found
        remarks += notes
    report = import_rows(sources, args.to, lossy=args.lossy, remarks=remarks, progress=sys.stderr)
    if args.json:
        print_json(report.to_json())
    else:
        sys.stdout.write("\n".join([*report.lines(), f"written: {args.to}"]) + "\n")
    return EXIT_OK
