"""`mistral-lora init` and `pin`: the files that guard a repository, the commit of its base, and library versions."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Collection
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    shown_path,
)
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, counted
from pytest_mistral_lora.extras import require_extra

if TYPE_CHECKING:
    from pytest_mistral_lora.starter import StartPlan
    from pytest_mistral_lora.starter.plan import Ci
    from pytest_mistral_lora.training.recipe import PinnedBase

_INIT_DESCRIPTION = """\
Set up the current folder, so that `pytest --mistral-golden` guards it. Look at your rows, pin the base, and write:
recipe.yaml with its schema for your editor; pytest's configuration; a few of your rows with their tokens (goldens);
jobs for GitHub and GitLab; a hook for pre-commit.

If you have a recipe.yaml, leave ROWS and --base out: it stays, and the rest is written around it. A file with other
content is never replaced without --force; to pyproject.toml and the like, only lines are added.

To try everything without data, without a model and without a network, run `mistral-lora init --demo` in an empty
folder: it makes a tiny base, example rows and a recipe, which trains in seconds."""

_LONG = 10_000
_DONE = {"new": "created", "same": "unchanged", "extended": "extended"}
_TITLES = {"new": "to create", "same": "unchanged", "extended": "to extend", "different": "exists, with other content"}


def _add_init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows",
        type=INPUT,
        nargs="*",
        metavar="ROWS",
        help="your data: chat JSONL, or any format that `mistral-lora import` reads (default: rows.jsonl, or else "
        "example rows)",
    )
    parser.add_argument(
        "--base",
        type=PathArgument("read", str),
        metavar="BASE",
        help="base model: OWNER/NAME or OWNER/NAME@BRANCH on the Hub, or a checkpoint folder",
    )
    parser.add_argument(
        "--ci",
        choices=("github", "gitlab", "both", "none"),
        help="jobs to write (default: those of the remote of the git repository, or else both)",
    )
    parser.add_argument(
        "--demo", action="store_true", help="make a tiny base and example rows, and a recipe that trains in seconds"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the files, and write nothing")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--keep", action="store_true", help="keep files that are there, and write what is missing")
    existing.add_argument("--force", action="store_true", help="replace files that are there with other content")


def run_init(args: argparse.Namespace) -> int:
    """Write the files, or print them; return 1 if tasks remain."""
    from pytest_mistral_lora.records.files import refuse_input_as_output
    from pytest_mistral_lora.starter import write_plan
    from pytest_mistral_lora.starter.plan import CI, plan_start

    services = {None: None, "both": CI, "none": ()}.get(args.ci, (args.ci,))
    plan = _plan_demo(args, services) if args.demo else plan_start(Path(), args.rows, args.base, services)
    # --force replaces files, which may include the data
    replaced = [plan.folder / file.name for file in plan.files if file.state == "different"]
    refuse_input_as_output({"init": replaced}, args.rows)
    if not args.dry_run:
        write_plan(plan, replace=args.force, keep=args.keep)
    _print_inputs(plan)
    if args.dry_run:
        _print_files(plan)
    else:
        _print_states(plan, "replaced" if args.force else "kept")
        _record(plan)
    _print_rest(plan, dry_run=args.dry_run, demo=args.demo)
    return EXIT_FINDING if plan.to_do or plan.by_hand else EXIT_OK


def _plan_demo(args: argparse.Namespace, services: Collection[Ci] | None) -> StartPlan:
    """Write the base of the demo, and return the plan of a repository with it.

    Raises:
        InputError: If an option names other data or another base, or asks to write nothing.
    """
    from pytest_mistral_lora.starter.demo import TRAINING, write_demo_base
    from pytest_mistral_lora.starter.plan import RECIPE, plan_start

    if args.rows or args.base or args.dry_run:
        expected = "neither ROWS, --base nor --dry-run beside it"
        raise InputError("makes a base and rows, and writes them", place="--demo", expected=expected)
    require_extra("train")
    base = None if Path(RECIPE).exists() else str(write_demo_base(Path()))
    return plan_start(Path(), [], base, () if services is None else services, training=TRAINING)


def _record(plan: StartPlan) -> None:
    """Record the goldens, and print their files."""
    from pytest_mistral_lora.starter import record_missing
    from pytest_mistral_lora.starter.plan import RECIPE, has_goldens

    if not has_goldens(plan):
        return
    if plan.base.folder is None:
        plan.to_do.append("Record the goldens then: pytest --mistral-golden --mistral-golden-update -k own-")
        return
    recorded, faults = record_missing(plan.folder, RECIPE)
    sys.stdout.write("".join(f"created    {shown_path(name)}\n" for name in recorded))
    plan.to_do += faults


def _print_inputs(plan: StartPlan) -> None:
    lines = [f"base: {shown_path(plan.base.title)}"]
    for data in plan.rows:
        bad = f", {data.bad} of which cannot be used" if data.bad else ""
        lines.append(f"rows: {shown_path(data.name)}: {data.title}; {counted(data.count + data.bad, 'row')}{bad}")
        lines += [f"  {shown_path(data.conversion)}"] if data.conversion else []
    sys.stdout.write("\n".join([*lines, ""]) + "\n")


def _print_files(plan: StartPlan) -> None:
    for file in plan.files:
        sys.stdout.write(f"=== {file.name}: {file.purpose} ({_TITLES[file.state]})\n")
        path = plan.folder / file.name
        if file.state in ("extended", "different"):
            before = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
            lines = unified_diff(before, file.text.splitlines(keepends=True), file.name, file.name)
            sys.stdout.writelines(line if line.endswith("\n") else f"{line}\n" for line in lines)
        elif file.state == "new":
            sys.stdout.write(file.text if len(file.text) < _LONG else f"({len(file.text.encode()):,} bytes)\n")


def _print_states(plan: StartPlan, different: str) -> None:
    width = max(len(file.name) for file in plan.files)
    for file in plan.files:
        sys.stdout.write(f"{_DONE.get(file.state, different):<9}  {file.name:<{width}}  {file.purpose}\n")


def _print_rest(plan: StartPlan, *, dry_run: bool, demo: bool) -> None:
    lines = [f"note: {note}" for note in plan.notes]
    for place, text in plan.by_hand.items():
        lines += [f"to do: add to {place}:", *(f"    {line}" for line in text.splitlines())]
    lines += [f"to do: {task}" for task in plan.to_do]
    first = "do what `to do` lists, then " if plan.to_do or plan.by_hand else ""
    after = f"{first}pytest --mistral-golden, then commit these files, then mistral-lora train recipe.yaml"
    if demo:
        after = "mistral-lora check recipe.yaml"
    lines.append("next: the same command without --dry-run" if dry_run else f"next: {after}")
    sys.stdout.write("\n".join(["", *lines]) + "\n")


INIT = Verb(
    "init",
    "write the files that guard a repository: recipe, goldens, CI",
    _add_init_options,
    run_init,
    description=_INIT_DESCRIPTION,
    examples=(
        "mistral-lora init rows.jsonl --base mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-lora init sharegpt.json --base models/base --dry-run",
        "mistral-lora init",
        "mistral-lora init --demo",
    ),
    failure="something is left to do: a pin, a bad row, lines to add by hand",
)


_PIN_DESCRIPTION = """\
A branch can move to other weights, so a recipe names a commit. Print the commit that a branch or tag of a Hub
repository has now (`main`, unless you name another one), or write it into a recipe, in which nothing else changes. Of a
recipe with a local base, write the hash of its weights.

