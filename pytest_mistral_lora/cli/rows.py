"""`mistral-lora import` and `stats`: turn data of any format into rows, and print their figures."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_json_option,
    add_objective_option,
    add_oracle_option,
    add_tokenizer_option,
    output_file,
    print_json,
    refuse_objective,
    shown_path,
    whole_number,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer
from pytest_mistral_lora.errors import EXIT_OK, InputError
from pytest_mistral_lora.extras import MissingExtraError
from pytest_mistral_lora.formats.recognition import FORMATS
from pytest_mistral_lora.formats.report import LOSSES
from pytest_mistral_lora.places import NOWHERE

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget

_IMPORT_DESCRIPTION = """\
Convert data to the rows that every other verb reads. The format is recognised by its keys, and the container by its
bytes: JSON Lines, a JSON array, CSV, TSV, Parquet, Arrow, a folder of `save_to_disk`, each of the texts also compressed
by gzip or in UTF-16. SOURCE may also be the configuration of a trainer that declares your data: its
YAML file, or a dataset_info.json.

The report lists each kind of change with its number of rows and the first of them. Parts of a record that a row cannot
keep are an error, and nothing is written, unless you allow the loss by its name with --lossy. A preference pair keeps
both answers, under `chosen` and `rejected`; with --lossy rejected it becomes a row with the chosen one."""
_KINDS = f"The names of losses: {', '.join(LOSSES)}."


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", type=INPUT, nargs="+", metavar="SOURCE", help="file, folder or configuration")
    parser.add_argument(
        "--to", required=True, type=PathArgument("written", output_file()), metavar="FILE", help="JSONL file to write"
    )
    _add_source_options(parser)
    add_json_option(parser)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=[*FORMATS], help="format of the records (default: recognised by their keys)"
    )
    parser.add_argument(
        "--lossy",
        action="append",
        default=[],
        metavar="KIND",
        help="a loss of `mistral-lora import` that is allowed, by its name (repeatable)",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="data set of a dataset_info.json (repeatable; default: the only one)",
    )


def run_import(args: argparse.Namespace) -> int:
    """Write the rows, and print the report."""
    from pytest_mistral_lora.formats.convert import Source, import_rows
    from pytest_mistral_lora.formats.layouts import Layout
    from pytest_mistral_lora.formats.sources import sources_of

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
        sys.stdout.write("\n".join([*report.lines(), f"written: {shown_path(args.to)}"]) + "\n")
    return EXIT_OK


IMPORT = Verb(
    "import",
    "convert ShareGPT, Alpaca, OpenAI, Parquet and other data to rows",
    _add_import_options,
    run_import,
    description=f"{_IMPORT_DESCRIPTION}\n\n{_KINDS}",
    examples=(
        "mistral-lora import sharegpt.json --to rows.jsonl",
        "mistral-lora import train-*.parquet --to rows.jsonl --lossy rejected",
        "mistral-lora import data/dataset_info.json --dataset identity --to rows.jsonl",
        "mistral-lora import my-trainer.yaml --to rows.jsonl",
    ),
)


_STATS_DESCRIPTION = """\
Read the rows of a recipe or of data in any format once, and print their figures: rows, turns, tokens and supervised
tokens, roles, calls by tool, rows by script, rows that are there twice, what each max_length would cut, and a histogram
of lengths. For a recipe, they include the split, the steps of an epoch and held-out rows that are trained on.

