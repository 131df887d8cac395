"""The tokens of a row to show, as plain data: of one encoding, or of two side by side with their differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.diff import Pair, ShownToken, TokenDiff, TokenSide

_TOKENS_BEFORE = 12
_TOKENS_SHOWN = 64
"""Tokens of a row on a page, and those among them before the first difference."""


class Column(NamedTuple):
    """The tokens that stand at one place of a row.

    Attributes:
        tokens: One for each encoding; None if an encoding has no such token.
        mark: Empty if the tokens are right; else `>` for another id or label, `-` for a missing token and `+` for
            one too many in the second encoding.
        turn: Index of the turn; None if no turn owns the tokens.
        role: Role of the turn, or None.
    """

    tokens: tuple[ShownToken | None, ...]
    mark: str = ""
    turn: int | None = None
    role: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of tokens to show.

    Attributes:
        title: The place of the row, such as `rows.jsonl:3`.
        sides: The name of each encoding: one, or two that are compared, the expected one first.
        columns: The tokens in order.
        first: The number of tokens of the row before them, which are shown with another row.
    """

    title: str
    sides: tuple[str, ...]
    columns: tuple[Column, ...]
    first: int = 0

    @classmethod
    def single(cls, title: str, side: TokenSide) -> TokenRow:
        """Return the tokens of one encoding.

        Args:
            title: The place of the row.
            side: The encoding.
        """
        columns = (Column((side.token(index),), "", *owner) for index, owner in enumerate(side.owners()))
        return cls(title, (side.name,), tuple(columns))

    @classmethod
    def compared(cls, title: str, diff: TokenDiff) -> TokenRow:
        """Return two encodings of one row, side by side, with their differences marked.

        Args:
            title: The place of the row.
            diff: The two encodings.
        """
        owner = diff.found.owners()[0] if diff.found.ids and not diff.expected.ids else (None, None)
        columns = _compared_columns(diff, diff.all_pairs(), owner)
        return cls(title, (diff.expected.name, diff.found.name), tuple(columns))

    @classmethod
    def around_difference(cls, title: str, diff: TokenDiff) -> TokenRow | None:
        """Return the tokens around the first difference; None if the encodings are equal.

        Only a part of the row: findings travel between processes, and a long row has thousands of tokens.

        Args:
            title: The place of the row.
            diff: The two encodings.
        """
        if not diff.marked:
            return None
        start = max(0, diff.marked[0] - _TOKENS_BEFORE)
        columns = tuple(_compared_columns(diff, diff.pairs[start : start + _TOKENS_SHOWN], (None, None)))
        count = len(diff.expected.ids)
        part = f": tokens {start} to {start + len(columns) - 1} of {count}" if len(columns) < count else ""
        return cls(f"{title}{part}", (diff.expected.name, diff.found.name), columns)

    def with_surroundings(self, title: str, side: TokenSide) -> list[TokenRow]:
        """Return the whole row of a part that `around_difference` has cut out of it.

        Before the part, both encodings have the same tokens. Behind it, only the expected ones are known: they are a
        row of their own.

        Args:
            title: The place of the row.
            side: The expected encoding, whole and with its labels.
        """
        row = TokenRow.single(title, side)
        shown = [token for column in self.columns if (token := column.tokens[0]) is not None]
        if any(token.position >= len(side.ids) or token.id != side.ids[token.position] for token in shown):
            # it was compared with another encoding, such as that behind a template's own system prompt
            return [TokenRow(title, self.sides, self.columns), replace(row, title=f"{title}, the row itself")]
        start, end = (shown[0].position, shown[-1].position + 1) if shown else (0, 0)
        is_labelled = any(token is not None and token.label for column in self.columns for token in column.tokens)
        columns = []
        for column in row.columns[:start]:
            [expected] = column.tokens
            found = expected if is_labelled or expected is None else expected._replace(label="")
            columns.append(column._replace(tokens=(expected, found)))
        # the part may come of an encoding without turns: the whole row knows whose its tokens are
        turn, role = (columns[-1].turn, columns[-1].role) if columns else (None, None)
        for column in self.columns:
            expected, found = column.tokens
            if expected is not None:
                turn, role = row.columns[expected.position].turn, row.columns[expected.position].role
            tokens = expected and side.token(expected.position), found
            columns.append(column._replace(tokens=tokens, turn=turn, role=role))
        if end == len(row.columns):
            return [TokenRow(title, self.sides, tuple(columns))]
        part = TokenRow(f"{title}: tokens 0 to {end - 1} of {len(row.columns)}", self.sides, tuple(columns))
        return [part, TokenRow(f"{title}, behind token {end - 1}", (side.name,), row.columns[end:], end)]

    @property
    def wrong(self) -> int:
        """Number of marked columns."""
        return sum(bool(column.mark) for column in self.columns)

    @property
    def first_wrong(self) -> int | None:
        """Index of the first marked column; None if no column is marked."""
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
        """Yield runs of columns of one turn, all trained or all not, each with the index of its first token."""
        start, trained = 0, False
        keys = []
        for column in self.columns:
            # a missing token starts no run
            trained = next((token.trained for token in column.tokens if token is not None), trained)
            keys.append((column.turn, column.role, trained))
        for _, group in groupby(keys):
            end = start + len(list(group))
            yield self.first + start, list(self.columns[start:end])
            start = end

    def behind(self, tokens: int) -> TokenRow:
        """Return the row without its first tokens, which are shown with another row."""
        title = f"{self.title}, behind the same {tokens:,} tokens"
        return TokenRow(title, self.sides, self.columns[tokens:], self.first + tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, which `from_json` reads."""
        columns = [[[token and list(token) for token in tokens], *rest] for tokens, *rest in self.columns]
        return {"title": self.title, "sides": list(self.sides), "columns": columns, "first": self.first}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenRow:
        """Return the row of the result of `to_json`."""
        columns = (
            Column(tuple(token and ShownToken(*token) for token in tokens), *rest) for tokens, *rest in data["columns"]
        )
        return cls(data["title"], tuple(data["sides"]), tuple(columns), data["first"])


def _compared_columns(diff: TokenDiff, pairs: Iterable[Pair], owner: tuple[int | None, str | None]) -> Iterator[Column]:
    """Yield the column of each pair; a token that is not expected belongs to the owner of the one before it.

    Args:
        diff: The two encodings.
        pairs: The pairs to show.
        owner: Turn and role of the tokens before the first expected one.
    """
    owners = diff.expected.owners()
    for pair in pairs:
        want, have = pair
        owner = owner if want is None else owners[want]
        left = None if want is None else diff.expected.token(want)
        right = None if have is None else diff.found.token(have)
        yield Column((left, right), diff.mark(pair), *owner)
