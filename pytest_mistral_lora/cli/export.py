"""`mistral-lora export`: a recipe's run for another trainer, or an adapter for a server."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb, print_json
from pytest_mistral_lora.errors import EXIT_OK, InputError
from pytest_mistral_lora.runners import RUNNERS

SERVERS = ("vllm", "llamacpp", "ollama")
"""The servers whose files are written."""

SUMMARY = "write a run for another trainer, or the files that serve a model"

_DESCRIPTION = """\
Write a folder that runs a recipe in another trainer: its configuration, and the rows, already split, cut and encoded as
`mistral-lora train` encodes them. Settings that the other trainer does not have, and everything that it does
differently, are printed and written to README.md in the folder.

The rows are token ids and labels. TRL gets messages and a training template instead, if it then computes the same ids
and labels for every row.

For a server (vllm, llamacpp, ollama), give the folder of an adapter or of a merged model: you get a folder with the
commands that serve it with the prompts of training. An adapter that the server would load wrongly is refused. Hold the
running server to mistral-common with `mistral-lora serve-check`."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "export",
        run,
        description=_DESCRIPTION,
        examples=(
            "mistral-lora export recipe.yaml --to trl --output trl-run",
            "mistral-lora export lora-out --to vllm --output served",
        ),
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="recipe.yaml, or for a server the model's folder")
    parser.add_argument("--to", required=True, choices=[*RUNNERS, *SERVERS], help="the other trainer, or the server")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--rows",
        choices=("auto", "messages", "tokens"),
        help="form of the rows (default: auto, which is messages for TRL if they are exact, and otherwise tokens)",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="for a server: folder of the base (default: the one that is recorded)"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="for a server: name of the model in requests (default: the folder's)"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print how it differs from the source and the command that starts it."""
    given = {"--rows": args.rows} if args.to in SERVERS else {"--base": args.base, "--name": args.name}
    for option, value in given.items():
        if value is not None:
            kind = "trainers" if args.to in SERVERS else "servers"
            raise InputError(f"{option} is for {kind}, and {args.to} is none", next_step=f"Leave {option} out.")
    return _export_for_server(args) if args.to in SERVERS else _export_for_trainer(args)


def _export_for_server(args: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.files import require_folder
    from pytest_mistral_lora.training.export.servers import export_for_server

    require_folder(args.source)
    exported = export_for_server(args.source, args.to, args.output, base=args.base, name=args.name or "")
    if args.json:
        print_json(asdict(exported))
        return EXIT_OK
    lines = [f"different: {remark}" for remark in exported.remarks]
    lines += [f"run:       {command}" for command in exported.commands]
    lines.append(f"check:     {exported.check}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def _export_for_trainer(args: argparse.Namespace) -> int:
    from pytest_mistral_lora.training.export import export
    from pytest_mistral_lora.training.recipe import load_recipe

    exported = export(load_recipe(args.source), args.to, args.output, form=args.rows or "auto")
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
