"""`mistral-lora render`: the tokens of chat rows, and which of them have a loss."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_objective_option,
    add_oracle_option,
    add_tokenizer_option,
    name_of,
    output_file,
    print_json,
    refuse_objective,
    shown_path,
    tokenizer_argument,
    whole_number,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer, recipe_at
from pytest_mistral_lora.conformance.path_kinds import RecognisedPath, recognised
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, RowError, RowsError, counted
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import NOWHERE

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.diff import TokenSide
    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.chat.objective import Objective
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.chat.token_rows import TokenRow
    from pytest_mistral_lora.checkpoint.encoder import Encoder
    from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
    from pytest_mistral_lora.training.recipe import Recipe

_DESCRIPTION = """\
Encode each row of a file, of a folder or of a recipe's data. Print its tokens with their ids, turn by turn, and whether
each part is trained on: in colour on a terminal, or as a page for the browser with --html. A row that cannot be encoded
is reported at the end, with its line and field.

ROWS is what `mistral-lora check` takes for rows: chat JSONL, any format that `mistral-lora import` reads, a compressed
file, a table, a folder, a recipe. Encoded rows, such as those that a trainer prepared, are shown with their own ids and
labels.

With --compare, print two encodings side by side, with their differences marked: of the two backends, or of two
tokenizers; of encoded rows, their own and the named one. Of a preference pair, the prompt is shown once, and the
rejected answer below the chosen one. Tokens of two backends are equal if their ids are; those of
two tokenizers, if their texts are."""

_BACKENDS = ("mistral-common", "chat-template")
_PAGE_ROWS = 100
"""Rows of a page without `--limit`: browsers are slow with a million tokens."""


def _is_page(file: Path) -> bool:
    from pytest_mistral_lora.report.pages import is_tokens_page

    return is_tokens_page(file)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", type=INPUT, metavar="ROWS", help="rows, encoded rows, or a recipe")
    add_tokenizer_option(parser, required=False)
    add_oracle_option(parser)
    add_objective_option(parser)
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
    output.add_argument("--json", action="store_true", help="print encoded rows, as `mistral-lora check` reads them")
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
    from pytest_mistral_lora.formats.report import conversion_parts
    from pytest_mistral_lora.formats.sources import ConvertedSource
    from pytest_mistral_lora.report.tokens import print_tokens

    found = recognised(args.rows)
    if found.kind not in ("rows", "encoded", "recipe"):
        raise InputError(f"this is {found.title}", place=str(args.rows), expected="rows, encoded rows, or a recipe")
    if found.kind == "encoded" and args.objective is not None and args.compare is None:
        step = f"Judge them by it: mistral-lora check {shlex.quote(str(args.rows))} --objective {args.objective}"
        raise InputError("--objective is for rows, and encoded rows have their labels", next_step=step)
    view = _view_of(args)
    errors: list[RowError] = []
    page: list[TokenRow] = []
    different = False
    converted, first = Counter[str](), NOWHERE
    files = [] if found.kind == "encoded" else _files(found, view)
    for item in _chosen_rows(args, _items(found, files)):
        # one bad row must not hide the others: show or report each row
        try:
            if isinstance(item, RowError):
                raise item
            rows = item if isinstance(item, tuple) else (item,)
            sides = [view.sides(row) for row in rows]
        except RowError as error:
            errors.append(error)
            continue
        head = rows[0]
        if isinstance(head, Row) and head.converted:
            converted.update(head.converted)
            first = first or head.place
        shown = view.shown(rows, sides)
        different = different or (len(sides[0]) > 1 and any(row.wrong for row in shown))
        if args.html:
            page += shown
        elif args.json:
            for data in _json_data(rows, sides, shown):
                print_json(data, indented=False)
        else:
            for row in shown:
                print_tokens(row, ids=not args.no_ids)
    if args.html:
        _write_page(args, page, errors, view.objectives)
    reports = [file.source.report for file in files if isinstance(file.source, ConvertedSource)]
    if parts := conversion_parts(reports, converted, first):
        (sys.stderr if args.json else sys.stdout).write(f"{printable('; '.join(parts), lines=False)}\n")
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
        objective: The objective of rows that no recipe names.
    """

    recipe: Recipe | None
    encoders: tuple[tuple[str, Encoder], ...]
    same_vocabulary: bool
    objective: Objective

    @property
    def objectives(self) -> list[Objective]:
        """The objectives of the rows."""
        return [self.objective] if self.recipe is None else [*self.recipe.objectives]

    def sides(self, row: Row | EncodedLine) -> list[TokenSide]:
        """Return the encodings of a row to show; in a comparison, the expected one first.

        In a comparison, text that the template takes for control tokens is allowed.

        Raises:
            RowError: If the row cannot be encoded.
        """
        from pytest_mistral_lora.chat.diff import TokenSide
        from pytest_mistral_lora.checkpoint.encoder import TemplateEncoder

        if not isinstance(row, Row):
            return self._stored_sides(row)
        found = []
        for name, encoder in self.encoders:
            encode: Callable[[Row], EncodedRow] = encoder.encode
            if len(self.encoders) > 1 and isinstance(encoder, TemplateEncoder):
                encode = encoder.template.encode
            found.append(TokenSide.of(f"{name}{_under(row.objective)}", encode(row), encoder.shown))
        return found

    def _stored_sides(self, line: EncodedLine) -> list[TokenSide]:
        """Return the ids and labels of a record of encoded rows; in a comparison, behind those of its conversation."""
        from pytest_mistral_lora.chat.diff import TokenSide

        if line.error:
            raise RowError(f"the trainer encoded nothing: {line.error}", place=line.place)
        name, encoder = self.encoders[-1]
        unknown = [token for token in line.input_ids if not 0 <= token < encoder.vocab_size]
        if unknown:
            raise RowError(f"the id {unknown[0]}", place=line.place, expected=f"0 to {encoder.vocab_size - 1:,}")
        conversation = line.rows[0] if len(line.rows) == 1 else None
        if conversation is None:
            if len(self.encoders) > 1:
                found = f"{len(line.rows)} conversations" if line.rows else "no messages"
                step = "Judge it: mistral-lora check reads conversations back from the ids."
                raise RowError(f"{found}, and --compare encodes one", place=line.place, next_step=step)
            return [TokenSide("stored", line.input_ids, line.labels, encoder.shown)]
        expected = encoder.encode(conversation.with_objective(self.objective))
        # turns are known only where the ids are those of the conversation; padding may follow them
        is_same = line.input_ids[: len(expected.input_ids)] == expected.input_ids
        stored = TokenSide("stored", line.input_ids, line.labels, encoder.shown, expected.spans if is_same else ())
        if len(self.encoders) == 1:
            return [stored]
        return [TokenSide.of(f"{name}{_under(self.objective)}", expected, encoder.shown), stored]

    def shown(self, rows: Sequence[Row | EncodedLine], sides: Sequence[list[TokenSide]]) -> list[TokenRow]:
        """Return the rows of a record to show, with their file and line; the prompt of a pair is shown once.

        Args:
            rows: The rows of the record.
            sides: The encodings of each.
        """
        from pytest_mistral_lora.chat.diff import TokenDiff
        from pytest_mistral_lora.chat.token_rows import TokenRow

        if len(sides[0]) > 1:
            return [
                TokenRow.compared(str(row.place), TokenDiff(expected, found, self.same_vocabulary))
                for row, (expected, found) in zip(rows, sides, strict=True)
            ]
        shown = [TokenRow.single(str(row.place), side) for row, [side] in zip(rows, sides, strict=True)]
        prompts = [side.ids[: _answer_start(side)] for [side] in sides]
        # a template may write the two prompts differently
        is_shared = prompts[0] and all(prompt == prompts[0] for prompt in prompts)
        return [shown[0], *(row.behind(len(prompts[0])) if is_shared else row for row in shown[1:])]


