"""The options of `mistral-lora audit --runner`: rows that are not on disk yet, but made by a runner."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.runners.runner import RUNNERS, TIME_LIMIT, find_runner


def add_options(verb: argparse.ArgumentParser) -> None:
    """Add the options to the command line of the audit."""
    group = verb.add_argument_group(
        "runner",
        "Let another trainer encode the rows of --dataset (or, without it, the packaged rows) by its own code.",
    )
    group.add_argument(
        "--runner", metavar="NAME", help=f"{', '.join(RUNNERS)}, or the path of a script (*.py) that encodes rows"
    )
    group.add_argument("--config", type=Path, metavar="FILE", help="the runner's own configuration (default: stock)")
    group.add_argument("--python", type=Path, metavar="PATH", help="the Python that the runner is installed in")
    group.add_argument(
        "--own-data",
        action="store_true",
        help="leave the configuration its own data, such as those of an exported run: --dataset are then the chat rows "
        "that they come from, in order",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="keep the encoded rows in this file")
    group.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help=f"how long the runner may take (default: {TIME_LIMIT:g})",
    )


@contextmanager
def encoded_rows(given: argparse.Namespace) -> Iterator[Path]:
    """Give the encoded rows to judge: the file that is named, or what the runner makes while the block runs.

    Raises:
        InputError: If neither or both are named, or a row of the dataset cannot be read.
        RunnerError: If the runner's rows cannot be had.
    """
    if (given.rows is None) == (given.runner is None):
        raise InputError("nothing to judge" if given.rows is None else "rows and a runner", expected="ROWS or --runner")
    if given.rows is not None:
        yield given.rows
        return
    with tempfile.TemporaryDirectory(prefix="mistral-audit-") as folder:
        yield _extracted(given, Path(folder))


def _extracted(given: argparse.Namespace, folder: Path) -> Path:
    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.runners.extract import extract, packaged_rows

    rows = [row for path in given.dataset for row in read_rows(path)]
    if given.own_data and not rows:
        raise InputError("--own-data without --dataset", expected="the chat rows that the runner's own data come from")
    extraction = extract(
        find_runner(given.runner),
        rows or packaged_rows(CheckpointTokenizer(given.tokenizer).oracle),
        given.tokenizer,
        given.output or folder / f"{Path(given.runner).stem}.jsonl",
        config=given.config,
        python=given.python,
        time_limit=given.time_limit,
        own_data=given.own_data,
    )
    sys.stderr.write(f"{extraction.ran_under}\n")
    return extraction.file
