from __future__ import annotations

import json

import pytest

from pytest_mistral_lora.chat.diff import TokenDiff, TokenSide
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.report.tokens import owner

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


def ids_of(row: TokenRow, side: int) -> list[int | None]:
    return [None if (token := column.tokens[side]) is None else token.id for column in row.columns]


@pytest.mark.parametrize("is_labelled", [False, True])
@pytest.mark.parametrize("place", [0, 40, 199])
def test_the_surroundings_of_a_difference_are_the_whole_row(place: int, is_labelled: bool) -> None:
    ids = [2 + number % 3 for number in range(200)]
    whole = side(*ids, labels=[*[IGNORE_INDEX] * 100, *ids[100:]])
    wrong = [*ids[:place], 0, *ids[place:]]
    found = side(*wrong, labels=[*[IGNORE_INDEX] * 100, *wrong[100:]] if is_labelled else None)
    part = TokenRow.around_difference("a:1", TokenDiff(whole if is_labelled else side(*ids), found))
    assert part is not None
    first, *rest = part.with_surroundings("a:1", whole)
    assert first.columns[first.first_wrong or 0].tokens[1] == part.columns[part.first_wrong or 0].tokens[1]
    assert first.wrong == part.wrong
    # each expected token once, with the label that it has in the whole row
    expected = [token for row in (first, *rest) for column in row.columns if (token := column.tokens[0])]
    assert expected == [whole.token(number) for number in range(200)]
    judged = [token for column in first.columns if (token := column.tokens[1])]
    # what is not compared is not reported as trained on
    assert judged == [found.token(number) for number in range(len(judged))]
    assert [(row.sides, row.first + len(row.columns)) for row in rest] == [(("side",), 200)] * (place < 199)


def test_a_part_without_turns_gets_those_of_its_row(oracle: Oracle) -> None:
    encoded = oracle.encode(ROW)
    whole = TokenSide.of("mistral-common", encoded, oracle.piece)
    # an audit compares ids and labels, and its part knows no turns
    ids, labels = encoded.input_ids, encoded.labels
    masked = [*(labels or ())[:-1], IGNORE_INDEX]
    sides = (TokenSide("side", ids, given, oracle.piece) for given in (labels, masked))
    part = TokenRow.around_difference("a:1", TokenDiff(*sides))
    assert part is not None
    [row] = part.with_surroundings("a:1", whole)
    assert [owner(columns) for _, columns in row.parts()][-2:] == [
        "turn 2: user, not trained on",
        "turn 3: assistant, trained on",
    ]
    # alone, the labels tell the answer from its prompt
    assert [owner(columns) for _, columns in part.parts()][-1] == "answer, trained on"


def test_a_part_of_another_encoding_stands_apart() -> None:
    part = TokenRow.around_difference("a:1", TokenDiff(side(0, 1, 2, 5), side(0, 1, 3, 5)))
    assert part is not None
    # with a system prompt of the template's own, which the row does not have
    both = part.with_surroundings("rule a:1", side(0, 2, 5, labels=[-100, 2, 5]))
    assert [(row.title, row.sides, len(row.columns)) for row in both] == [
        ("rule a:1", ("side", "side"), 4),
        ("rule a:1, the row itself", ("side",), 3),
    ]


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
    for row in (TokenRow.single("r", encoded), TokenRow.compared("r", TokenDiff(encoded, other))):
        assert TokenRow.from_json(json.loads(json.dumps(row.to_json()))) == row
