"""`mistral-lora check`: the suite without pytest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.cli import encoded
from pytest_mistral_lora.cli.judging import (
    Judging,
    add_format_option,
    add_report_option,
    add_rules_option,
    add_write_xfails_option,
    add_xfails_option,
    check_options,
)
from pytest_mistral_lora.cli.mend import mend_templates
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_objective_option,
    add_oracle_option,
    shown_path,
    tokenizer_argument,
    whole_number,
)
from pytest_mistral_lora.conformance.path_kinds import KINDS
from pytest_mistral_lora.conformance.targets import RecipeTarget, is_shipped
from pytest_mistral_lora.errors import InputError, MistralLoraError

_DESCRIPTION = """\
Run the checks of `pytest --mistral-golden` without pytest, and print a table, and each finding once,
however many rows or checks it breaks.

A path is a recipe, a file of rows, a file of encoded rows, an adapter or merged folder, a GGUF file, a checkpoint
folder or a tokenizer file. It is recognised by its content, and the first line names its kind. Rows need a tokenizer:
--tokenizer names one that is not judged itself, or else each tokenizer and recipe among the paths encodes them. With no
path, check every tokenizer that mistral-common ships, and train a tiny LoRA adapter with one of them.

Encoded rows are what a trainer trains on: input_ids, with labels or a mask, in JSON Lines, Parquet, Arrow, a JSON array
or a folder of Dataset.save_to_disk; or preference pairs with prompt_ids, chosen_ids and rejected_ids. Each token is
compared with mistral-common's encoding of the messages; without messages, the ids are read back. With --runner, another
trainer encodes the rows. If encoded rows are all that is checked, the output counts rows, and the findings of each
class; with -v, it is the table of checks.

With --output-format jsonl, each finding on encoded rows is one JSON object on a line of its own: rule, class, severity,
index (the row's number, null for the whole file), state, place, found, expected, detail and row (the chat row as one
line of JSON). The last line is {"summary": {...}} with rows, sound, wrong, not_judged, not_checked, packed,
labels_of_masks (rows whose labels are made of a mask), columns (rows by each column that says what is trained on),
read_back (rows without messages, which are read back from their ids), answers_without_labels (answers of such rows that
are read with weight 0), pairs (chosen and rejected answers in one record; each of the two counts as a row), tokens,
supervised_tokens, findings, classes (rule, class and count of each), known (the deviations of --xfails that were found,
whose findings have no line) and fixes (by rule, the fix in each known trainer, if the trainer is unknown)."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", type=INPUT, nargs="*", metavar="PATH", help="recipe, folder or file to check (default: see above)"
    )
    parser.add_argument(
        "--tokenizer",
        # the report names a shipped tokenizer by the same name
        type=PathArgument("read", lambda text: Path(text) if is_shipped(Path(text)) else tokenizer_argument(text)),
        metavar="PATH",
        help="tokenizer of rows, encoded rows and GGUF files: checkpoint folder, tekken.json, tokenizer.model.vN, the "
        "name of a shipped one, such as spm-v3, OWNER/NAME@COMMIT at the Hub, or a recipe, for that of its base",
    )
    parser.add_argument(
        "--as",
        dest="kind",
        choices=[*KINDS],
        default="",
        help="kind of every path (default: recognised by its content)",
    )
    parser.add_argument("--base", type=INPUT, metavar="DIR", help="base checkpoint of the adapters and merged models")
    add_oracle_option(parser)
    add_objective_option(parser)
    parser.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        help="train a tiny model with each tokenizer, too (default: only if you give no path)",
    )
    parser.add_argument(
        "--examples", type=whole_number, default=20, metavar="N", help="generated rows for each law (default: 20)"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="report whether each recipe fits into the memory of a device, such as 80GB, and which settings need less",
    )
    add_xfails_option(parser)
    add_rules_option(parser)
    parser.add_argument(
        "--fail-on",
        metavar="WHAT",
        help="what fails beside errors: note, not-checked (a check that could not run), or both, joined by a comma",
    )
    add_write_xfails_option(parser)
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="run every check: by default, those of recipes, rows and tokenizers that passed are not run again if "
        "nothing that they read has changed, unless CI is set",
    )
    mending = parser.add_mutually_exclusive_group()
    mending.add_argument(
        "--fix",
        action="store_true",
        help="write Mistral's own chat template into a local checkpoint folder whose template is at fault; nothing "
        "else is changed",
    )
    mending.add_argument("--diff", action="store_true", help="print what --fix would change, and write nothing")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print the table, the figures of the rows and each reason why something was not checked, also if no "
        "error is found",
    )
    add_report_option(parser)
    add_format_option(parser, jsonl="each finding on encoded rows on a line of its own, in JSON")
    encoded.add_options(parser)


