"""`mistral-lora runner`: the environments of other trainers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_verb, print_json
from pytest_mistral_lora.errors import EXIT_OK
from pytest_mistral_lora.runners import RUNNERS

SUMMARY = "install other trainers in environments of their own"

_DESCRIPTION = """\
Other trainers need other library versions, so each gets a virtual environment of its own, of about 2 GB, in the cache
folder ($MISTRAL_LORA_CACHE). A trainer that is installed beside this package needs none."""

_SETUP = """\
Make the environment of a trainer, and print its folder. If an earlier call was interrupted, this one continues."""

_LIST = "List the environment of each trainer: its name, its state and its folder."


def add_parser(verbs: Verbs) -> None:
    """Add the verb, with its own verbs `setup` and `list`, to the command line."""
    parser = add_verb(
        verbs,
        "runner",
        run,
        description=_DESCRIPTION,
        examples=("mistral-lora runner setup axolotl", "mistral-lora runner list"),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    setup = actions.add_parser("setup", help="make or finish the environment of a trainer", description=_SETUP)
    setup.add_argument("name", choices=[*RUNNERS], help="trainer")
    setup.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        metavar="PATH",
        help="Python that makes the environment (default: this one)",
    )

    listing = actions.add_parser("list", help="list the environments and their states", description=_LIST)
    add_json_option(listing)


def run(args: argparse.Namespace) -> int:
    """Make an environment, or list all of them."""
    from pytest_mistral_lora.runners import Environment

    if args.action == "setup":
        environment = Environment(RUNNERS[args.name])
        # an environment is 2 GB of downloads: whoever interrupts it should know that nothing is lost
        try:
            is_new = environment.setup(args.python)
        except KeyboardInterrupt:
            sys.stderr.write("note: to continue, run the same command again\n")
            raise
        sys.stdout.write(f"{args.name} {'is ready' if is_new else 'was ready'}: {environment.folder}\n")
        return EXIT_OK
    found = [Environment(runner) for runner in RUNNERS.values()]
    if args.json:
        print_json([{"name": one.runner.name, "state": one.state, "folder": one.folder} for one in found])
    else:
        sys.stdout.writelines(f"{one.runner.name:<14}{one.state:<28}{one.folder}\n" for one in found)
    return EXIT_OK