def _under(objective: Objective) -> str:
    return "" if objective.is_default else f", objective {objective}"


def _answer_start(side: TokenSide) -> int:
    """Return the index of the first token of a side that is trained on; 0 if none is."""
    labels = side.labels or ()
    return next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), 0)


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
    objective = _objective_of(args, recipe)
    for declared, place in ({objective: NOWHERE / "--objective"} if recipe is None else recipe.objectives).items():
        first.require(declared, place)
    if args.compare is None:
        return _View(recipe, ((f"{backend}, {name_of(path)}", first),), True, objective)
    if isinstance(args.compare, str):
        both = (backend, first), (args.compare, make_encoder(args.compare, tokenizer))
        return _View(recipe, both, True, objective)
    second = make_encoder(backend, CheckpointTokenizer(*named_tokenizer(args.compare)[:2]))
    return _View(recipe, ((name_of(path), first), (name_of(args.compare), second)), False, objective)


def _objective_of(args: argparse.Namespace, recipe: Recipe | None) -> Objective:
    """Return the objective of the option, or the default.

    Raises:
        InputError: If the rows are a recipe's, which declares its own.
    """
    from pytest_mistral_lora.chat.objective import ANSWERS

    if args.objective is not None and recipe is not None:
        refuse_objective(args.rows)
    return args.objective or ANSWERS


def _files(found: RecognisedPath, view: _View) -> list[DataFile]:
    """Return the files of rows of a path, as `check` reads them."""
    from pytest_mistral_lora.formats.sources import row_files

    if view.recipe is not None:
        return view.recipe.files()
    return [replace(file, objective=view.objective) for file in row_files(found.path)]