_MOST_TITLES = 2
"""Lines on the paths that are shown without `--verbose`."""


def run(args: argparse.Namespace) -> int:
    """Check the paths, or the embedded default; return 1 if a check finds an error."""
    from pytest_mistral_lora.chat.objective import Declaration
    from pytest_mistral_lora.judging import plan_check
    from pytest_mistral_lora.records.files import path_from

    encoded.refuse_options(args)
    if args.runner is not None:
        return encoded.run(args, None)
    plan = plan_check(
        [path_from(Path.cwd(), path) for path in args.paths],
        tokenizer=args.tokenizer,
        kind=args.kind,
        base=args.base,
        oracle=args.oracle,
        objective=None if args.objective is None else Declaration(args.objective, "--objective"),
        train=args.train,
        option="--{}".format,
    )
    recipes = [target for target in plan.targets if isinstance(target, RecipeTarget)]
    if args.device_memory is not None and not recipes:
        raise InputError("--device-memory is for recipes, and no path is one", expected="a recipe.yaml")
    alone = encoded.is_alone(plan.targets)
    if args.output_format == "jsonl" and not alone:
        found = "--output-format jsonl is for encoded rows alone, and other targets are named"
        raise InputError(found, expected="one file of encoded rows, or --runner")
    if args.dataset and not alone:
        raise InputError("--dataset is for one file of encoded rows, or for --runner", expected="one of them")
    mends = args.fix or args.diff
    if mends and (alone or args.output_format == "json"):
        option = "--fix" if args.fix else "--diff"
        raise InputError(f"{option} is for the templates of checkpoints, and prints text", expected=f"no {option}")
    if args.output_format == "text" and (args.verbose or not alone):
        titles = [f"{shown_path(path.path)}: {path.title}\n" for path in plan.paths]
        if len(titles) > _MOST_TITLES and not args.verbose:
            titles[_MOST_TITLES - 1 :] = [f"… and {len(titles) - _MOST_TITLES + 1} more paths: -v lists them\n"]
        sys.stdout.write("".join(titles))
        sys.stdout.flush()
    if alone:
        return encoded.run(args, plan.paths[0])
    judging = Judging.of(
        args,
        paths=[path.to_json() for path in plan.paths],
        memory=_memory(recipes, args.device_memory),
        options=check_options(args, examples=args.examples, train=plan.train),
        brief=not args.verbose,
        whole_by="" if args.verbose else "-v",
        mend=partial(mend_templates, writes=args.fix) if mends else None,
    )
    kept = None if args.no_cache else _kept_folder()
    return judging.judge(plan.targets, kept)


def _kept_folder() -> Path | None:
    """Return the folder of the results of earlier runs; None in CI and without a home folder."""
    from pytest_mistral_lora.records.files import cache_folder

    with suppress(InputError):
        return None if os.environ.get("CI") else cache_folder() / "results"
    return None


def _memory(recipes: Sequence[RecipeTarget], size: str | None) -> list[dict[str, Any]]:
    """Return the estimate of memory for each recipe, as plain data with a text; empty without a size.

    Raises:
        InputError: If the text is not a size.
    """
    if size is None:
        return []
    from pytest_mistral_lora.training.memory import parse_size, recipe_memory

    memory, found = parse_size(size, place="--device-memory"), []
    for target in recipes:
        path = target.path
        try:
            estimate = recipe_memory(target.recipe, target.base_folder)
            found.append({"path": str(path), "text": estimate.text(memory), **estimate.to_json(memory)})
        except MistralLoraError as error:  # a check reports this error
            found.append({"path": str(path), "text": f"memory: no estimate: {error.found}"})
    return found


VERB = Verb(
    "check",
    "check recipes, rows, ids and labels, tokenizers, adapters",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora check",
        "mistral-lora check recipe.yaml",
        "mistral-lora check recipe.yaml --device-memory 80GB",
        "mistral-lora check rows.jsonl --tokenizer checkpoints/my-mistral",
        "mistral-lora check rows.jsonl --tokenizer spm-v3",
        "mistral-lora check encoded.jsonl --tokenizer checkpoints/my-mistral --dataset rows.jsonl",
        "mistral-lora check --runner NAME --tokenizer checkpoints/my-mistral --dataset rows.jsonl",
        "mistral-lora check lora-out --base models/base",
        "mistral-lora check merged lora-out --base models/base",
    ),
    failure="a check finds an error, or no check could judge anything",
    alias="audit",
)
