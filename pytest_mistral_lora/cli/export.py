"""`mistral-lora export`: a recipe's run for another trainer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb, print_json
from pytest_mistral_lora.errors import EXIT_OK
from pytest_mistral_lora.runners import RUNNERS

SUMMARY = "write the run of a recipe for TRL, Axolotl or LLaMA-Factory"

_DESCRIPTION = """\
Write a folder that runs a recipe in another trainer: its configuration, and the rows, already split, cut and encoded as
`mistral-lora train` encodes them. Settings that the other trainer does not have, and everything that it does
differently, are printed and written to README.md in the folder.

The rows are token ids and labels. TRL gets messages and a training template instead, if it then computes the same ids
and labels for every row."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "export",
        run,
        description=_DESCRIPTION,
        examples=("mistral-lora export recipe.yaml --to trl --output trl-run",),
    )
    parser.add_argument("recipe", type=Path, help="recipe.yaml")
    parser.add_argument("--to", required=True, choices=[*RUNNERS], help="the other trainer")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--rows",
        choices=("auto", "messages", "tokens"),
        default="auto",
        help="form of the rows (default: auto, which is messages for TRL if they are exact, and otherwise tokens)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print how it differs from the recipe and the command that starts it."""
    from pytest_mistral_lora.training.export import export
    from pytest_mistral_lora.training.recipe import load_recipe

    exported = export(load_recipe(args.recipe), args.to, args.output, form=args.rows)
    if args.json:
        print_json(asdict(exported))
        return EXIT_OK
    # the differences come before the command: they are to be read before it is started
    lines = [f"{exported.config}: rows as {exported.form}"]
    lines += [f"left out: {key}: {reason}" for key, reason in exported.not_told.items()]
    lines += [f"different: {remark}" for remark in exported.remarks]
    lines.append(f"start it:  {exported.command}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK
