"""`mistral-lora render`: the tokens of chat rows, and which of them have a loss."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_oracle_option,
    add_tokenizer_option,
    name_of,
    output_file,
    print_json,
    shown_path,
    tokenizer_argument,
    whole_number,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer, recipe_at
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, RowError, RowsError, counted

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.diff import TokenSide
    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.chat.token_rows import TokenRow
    from pytest_mistral_lora.checkpoint.encoder import Encoder
    from pytest_mistral_lora.training.recipe import Recipe

_DESCRIPTION = """\
Encode each row of a chat JSONL file, or of a recipe's data. Print its tokens with their ids, turn by turn, and whether
each part is trained on: in colour on a terminal, or as a page for the browser with --html. A row that cannot be encoded
is reported at the end, with its line and field.

With --compare, print two encodings side by side, with their differences marked: of the two backends, or of two
tokenizers. Tokens of two backends are equal if their ids are; those of two tokenizers, if their texts are."""

_BACKENDS = ("mistral-common", "chat-template")
_PAGE_ROWS = 100
"""Rows of a page without `--limit`: browsers are slow with a million tokens."""


def _is_page(file: Path) -> bool:
    from pytest_mistral_lora.report.pages import is_tokens_page

    return is_tokens_page(file)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", type=INPUT, help="chat JSONL file, or a recipe")
    add_tokenizer_option(parser, required=False)
    add_oracle_option(parser)
    parser.add_argument(
        "--backend",
        choices=_BACKENDS,
        help="Mistral's own tokenizer, or the chat template (default: the recipe's, or else mistral-common)",
    )
    parser.add_argument(
        "--compare",
        type=PathArgument("read", _backend_or_tokenizer),
        metavar="BACKEND|PATH",
        help="second encoding: mistral-common, chat-template, or another tokenizer as for --tokenizer",
    )
    parser.add_argument(
        "--row",
        type=whole_number,
        action="append",
        metavar="N",
        help="only the row of this number, from 1 on; repeatable",
    )
    parser.add_argument(
        "--limit", type=whole_number, metavar="N", help=f"only the first rows (with --html: {_PAGE_ROWS})"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print encoded rows, as `mistral-lora audit` reads them")
    output.add_argument(
        "--html",
        type=PathArgument("written", output_file(_is_page)),
        metavar="FILE",
        help="write a page that needs nothing else",
    )
    output.add_argument("--no-ids", action="store_true", help="print no ids")


def run(args: argparse.Namespace) -> int:
    """Show every row that can be encoded.

    Raises:
        RowsError: If rows cannot be encoded, after the other rows are shown.
    """
    from pytest_mistral_lora.report.tokens import print_tokens

    view = _view_of(args)
    errors: list[RowError] = []
    page: list[TokenRow] = []
    different = False
    for item in _chosen_rows(args, view.recipe):
        # one bad row must not hide the others: show or report each row
        try:
            if isinstance(item, RowError):
                raise item
            sides = view.sides(item)
        except RowError as error:
            errors.append(error)
            continue
        shown = view.shown(item, sides)
        different = different or (len(sides) > 1 and shown.wrong > 0)
        if args.html:
            page.append(shown)
        elif args.json:
            print_json(_json_data(item, sides, shown), indented=False)
        else:
            print_tokens(shown, ids=not args.no_ids)
    if args.html:
        _write_page(args, page, errors)
    if errors:
        raise RowsError(errors, place=str(args.rows))
    return EXIT_FINDING if different else EXIT_OK


@dataclass(frozen=True)
class _View:
    """The encodings to show.

    Attributes:
        recipe: The recipe of the rows, or None.
        encoders: Name and encoder of each encoding: one, or two to compare.
        same_vocabulary: Whether equal ids mean equal tokens.
    """

    recipe: Recipe | None
    encoders: tuple[tuple[str, Encoder], ...]
    same_vocabulary: bool

    def sides(self, row: Row) -> list[TokenSide]:
        """Encode a row; in a comparison, text that the template takes for control tokens is allowed."""
        from pytest_mistral_lora.chat.diff import TokenSide
        from pytest_mistral_lora.checkpoint.encoder import TemplateEncoder

        found = []
        for name, encoder in self.encoders:
            encode: Callable[[Row], EncodedRow] = encoder.encode
            if len(self.encoders) > 1 and isinstance(encoder, TemplateEncoder):
                encode = encoder.template.encode
            found.append(TokenSide.of(name, encode(row), encoder.shown))
        return found

    def shown(self, row: Row, sides: list[TokenSide]) -> TokenRow:
        """Return a row to show, with its file and line."""
        from pytest_mistral_lora.chat.diff import TokenDiff
        from pytest_mistral_lora.chat.token_rows import TokenRow

        if len(sides) == 1:
            return TokenRow.single(row.place, sides[0])
        expected, found = sides
        return TokenRow.compared(row.place, TokenDiff(expected, found, self.same_vocabulary))


def _view_of(args: argparse.Namespace) -> _View:
    """Load what the options name.

    Raises:
        InputError: If no tokenizer is named, or it is missing.
    """
    from pytest_mistral_lora.checkpoint.encoder import make_encoder
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    recipe = recipe_at(args.rows)
    source = args.rows if recipe is not None and args.tokenizer is None else args.tokenizer
    if source is None:
        raise InputError(
            "rows are shown as tokens, and no tokenizer is given",
            place=str(args.rows),
            expected="a folder, a file, a recipe, or the name of a shipped one such as spm-v3",
            next_step=f"Name it: mistral-lora render {shlex.quote(str(args.rows))} --tokenizer spm-v3",
        )
    path, oracle, named = named_tokenizer(source, args.oracle)
    tokenizer = CheckpointTokenizer(path, oracle)
    backend = args.backend or (named.backend if named else _BACKENDS[0])
    first = make_encoder(backend, tokenizer)
    if args.compare is None:
        return _View(recipe, ((f"{backend}, {name_of(path)}", first),), True)
    if isinstance(args.compare, str):
        return _View(recipe, ((backend, first), (args.compare, make_encoder(args.compare, tokenizer))), True)
    second = make_encoder(backend, CheckpointTokenizer(*named_tokenizer(args.compare)[:2]))
    return _View(recipe, ((name_of(path), first), (name_of(args.compare), second)), False)


def _chosen_rows(args: argparse.Namespace, recipe: Recipe | None) -> Iterator[Row | RowError]:
    """Yield the rows that the options choose, or the errors in their place.

    Raises:
        InputError: If there is no row of a given number.
    """
    from pytest_mistral_lora.chat.rows import scan_rows

    files = [args.rows] if recipe is None else recipe.data.files()
    wanted = set(args.row or ())
    limit = args.limit or (_PAGE_ROWS if args.html and not wanted else None)
    number = shown = 0
    for number, item in enumerate(chain.from_iterable(map(scan_rows, files)), 1):
        if args.row and number not in wanted:
            continue
        wanted.discard(number)
        yield item
        shown += 1
        if shown == limit or (args.row and not wanted):
            return
    if wanted:
        found = f"--row {min(wanted)}: there {'is 1 row' if number == 1 else f'are {number} rows'}"
        raise InputError(found, place=str(args.rows), expected=f"a number from 1 to {number}")


def _json_data(row: Row, sides: list[TokenSide], shown: TokenRow) -> dict[str, Any]:
    """Return a row with its encoding, or with both encodings and their differences, as plain data."""
    encodings = [
        {"name": side.name, "input_ids": list(side.ids), "labels": None if side.labels is None else list(side.labels)}
        for side in sides
    ]
    data: dict[str, Any] = row.to_json()
    if len(sides) == 1:
        data |= {name: encodings[0][name] for name in ("input_ids", "labels")}
    else:
        differences = [
            {
                "mark": column.mark,
                "tokens": [token and {"position": token.position, "id": token.id} for token in column.tokens],
            }
            for column in shown.columns
            if column.mark
        ]
        data |= {"place": row.place, "encodings": encodings, "differences": differences}
    return data


def _write_page(args: argparse.Namespace, rows: list[TokenRow], errors: list[RowError]) -> None:
    from pytest_mistral_lora.records.files import write_text
    from pytest_mistral_lora.report.pages import tokens_page

    notes = [f"{counted(len(rows), 'row')} of {args.rows}."]
    limit = args.limit or _PAGE_ROWS
    if not args.row and len(rows) + len(errors) == limit:
        most = "1 row is" if limit == 1 else f"{limit:,} rows are"
        notes.append(f"No more than {most} shown: choose others with --row, or more with --limit.")
    notes += [f"Not encoded: {error}" for error in errors[: RowsError.shown]]
    write_text(args.html, tokens_page(rows, heading=f"Tokens of {args.rows.name}", notes=notes))
    sys.stdout.write(f"{shown_path(args.html)}: {shown_path(notes[0])}\n")


def _backend_or_tokenizer(text: str) -> str | Path:
    return text if text in _BACKENDS else tokenizer_argument(text)


VERB = Verb(
    "render",
    "show the tokens of each chat row, and which of them are trained on",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora render rows.jsonl --tokenizer checkpoints/my-mistral",
        "mistral-lora render recipe.yaml --limit 5 --html tokens.html",
        "mistral-lora render rows.jsonl --tokenizer checkpoints/my-mistral --row 3 --compare chat-template",
        "mistral-lora render rows.jsonl --tokenizer spm-v3 --compare tekken-240911",
        "mistral-lora render rows.jsonl --tokenizer spm-v3 --json > encoded.jsonl",
    ),
    failure="--compare finds a difference",
)
