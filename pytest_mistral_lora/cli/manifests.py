"""`mistral-lora verify`, `diff` and `note`: recompute a run's record, compare it, and write it for people."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.judging import Judging, VerbView, add_judging_options, check_options
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_json_option,
    print_json,
    shown_path,
)
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, and_more, one_line
from pytest_mistral_lora.records.files import path_from

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.records.verify import FieldCheck

_VERIFY_DESCRIPTION = """\
Compare an adapter or merged model with its own manifest.json: recompute each recorded value, and report each mismatch,
and what is not available. A value is not available if its source is missing: give --base, --dataset and --parent to
verify more values.

The record proves that nothing changed since it was written, not who wrote it: whoever changes all of its values, hashes
and notes consistently makes another valid record. --rerun detects such a record by training again."""

_LONGEST_LINE = 2000
_MOST_NAMES = 6


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=INPUT, help="adapter or merged folder with manifest.json")
    parser.add_argument(
        "--base",
        type=INPUT,
        metavar="DIR",
        help="folder of the base checkpoint (default: the base that the folder names)",
    )
    parser.add_argument(
        "--dataset",
        type=INPUT,
        action="append",
        metavar="PATH",
        help="training file, in the order of the recipe (repeatable), or a folder with all data files",
    )
    parser.add_argument(
        "--rerun",
        action="store_true",
        help="train again from the manifest alone, and compare the tensors of the adapter: bit for bit on a CPU of the "
        "same machine and with the same libraries, otherwise within a tolerance",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print each value; by default those that match are counted, and those that are not available share lines",
    )
    parser.add_argument("--parent", type=INPUT, metavar="DIR", help="adapter that a merged model was made from")
    add_judging_options(parser)


def run_verify(args: argparse.Namespace) -> int:
    """Print what is not a match, and the verdict; return 1 if a value differs."""
    from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
    from pytest_mistral_lora.conformance.manifest import value_results
    from pytest_mistral_lora.conformance.model_targets import RecordTarget
    from pytest_mistral_lora.formats.sources import recorded_file
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder
    from pytest_mistral_lora.records.verify import verify

    # one path may be a folder, whose files are found by name; several paths are files in the recipe's order
    dataset = args.dataset[0] if args.dataset and len(args.dataset) == 1 else args.dataset
    options = check_options(args, fail_on=frozenset({"note"}))
    folder = AdapterFolder(args.folder, BaseFolder(args.base) if args.base else None)
    if (args.folder / "adapter_config.json").is_file() and not folder.has_manifest:
        raise InputError(
            "no manifest.json: another trainer made the adapter, and recorded nothing that could be verified",
            place=str(args.folder),
            next_step=f"Judge its files: mistral-lora check {shlex.quote(str(args.folder))}",
        )
    facts = verify(folder, base=folder.located_base, dataset=dataset, parent=args.parent, open_file=recorded_file)
    if args.rerun:
        from pytest_mistral_lora.training.display import RunDisplay
        from pytest_mistral_lora.training.rerun import rerun

        with RunDisplay.on_stderr() as display:
            again = rerun(folder, dataset=dataset, display=display)
        facts.append(again.fact)
    target = RecordTarget.of(folder.path, "manifest", value_results(facts, folder.manifest_file))
    judging = Judging.of(
        args,
        paths=[{"path": str(folder.manifest_file)}],
        options=options,
        view=VerbView(
            partial(_lines, facts, verbose=args.verbose),
            partial(_verdict, facts),
            partial(_print_facts, facts),
        ),
    )
    return judging.judge([target])


def _lines(facts: Sequence[FieldCheck], session: Session, *, verbose: bool) -> Iterator[str]:
    for state, text in _fact_lines(facts, session, verbose=verbose):
        # names and values come from a foreign folder: none may look like another line
        yield f"{state:<13}  {one_line(text, _LONGEST_LINE)}"


def _print_facts(facts: Sequence[FieldCheck], session: Session) -> None:
    """Print each recorded value as JSON; an accepted mismatch has the reasons of its known deviations."""
    reasons = ([xfail.reason for xfail in outcome.known] for outcome in session.outcomes)
    print_json(
        [{**asdict(fact), **({"known": known} if known else {})} for fact, known in zip(facts, reasons, strict=True)]
    )


def _states(facts: Sequence[FieldCheck], session: Session) -> Iterator[tuple[FieldCheck, str]]:
    """Yield each recorded value with its state; a mismatch is `known` if a list of known deviations accepts it."""
    for fact, outcome in zip(facts, session.outcomes, strict=True):
        yield fact, "known" if outcome.known and not outcome.findings else fact.state


def _fact_lines(facts: Sequence[FieldCheck], session: Session, *, verbose: bool) -> Iterator[tuple[str, str]]:
    """Yield the state and the text of each line: what is not a match, and the result of `--rerun`.

    Args:
        facts: The recorded values.
        session: Their session.
        verbose: Whether each value has a line; else values that are not available for one reason share a line.
    """
    unavailable: dict[str, list[str]] = {}
    for fact, state in _states(facts, session):
        if fact.state == "not available" and not verbose:
            unavailable.setdefault(str(fact.found), []).append(fact.name)
        elif fact.state == "mismatch":
            recorded = "" if fact.is_unlisted else f"; recorded {fact.recorded}"
            found = f"{fact.again}: {fact.found}" if fact.again else fact.found
            yield state, f"{fact.name}: {found}{recorded}"
        elif fact.state == "not available" or fact.name == "rerun":
            yield fact.state, f"{fact.name}: {fact.found}"
        elif verbose:
            yield fact.state, fact.name
    for reason, names in unavailable.items():
        yield "not available", f"{', '.join(names[:_MOST_NAMES])}{and_more(_MOST_NAMES, len(names))}: {reason}"


def _verdict(facts: Sequence[FieldCheck], session: Session) -> str:
    """Return the last line: whether a value differs, and how much of the record was judged."""
    counts = Counter(state for _, state in _states(facts, session))
    names = ("match", "mismatch", *(["known"] if counts["known"] else []), "not available")
    states = ", ".join(f"{counts[state]} {state}" for state in names)
    return f"{'a difference' if counts['mismatch'] else 'no difference'}: {states}"


VERIFY = Verb(
    "verify",
    "compare an adapter or merged model with its own manifest.json",
    _add_verify_options,
    run_verify,
    description=_VERIFY_DESCRIPTION,
    examples=(
        "mistral-lora verify lora-out --dataset rows.jsonl",
        "mistral-lora verify merged --parent lora-out",
    ),
    failure="a value differs",
    memory_advice="--rerun trains again, and needs the memory of the recorded run.",
)


_DIFF_DESCRIPTION = """\
Compare two adapters or merged models with each other: each value of their manifests, their tensors, and the answers in
their transcripts. With two manifest.json files, compare only the manifests."""


def _add_diff_options(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, type=INPUT, metavar=name.upper(), help="adapter or merged folder, or manifest.json")
    add_json_option(parser)


def run_diff(args: argparse.Namespace) -> int:
    """Print the differences; return 1 if there are any."""
    from pytest_mistral_lora.records.compare_runs import compare_runs
    from pytest_mistral_lora.report.tables import diff_data, diff_lines

    found = compare_runs(args.a, args.b)
    if args.json:
        # the data has null for NaN in a tensor, so that strict parsers of JSON can read it
        print_json(diff_data(found), allow_nan=False)
    else:
        sys.stdout.write("\n".join(diff_lines(found, shutil.get_terminal_size().columns)) + "\n")
    return EXIT_OK if found.equal else EXIT_FINDING


DIFF = Verb(
    "diff",
    "compare two adapters or merged models with each other",
    _add_diff_options,
    run_diff,
    description=_DIFF_DESCRIPTION,
    examples=("mistral-lora diff lora-out lora-new",),
    failure="the two differ",
)


_NOTE_DESCRIPTION = """\
Write DECISION.md and README.md of an adapter or merged folder again, from its manifest.json. The text between the two
marks in each file is yours and stays. The hashes of the files that your evaluation.commands left are taken again.

With --recipe, first record what the recipe of the run declares now: its deployment, and its evaluation.commands. With
--withdraw, record that production serves nothing of the folder any longer. Nothing else of the record changes, and the
manifest is sealed again."""


def _add_note_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=PathArgument("changed"), help="adapter or merged folder with manifest.json")
    declared = parser.add_mutually_exclusive_group()
    declared.add_argument(
        "--recipe",
        type=INPUT,
        metavar="FILE",
        help="recipe of the run: record its deployment and evaluation.commands as they are now",
    )
    declared.add_argument(
        "--withdraw", action="store_true", help="record that production serves nothing of this folder any longer"
    )
    add_json_option(parser)


def run_note(args: argparse.Namespace) -> int:
    """Record the declarations, write the files and print their paths."""
    from pytest_mistral_lora.records.notes import declare_again, write_notes
    from pytest_mistral_lora.training.declaring import recipe_declarations, recorded_declarations

    if args.recipe is None:
        declared = recorded_declarations(args.folder, withdraw=args.withdraw)
    else:
        declared = recipe_declarations(args.folder, args.recipe)
    # without a change, this version may be another one than that of the notes: it then refuses to write them
    written = declare_again(args.folder, declared) if declared is not None else []
    files = [str(file) for file in written or write_notes(args.folder)]
    if args.json:
        print_json(files, indented=False)
    else:
        sys.stdout.write("".join(f"{shown_path(file)}\n" for file in files))
        _print_deployment(args.folder)
    return EXIT_OK


def _print_deployment(folder: Path) -> None:
    """Print what production serves of a folder, if it is declared, and which folders beside it claim the same name."""
    from pytest_mistral_lora.records.deployment import deployed
    from pytest_mistral_lora.records.manifest import load
    from pytest_mistral_lora.training.declaring import other_claims

    if sentence := deployed(load(folder).data):
        sys.stdout.write(f"{shown_path(sentence)}\n")
    for other, why in other_claims(folder):
        path = shown_path(str(path_from(Path.cwd(), other)))
        step = f"if it is not served any longer: mistral-lora note {shlex.quote(path)} --withdraw"
        sys.stdout.write(f"note: {path} claims this name, too, and {why}; {step}\n")


NOTE = Verb(
    "note",
    "write DECISION.md and README.md of a folder again",
    _add_note_options,
    run_note,
    description=_NOTE_DESCRIPTION,
    examples=(
        "mistral-lora note lora-out",
        "mistral-lora note lora-out --recipe recipe.yaml",
        "mistral-lora note lora-out --withdraw",
    ),
)