def _items(found: RecognisedPath, files: Sequence[DataFile]) -> Iterator[tuple[Row, ...] | EncodedLine | RowError]:
    """Yield the rows of each record of a path, or its error, by the readers of `check`."""
    from pytest_mistral_lora.chat.row_files import scan_records
    from pytest_mistral_lora.conformance.encoded.lines import scan_lines
    from pytest_mistral_lora.formats.row_sources import FileRows

    if found.kind == "encoded":
        yield from scan_lines(FileRows(found.path))
    for file in files:
        yield from scan_records(file)


def _chosen_rows(
    args: argparse.Namespace, items: Iterator[tuple[Row, ...] | EncodedLine | RowError]
) -> Iterator[tuple[Row, ...] | EncodedLine | RowError]:
    """Yield the rows that the options choose, or the errors in their place.

    Raises:
        InputError: If there is no row of a given number.
    """
    wanted = set(args.row or ())
    limit = args.limit or (_PAGE_ROWS if args.html and not wanted else None)
    number = shown = 0
    for number, item in enumerate(items, 1):
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


def _json_data(
    rows: Sequence[Row | EncodedLine], sides: Sequence[list[TokenSide]], shown: Sequence[TokenRow]
) -> Iterator[dict[str, Any]]:
    """Yield a record with its encoding, or each of its rows with both encodings and their differences, as plain data.

    Args:
        rows: The rows of the record.
        sides: The encodings of each.
        shown: The rows to show.
    """
    if len(sides[0]) == 1 and isinstance(rows[0], Row) and rows[0].kind.answer_key(rows[0]):
        yield _encoded_pair([row for row in rows if isinstance(row, Row)], [side for [side] in sides])
        return
    for row, encodings, tokens in zip(rows, sides, shown, strict=True):
        plain = [
            {
                "name": side.name,
                "input_ids": list(side.ids),
                "labels": None if side.labels is None else list(side.labels),
            }
            for side in encodings
        ]
        data = _messages_of(row)
        if len(encodings) == 1:
            data |= {name: plain[0][name] for name in ("input_ids", "labels")}
        else:
            differences = [
                {
                    "mark": column.mark,
                    "tokens": [token and {"position": token.position, "id": token.id} for token in column.tokens],
                }
                for column in tokens.columns
                if column.mark
            ]
            data |= {"place": row.place, "encodings": plain, "differences": differences}
        yield data


def _encoded_pair(rows: Sequence[Row], sides: Sequence[TokenSide]) -> dict[str, Any]:
    """Return a pair or a rated answer with its ids, with the columns that trainers of preferences prepare."""
    data = rows[0].kind.record(rows)
    starts = [_answer_start(side) for side in sides]
    data["prompt_ids"] = list(sides[0].ids[: starts[0]])
    for row, side, start in zip(rows, sides, starts, strict=True):
        name = row.kind.answer_key(row)
        data[f"{name}_ids"] = list(side.ids[start:])
        scored = [int(label != IGNORE_INDEX) for label in (side.labels or ())[start:]]
        if not all(scored):
            # the result of a tool
            data[f"{name}_mask"] = scored
    return data


def _messages_of(row: Row | EncodedLine) -> dict[str, Any]:
    """Return the conversations of a row as encoded rows hold them; empty for a row of ids alone."""
    if isinstance(row, Row):
        return row.to_json()
    if row.packed:
        return {"conversations": [conversation.to_json()["messages"] for conversation in row.rows]}
    return row.rows[0].to_json() if row.rows else {}


def _write_page(
    args: argparse.Namespace, rows: list[TokenRow], errors: list[RowError], objectives: Sequence[Objective]
) -> None:
    from pytest_mistral_lora.records.files import write_text
    from pytest_mistral_lora.report.pages import tokens_page

    notes = [f"{counted(len(rows), 'row')} of {args.rows}."]
    limit = args.limit or _PAGE_ROWS
    if not args.row and len(rows) + len(errors) == limit:
        most = "1 row is" if limit == 1 else f"{limit:,} rows are"
        notes.append(f"No more than {most} shown: choose others with --row, or more with --limit.")
    notes += [f"Not encoded: {error}" for error in errors[: RowsError.shown]]
    page = tokens_page(rows, heading=f"Tokens of {args.rows.name}", notes=notes, objectives=objectives)
    write_text(args.html, page)
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
        "mistral-lora render last_run_prepared/ --tokenizer checkpoints/my-mistral --limit 5",
        "mistral-lora render rows.jsonl --tokenizer checkpoints/my-mistral --row 3 --compare chat-template",
        "mistral-lora render rows.jsonl --tokenizer spm-v3 --compare tekken-240911",
        "mistral-lora render rows.jsonl --tokenizer spm-v3 --json > encoded.jsonl",
    ),
    failure="--compare finds a difference",
)
