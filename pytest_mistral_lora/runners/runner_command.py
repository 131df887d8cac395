"""The command line of `mistral-lora runner`: the environments of other trainers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.errors import EXIT_INTERRUPTED, EXIT_OK, MistralLoraError
from pytest_mistral_lora.runners.environments import Environment
from pytest_mistral_lora.runners.runner import RUNNERS

_DESCRIPTION = """\
Other trainers pin other libraries, so that each needs an environment of its own: some 2 GB, in the cache folder
($MISTRAL_LORA_CACHE). A runner that is installed beside this package is run as it is, and needs none."""


def main(arguments: Sequence[str] | None = None, *, prog: str = f"python -m {__spec__.name}") -> int:
    """Run the command line; returns the exit code."""
    given = _parser(prog).parse_args(arguments)
    try:
        return _list(given) if given.verb == "list" else _setup(given)
    except MistralLoraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the same command goes on\n")
        return EXIT_INTERRUPTED


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    setup = verbs.add_parser("setup", help="make a runner's environment, or finish one that was broken off")
    setup.add_argument("name", choices=[*RUNNERS], help="the runner")
    setup.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        metavar="PATH",
        help="the Python to make it with (default: this one)",
    )
    listing = verbs.add_parser("list", help="say which environments are there")
    listing.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _setup(given: argparse.Namespace) -> int:
    environment = Environment(RUNNERS[given.name])
    done = environment.setup(given.python)
    sys.stdout.write(f"{given.name} {'is ready' if done else 'was ready'}: {environment.folder}\n")
    return EXIT_OK


def _list(given: argparse.Namespace) -> int:
    found = [Environment(runner) for runner in RUNNERS.values()]
    if given.json:
        data = [{"name": e.runner.name, "state": e.state, "folder": str(e.folder)} for e in found]
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{e.runner.name:<14}{e.state:<28}{e.folder}\n" for e in found)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
