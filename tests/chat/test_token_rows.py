from __future__ import annotations

import json

import pytest

from pytest_mistral_lora.chat.diff import TokenDiff, TokenSide
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.token_rows import TokenRow, Wrong

ROW = {
    "messages": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "Rome.\nIt is old."},
    ]
}
PIECES = ("<s>", "[INST]", "▁a", "b", "c", "</s>")


def side(*ids: int, labels: list[int] | None = None) -> TokenSide:
    return TokenSide("side", ids, labels, PIECES.__getitem__)


def test_every_token_is_shown_once_with_its_owner(oracle: Oracle) -> None:
    encoded = oracle.encode(ROW)
    row = TokenRow.single("rows.jsonl:1", TokenSide.of("mistral-common", encoded, oracle.piece))
    tokens = [one for column in row.columns for one in column.tokens if one is not None]
    assert [(one.position, one.id) for one in tokens] == [*enumerate(encoded.input_ids)]
    assert [one.trained for one in tokens] == [label != IGNORE_INDEX for label in encoded.labels or ()]
    owners = [(column.turn, column.role) for column in row.columns]
    assert owners == [(span.turn, span.role) for span in encoded.spans for _ in range(span.start, span.end)]
    parts = [(start, columns[0].role, len(columns)) for start, columns in row.parts()]
    assert [role for _, role, _ in parts] == [None, "user", "assistant", "user", "assistant"]
    assert [start for start, _, _ in parts] == [sum(part[2] for part in parts[:n]) for n in range(5)]
    assert (row.wrong, row.first_wrong) == (0, None)
    assert row.counts() == [("mistral-common", len(tokens), encoded.supervised_tokens)]


def test_wrong_tokens_are_marked_and_a_missing_one_stands_at_the_end() -> None:
    row = TokenRow.single("a:1", side(0, 1, 2, labels=[-100, -100, 2]), [Wrong(1, "b"), Wrong(3, "</s>", "nothing")])
    assert [column.mark for column in row.columns] == ["", ">", "", "-"]
    assert (row.columns[1].expected, row.columns[3].found, row.columns[3].tokens) == ("b", "nothing", (None,))
    assert (row.wrong, row.first_wrong) == (2, 1)
    # the missing token belongs to the trained part that it should have ended
    assert [start for start, _ in row.parts()] == [0, 2]


@pytest.mark.parametrize(
    ("expected", "found", "marks"),
    [
        (side(0, 2, 5), side(0, 2, 5), ["", "", ""]),
        (side(0, 2, 5), side(0, 5), ["", "-", ""]),
        (side(0, 5), side(0, 2, 5), ["", "+", ""]),
        (side(0, 2, 5), side(0, 3, 5), ["", ">", ""]),
        (side(0, 5, labels=[-100, 5]), side(0, 5, labels=[-100, -100]), ["", ">"]),
        (side(0, 5, labels=[-100, 5]), side(0, 5, labels=[-100, 2]), ["", ">"]),
        (side(0, 5, labels=[-100, 5]), side(0, 5), ["", ""]),
        (side(), side(0), ["+"]),
    ],
)
def test_each_kind_of_difference_has_its_mark(expected: TokenSide, found: TokenSide, marks: list[str]) -> None:
    assert [column.mark for column in TokenRow.compared("a:1", TokenDiff(expected, found)).columns] == marks


def test_two_vocabularies_are_compared_by_text() -> None:
    other = ("x", "</s>", "b", " a", "[INST]", "<s>")
    found = TokenSide("other", (5, 4, 3, 0), None, other.__getitem__)
    row = TokenRow.compared("a:1", TokenDiff(side(0, 1, 2, 3), found, same_vocabulary=False))
    assert [column.mark for column in row.columns] == ["", "", "", ">"]


def test_a_row_survives_json(oracle: Oracle) -> None:
    encoded = TokenSide.of("a", oracle.encode(ROW), oracle.piece)
    other = TokenSide.of("b", oracle.encode({"messages": ROW["messages"][:2]}), oracle.piece)
    for row in (TokenRow.single("r", encoded, [Wrong(2, "x")]), TokenRow.compared("r", TokenDiff(encoded, other))):
        assert TokenRow.from_json(json.loads(json.dumps(row.to_json()))) == row