Offline, the commit that was last fetched into the cache is taken, and a note on stderr tells you so.

With --upgrade, pin libraries: move the constraints file, with which the jobs of `init` install, to the versions that
are installed here, and print what changed. Upgrade first, and run `pytest --mistral-golden`."""


def _add_pin_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        type=PathArgument("changed", str),
        nargs="?",
        metavar="BASE",
        help="Hub repository, OWNER/NAME or OWNER/NAME@BRANCH, or a recipe; with --upgrade, a constraints file "
        "(default: .mistral-lora/constraints.txt)",
    )
    parser.add_argument(
        "--branch",
        metavar="NAME",
        help="branch or tag (default: the one that the recipe names, or main); moves the pin of a pinned recipe",
    )
    parser.add_argument(
        "--upgrade",
        action="store_true",
        help="move the constraints file to the installed versions of the libraries that decide ids, and print the "
        "difference",
    )


def run_pin(args: argparse.Namespace) -> int:
    """Print the commit, or write it into the recipe and print its change; or move the constraints file.

    Raises:
        InputError: If BASE is neither a recipe nor the id of a repository.
    """
    from pytest_mistral_lora.checkpoint.pins import find_commit

    if args.upgrade:
        return _upgrade(args)
    if args.base is None:
        raise InputError("no BASE is named", expected="OWNER/NAME, a recipe (*.yaml), or --upgrade")
    path = Path(args.base)
    if path.suffix.lower() in (".yaml", ".yml"):
        from pytest_mistral_lora.training.recipe import pin_recipe

        pinned = pin_recipe(path, args.branch)
        sys.stdout.write(f"{shown_path(path)}: {shown_path(_change(pinned, path))}\n")
        if pinned.value != pinned.before:
            _note_source(pinned.source, pinned.name)
        return EXIT_OK
    repo, _, branch = args.base.partition("@")
    if repo.count("/") != 1 or (branch and args.branch) or path.exists():
        raise InputError(
            "--branch and a branch behind the @" if branch and args.branch else f"{args.base!r} is not a repository",
            expected="OWNER/NAME, OWNER/NAME@BRANCH, or a recipe (*.yaml), whose base may be a local folder",
        )
    name = args.branch or branch or "main"
    found = find_commit(repo, name)
    sys.stdout.write(f"{found.commit}\n")
    _note_source(found.source, name)
    return EXIT_OK


def _upgrade(args: argparse.Namespace) -> int:
    """Move the constraints file, and print the difference."""
    from pytest_mistral_lora.starter.constraints import CONSTRAINTS, move_constraints

    path = Path(args.base or CONSTRAINTS)
    if args.branch or path.suffix != ".txt":
        found = "--branch is for a base" if args.branch else f"{str(path)!r} is not a constraints file"
        raise InputError(found, place="--upgrade", expected="a file of versions (*.txt), as `pip install -c` reads it")
    before, after = move_constraints(path)
    name = shown_path(path)
    if before == after:
        sys.stdout.write(f"{name} has the installed versions already\n")
    else:
        lines = unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), name, name)
        sys.stdout.writelines(line if line.endswith("\n") else f"{line}\n" for line in lines)
    return EXIT_OK


def _change(pinned: PinnedBase, path: Path) -> str:
    if pinned.before == pinned.value:
        move = f". To move the pin: mistral-lora pin {shlex.quote(str(path))} --branch main"
        more = move if pinned.name == pinned.value else ""
        return f"{pinned.key} is {pinned.value} already{more}"
    before = f" (before: {pinned.before})" if pinned.before else ""
    return f"{pinned.key} is {pinned.value} now{before}"


def _note_source(source: str, name: str) -> None:
    if source == "cache":
        sys.stderr.write(f"note: the Hub cannot be reached; {name} was this commit when it was last fetched\n")
    elif source == "given" and name:
        sys.stderr.write("note: the Hub was not asked whether it has this commit\n")


PIN = Verb(
    "pin",
    "print the commit of a branch, or write it into a recipe; pin libraries",
    _add_pin_options,
    run_pin,
    description=_PIN_DESCRIPTION,
    examples=(
        "mistral-lora pin mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-lora pin mistralai/Mistral-7B-Instruct-v0.3@main",
        "mistral-lora pin recipe.yaml",
        "mistral-lora pin recipe.yaml --branch main",
        "mistral-lora pin --upgrade",
    ),
)