SOURCE is a recipe, or anything that `mistral-lora import` reads. Rows that cannot be used are only counted:
`mistral-lora check` reports each."""


def _add_stats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", type=INPUT, nargs="+", metavar="SOURCE", help="a recipe; or files, folders of data")
    add_tokenizer_option(parser, required=False)
    add_oracle_option(parser)
    add_objective_option(parser)
    _add_source_options(parser)
    parser.add_argument(
        "--processes", type=whole_number, metavar="N", help="processes that read rows (default: by their size)"
    )
    add_json_option(parser)


def run_stats(args: argparse.Namespace) -> int:
    """Print the figures."""
    from pytest_mistral_lora.conformance.dataset.checks import dataset_statistics
    from pytest_mistral_lora.conformance.targets import DatasetTarget
    from pytest_mistral_lora.report.tables import figure_lines, length_lines

    target, files = _opened(args)
    figures = dataset_statistics(target, files, processes=args.processes, progress=sys.stderr)
    if args.json:
        print_json(figures)
        return EXIT_OK
    lines = [*map(shown_path, args.sources)]
    lines += [figures["rows of"]] if "rows of" in figures else []
    lines += [f"encoded by {figures['oracle of']}"] if "oracle of" in figures else []
    width = shutil.get_terminal_size().columns
    lines += [*figure_lines(figures, width), *length_lines(figures, width)]
    if figures["rows_refused"]:
        words = ["mistral-lora", "check", *map(str, args.sources)]
        words += ["--tokenizer", target.judge.name] if isinstance(target, DatasetTarget) else []
        lines.append(f"To see why rows are refused: {shown_path(shlex.join(words))}")
    if figures["repeats"]["within_a_side"]["near"] is None:
        lines.append(str(MissingExtraError("rensa")))
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def _opened(args: argparse.Namespace) -> tuple[RecipeTarget | DatasetTarget, list[DataFile] | None]:
    """Return the recipe, or the rows with their files.

    Raises:
        InputError: If a source cannot be opened, or rows have no tokenizer.
    """
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.encoder import make_encoder
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.path_kinds import recognised
    from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, Target

    first: Path = args.sources[0]
    is_recipe = False
    with suppress(InputError):  # a configuration of another trainer names its data
        is_recipe = first.suffix.lower() in (".yaml", ".yml") and recognised(first).kind == "recipe"
    if is_recipe:
        if len(args.sources) > 1:
            raise InputError("a recipe names its rows itself", place=str(args.sources[1]), expected="one recipe alone")
        given = [name for name in ("format", "lossy", "dataset") if getattr(args, name)]
        if given:
            found = f"--{given[0]} is for data, and {first} is a recipe, which declares its own"
            raise InputError(found, next_step=f"Leave --{given[0]} out.")
        if args.objective is not None:
            refuse_objective(first)
        # the base may be elsewhere
        named = None if args.tokenizer is None else named_tokenizer(args.tokenizer, args.oracle)[:2]
        tokenizer = None if named is None else CheckpointTokenizer(*named)
        return RecipeTarget(first.stem, first, oracle_name=args.oracle, loaded=tokenizer), None
    files = [file for path in args.sources for file in _files_of(path, args)]
    if args.tokenizer is None:
        words = shlex.join(["mistral-lora", "stats", *map(str, args.sources), "--tokenizer"])
        raise InputError(
            "rows are counted in tokens, and no tokenizer is given",
            place=str(first),
            expected="a folder, a file, or the name of a shipped one such as spm-v3",
            next_step=f"Name it: {words} spm-v3",
        )
    path, oracle, _ = named_tokenizer(args.tokenizer, args.oracle)
    if args.objective is not None:
        files = [replace(file, objective=args.objective) for file in files]
    shipped = (name for name in SHIPPED if shipped_tokenizer(name) == path)
    judge = Target(next(shipped, str(path)), path, trains=True, oracle_name=oracle)
    if args.objective is not None:
        make_encoder("mistral-common", judge.tokenizer).require(args.objective, NOWHERE / "--objective")
    return DatasetTarget(first.name, first, judge=judge), files


def _files_of(path: Path, args: argparse.Namespace) -> list[DataFile]:
    """Return the files of a path, as declared or as `check` reads them: rows of several kinds need no conversion.

    Raises:
        InputError: If it cannot be opened.
    """
    from pytest_mistral_lora.formats.layouts import Layout
    from pytest_mistral_lora.formats.sources import open_rows, row_files

    # a missing path has its error there
    if path.exists() and not (args.format or args.lossy or args.dataset):
        return row_files(path)
    return open_rows(path, layout=Layout(args.format or ""), names=args.dataset, lossy=args.lossy)


STATS = Verb(
    "stats",
    "count rows, tokens and repeats, and what a max_length would cut",
    _add_stats_options,
    run_stats,
    description=_STATS_DESCRIPTION,
    examples=(
        "mistral-lora stats recipe.yaml",
        "mistral-lora stats rows.jsonl --tokenizer spm-v3",
        "mistral-lora stats shards/*.parquet --tokenizer checkpoints/my-mistral --json > figures.json",
    ),
)
