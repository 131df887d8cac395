"""The tokens of a row to show, as plain data: of one encoding, or of two side by side with their differences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.difference import all_blocks, is_control, label_word, plain_text
from pytest_mistral_lora.chat.encoded import EncodedRow, Span


class ShownToken(NamedTuple):
    """A token of one encoding.

    Attributes:
        position: Its place in `input_ids`.
        id: Its id.
        piece: Its spelling in the vocabulary. It may hold any character: print it by `chat.difference.visible`.
        label: `train`, `-100`, `train 5` for the id of another token, `?` if there is none; empty if not compared.
        control: Whether it is a control token.
    """

    position: int
    id: int
    piece: str
    label: str
    control: bool

    @property
    def trained(self) -> bool:
        """Whether the token has a loss."""
        return self.label.startswith("train")


class Column(NamedTuple):
    """The tokens that stand at one place of a row.

    Attributes:
        tokens: One for each encoding; None if an encoding has no such token.
        mark: Empty if nothing is wrong; else `>` for another id or label, `-` for a token that is missing and `+` for
            one too many in the second encoding.
        turn: Index of the turn; None if no turn owns the tokens.
        role: Role of the turn, or None.
        expected: What should stand here, in words; empty if the tokens themselves show it.
        found: What stands here, in words; empty as before.
    """

    tokens: tuple[ShownToken | None, ...]
    mark: str = ""
    turn: int | None = None
    role: str | None = None
    expected: str = ""
    found: str = ""


class Wrong(NamedTuple):
    """A token of one encoding that is wrong.

    Attributes:
        position: Its index in `input_ids`.
        expected: What should stand there, in words, such as `[/INST]` or `-100`.
        found: What stands there, in words; empty if the token itself shows it.
    """

    position: int
    expected: str
    found: str = ""


class TokenSide(NamedTuple):
    """One encoding of a row.

    Attributes:
        name: Its origin for people, such as `mistral-common` or `chat-template`.
        ids: `input_ids`, one `int` a token.
        labels: As long as `ids`, `IGNORE_INDEX` for no loss; None if they are not known or not compared.
        piece: Gives the vocabulary's spelling of an id, such as the `shown` of an encoder.
        spans: The owners of its tokens; empty if they are not known.
    """

    name: str
    ids: Sequence[int]
    labels: Sequence[int] | None
    piece: Callable[[int], str]
    spans: Sequence[Span] = ()

    @classmethod
    def of(cls, name: str, encoded: EncodedRow, piece: Callable[[int], str]) -> TokenSide:
        """Return the side of an encoded row."""
        return cls(name, encoded.input_ids, encoded.labels, piece, encoded.spans)

    def token(self, index: int) -> ShownToken:
        """Return one token."""
        piece = self.piece(self.ids[index])
        label = label_word(self.ids, self.labels, index)
        return ShownToken(index, self.ids[index], piece, label, is_control(piece))


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of tokens to show.

    Attributes:
        title: The place of the row, such as `rows.jsonl:3`.
        sides: The name of each encoding: one, or two that are compared, the expected one first.
        columns: The tokens in order.
    """

    title: str
    sides: tuple[str, ...]
    columns: tuple[Column, ...]

    @classmethod
    def single(cls, title: str, side: TokenSide, wrong: Sequence[Wrong] = ()) -> TokenRow:
        """Return the tokens of one encoding, with those that are wrong marked.

        Args:
            title: The place of the row.
            side: The encoding.
            wrong: The tokens to mark. A position behind the last token marks one that is missing at the end.
        """
        notes = {one.position: one for one in wrong}
        owners = _owners(side)
        columns = []
        for index in range(len(side.ids)):
            note = notes.pop(index, None)
            words = (note.expected, note.found) if note else ("", "")
            columns.append(Column((side.token(index),), ">" if note else "", *owners[index], *words))
        last = owners[-1] if owners else (None, None)
        missing = (Column((None,), "-", *last, one.expected, one.found) for one in notes.values())
        return cls(title, (side.name,), (*columns, *missing))

    @classmethod
    def compared(cls, title: str, expected: TokenSide, found: TokenSide, *, same_vocabulary: bool = True) -> TokenRow:
        """Return two encodings of one row, aligned, with their differences marked.

        Args:
            title: The place of the row.
            expected: The encoding to hold the other to; its spans own the tokens of both.
            found: The other encoding.
            same_vocabulary: Whether equal ids mean equal tokens. If not, tokens are equal if their texts are.
        """
        keys: list[list[Hashable]] = [
            [token if same_vocabulary else plain_text(side.piece(token)) for token in side.ids]
            for side in (expected, found)
        ]
        owners = _owners(expected)
        columns, owner = [], _owners(found)[0] if found.ids and not owners else (None, None)
        for _, want, want_end, have, have_end in all_blocks(*keys):
            for i, j in zip_longest(range(want, want_end), range(have, have_end)):
                left, right = None if i is None else expected.token(i), None if j is None else found.token(j)
                owner = owner if i is None else owners[i]
                other = i is None or j is None or keys[0][i] != keys[1][j]
                mark = difference_mark(left and left.label, right and right.label, other)
                columns.append(Column((left, right), mark, *owner))
        return cls(title, (expected.name, found.name), tuple(columns))

    @property
    def wrong(self) -> int:
        """Number of columns that are marked."""
        return sum(bool(column.mark) for column in self.columns)

    @property
    def first_wrong(self) -> int | None:
        """Index of the first marked column; None if there is none."""
        return next((index for index, column in enumerate(self.columns) if column.mark), None)

    def counts(self) -> list[tuple[str, int, int | None]]:
        """Return for each encoding its name, its tokens and those with a loss; None for the last without labels."""
        found = []
        for number, name in enumerate(self.sides):
            tokens = [token for column in self.columns if (token := column.tokens[number]) is not None]
            labelled = any(token.label for token in tokens)
            found.append((name, len(tokens), sum(token.trained for token in tokens) if labelled else None))
        return found

    def parts(self) -> Iterator[tuple[int, list[Column]]]:
        """Yield runs of columns of one turn that are alike trained or not, each with the index of its first column."""
        start, trained = 0, False
        keys = []
        for column in self.columns:
            # a token that is missing is no part of its own
            trained = next((token.trained for token in column.tokens if token is not None), trained)
            keys.append((column.turn, column.role, trained))
        for _, group in groupby(keys):
            end = start + len(list(group))
            yield start, list(self.columns[start:end])
            start = end

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, which `from_json` reads."""
        columns = [[[token and list(token) for token in tokens], *rest] for tokens, *rest in self.columns]
        return {"title": self.title, "sides": list(self.sides), "columns": columns}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenRow:
        """Return the row of the result of `to_json`."""
        columns = (
            Column(tuple(token and ShownToken(*token) for token in tokens), *rest) for tokens, *rest in data["columns"]
        )
        return cls(data["title"], tuple(data["sides"]), tuple(columns))


def difference_mark(expected: str | None, found: str | None, is_other: bool) -> str:
    """Return the mark of a pair of tokens: `-` for one that is missing, `+` for one too many, `>` for another one.

    Args:
        expected: The label of the expected token, empty if labels are not compared; None if there is no such token.
        found: The label of the other one.
        is_other: Whether their ids differ.
    """
    if found is None:
        return "-"
    if expected is None:
        return "+"
    return ">" if is_other or (expected and found and expected != found) else ""


def _owners(side: TokenSide) -> list[tuple[int | None, str | None]]:
    """Return the turn and the role of each token."""
    owners: list[tuple[int | None, str | None]] = [(None, None)] * len(side.ids)
    for span in side.spans:
        owners[span.start : span.end] = [(span.turn, span.role)] * (span.end - span.start)
    return owners
