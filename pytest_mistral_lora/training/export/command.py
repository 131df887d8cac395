"""The command line of `mistral-lora export`: a recipe's run, written for another runner."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.errors import EXIT_INTERRUPTED, EXIT_OK, MistralLoraError

if TYPE_CHECKING:
    from pytest_mistral_lora.training.export.folder import Exported

_NAMES = ("trl", "axolotl", "llamafactory")
_DESCRIPTION = """\
Write a folder that starts a recipe's run in another runner: its configuration, and the rows, split, cut and encoded as
here. Rows are given as ids and labels; to TRL as messages with a training template, where that gives every row the same
ids and labels. What the runner cannot be told, and what is different, is printed and in the folder's README.md."""
_EXITS = "Exit codes: 0 fine, 2 bad usage or bad input, 130 interrupted (Ctrl-C)."


def main(arguments: Sequence[str] | None = None, *, prog: str = f"python -m {__spec__.name}") -> int:
    """Run the command line; returns the exit code."""
    given = _parser(prog).parse_args(arguments)
    try:
        return _run(given)
    except MistralLoraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, epilog=_EXITS)
    parser.add_argument("recipe", type=Path, help="recipe.yaml")
    parser.add_argument("--to", required=True, choices=_NAMES, help="the runner")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--rows",
        choices=("auto", "messages", "tokens"),
        default="auto",
        help="how the rows are given (default: auto, messages to TRL where that is exact, else tokens)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _run(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.training.export.folder import export
    from pytest_mistral_lora.training.recipe import load_recipe

    done = export(load_recipe(given.recipe), given.to, given.output, form=given.rows)
    if given.json:
        sys.stdout.write(json.dumps(asdict(done), ensure_ascii=False, indent=2, default=str) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(done))
    return EXIT_OK


def _lines(done: Exported) -> Iterator[str]:
    yield f"{done.config}: rows as {done.form}"
    yield from (f"not told: {key}: {what}" for key, what in done.not_told.items())
    yield from (f"different: {remark}" for remark in done.remarks)
    yield f"start it:  {done.command}"


if __name__ == "__main__":
    sys.exit(main())
