"""`mistral-lora render`: the tokens of chat rows, and which of them have a loss."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import Verbs, add_oracle_option, add_tokenizer_option, add_verb
from pytest_mistral_lora.errors import EXIT_OK, RowError, RowsError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.chunks import DataFile

SUMMARY = "show the tokens of each chat row, and which of them are trained on"

_DESCRIPTION = """\
Encode each row of a chat JSONL file, or of a recipe's data, with mistral-common. Print its tokens, turn by turn, and
whether each part is trained on. A row that cannot be encoded is reported at the end, with its line and field."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "render",
        run,
        description=_DESCRIPTION,
        examples=(
            "mistral-lora render rows.jsonl --tokenizer checkpoints/my-mistral",
            "mistral-lora render rows.jsonl --tokenizer spm-v3 --json > encoded.jsonl",
        ),
    )
    parser.add_argument("rows", type=Path, help="chat JSONL file, or a recipe")
    add_tokenizer_option(parser)
    add_oracle_option(parser)
    parser.add_argument("--json", action="store_true", help="print encoded rows, as `mistral-lora audit` reads them")


def run(args: argparse.Namespace) -> int:
    """Print every row that can be encoded.

    Raises:
        RowsError: If rows cannot be encoded, after the others are printed.
    """
    from pytest_mistral_lora.chat.encoded import encoded_text
    from pytest_mistral_lora.chat.rows import scan_rows
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    oracle = CheckpointTokenizer(args.tokenizer, args.oracle).oracle
    errors: list[RowError] = []
    files: list[Path | DataFile] = [args.rows]
    if args.rows.suffix.lower() in (".yaml", ".yml"):
        from pytest_mistral_lora.training.recipe import load_recipe

        files = [*load_recipe(args.rows).data.files()]
    for item in chain.from_iterable(map(scan_rows, files)):
        # one bad row must not hide the others: all are printed or reported
        try:
            if isinstance(item, RowError):
                raise item
            encoded = oracle.encode(item)
        except RowError as error:
            errors.append(error)
            continue
        if args.json:
            data = {**item.to_json(), "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}
            sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write(f"{item.place}\n{encoded_text(encoded, oracle.piece)}\n")
    if errors:
        raise RowsError(errors, place=str(args.rows))
    return EXIT_OK
