"""`mistral-lora note`: write the pages of a folder again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb
from pytest_mistral_lora.errors import EXIT_OK

SUMMARY = "write DECISION.md and README.md of a folder again"

_DESCRIPTION = """\
Write DECISION.md and README.md of an adapter or merged folder again, from its manifest.json. The text between the two
marks in each file is yours and stays."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "note", run, description=_DESCRIPTION, examples=("mistral-lora note lora-out",))
    parser.add_argument("folder", type=Path, help="adapter or merged folder with manifest.json")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files and print their paths."""
    from pytest_mistral_lora.records.notes import write_notes

    files = [str(file) for file in write_notes(args.folder)]
    sys.stdout.write(json.dumps(files) + "\n" if args.json else "".join(f"{file}\n" for file in files))
    return EXIT_OK
