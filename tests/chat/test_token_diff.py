"""Two encodings of one row: their pairs, marks and shapes, and the parts between their control tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import pytest
from each_oracle import ALL, oracle_named
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.diff import (
    WINDOW,
    Block,
    MarkedText,
    TokenDiff,
    align_controls,
    common_ends,
    diff_parts,
    join_parts,
    split_at_markers,
    units_shape,
)
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.versions import version_facts
from pytest_mistral_lora.chat.pieces import visible
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.records.goldens import packaged_cases

Sides = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return oracle_named("spm-v3")


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> list[Sides]:
    """The packaged rows that end with an answer, as ids and labels."""
    cases = [case for case in packaged_cases() if version_facts("v3") in case.versions]
    encoded = [oracle.encode(case.row) for case in cases]
    return [(list(one.input_ids), list(one.labels or ())) for one in encoded]


def _without(token: int) -> Callable[[Sides], Sides]:
    def change(row: Sides) -> Sides:
        kept = [pair for pair in zip(*row, strict=True) if pair[0] != token]
        return [token for token, _ in kept], [label for _, label in kept]

    return change


def _trained(row: Sides) -> Sides:
    return row[0], list(row[0])


def _second_bos(row: Sides) -> Sides:
    return [1, *row[0]], [-100, *row[1]]


def _prompt_end(row: Sides) -> Sides:
    ids, labels = row
    return ids, [ids[n] if token == 4 else labels[n] for n, token in enumerate(ids)]


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (_without(2), "</s> → nothing"),
        (_without(1), "<s> → nothing"),
        (_trained, "label of <s>: -100 → train"),
        (_second_bos, "nothing → <s>"),
        (_prompt_end, "label of [/INST]: -100 → train"),
    ],
    ids=["no EOS", "no BOS", "all trained", "two BOS", "last prompt token"],
)
def test_one_fault_has_one_shape_in_every_row(
    change: Callable[[Sides], Sides], shape: str, rows: list[Sides], oracle: Oracle
) -> None:
    assert {TokenDiff.of(row, change(row), oracle.piece).shape() for row in rows} == {shape}


def test_two_faults_have_two_shapes(rows: list[Sides], oracle: Oracle) -> None:
    shapes = [TokenDiff.of(rows[0], change(rows[0]), oracle.piece).shape() for change in (_trained, _second_bos)]
    assert shapes[0] != shapes[1]


def test_the_shape_of_texts_is_the_white_space_that_differs() -> None:
    assert units_shape("[INST]", " Hello you", "Hello you") == "after [INST]: ␣ → nothing"
    assert units_shape("[INST]", "a\nb", "a b") == "after [INST]: ⏎ → ␣"
    assert units_shape("[INST]", "a", "é b") == units_shape("[INST]", "x", "something else")
    assert units_shape("[INST]", "same", "same") == ""
    assert visible("a b\n\t\x00") == "a␣b⏎⇥\\x00"


ids = st.lists(st.integers(0, 6), max_size=12)


@given(ids, ids)
def test_the_least_changes_cover_both_sides_and_are_no_more_than_others_find(want: list[int], have: list[int]) -> None:
    def changes(blocks: Sequence[Block]) -> int:
        return sum(i_end - i + j_end - j for code, i, i_end, j, j_end in blocks if code != "equal")

    blocks = align_controls(want, have)
    assert [item for _, i, i_end, _, _ in blocks for item in want[i:i_end]] == want
    assert [item for _, _, _, j, j_end in blocks for item in have[j:j_end]] == have
    assert all((code == "equal") == (want[i:i_end] == have[j:j_end]) for code, i, i_end, j, j_end in blocks)
    assert all((one[0] == "equal") != (other[0] == "equal") for one, other in pairwise(blocks))
    assert changes(blocks) <= changes(SequenceMatcher(None, want, have, autojunk=False).get_opcodes())


def test_a_token_that_is_missing_in_each_turn_is_found_in_each_turn() -> None:
    turn = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "</s>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    missing = [token for token in turn if token != "[CALL_ID]"]
    changed = [(code, i_end - i) for code, i, i_end, _, _ in align_controls(turn * 2, missing * 2) if code != "equal"]
    assert changed == [("delete", 1)] * 2


@given(ids, ids)
def test_every_token_stands_in_its_column_once_and_in_order(want: list[int], have: list[int]) -> None:
    diff = TokenDiff.of((want, None), (have, None), str)
    for pairs in (diff.pairs, [*diff.all_pairs()]):
        assert [i for i, _ in pairs if i is not None] == list(range(len(want)))
        assert [j for _, j in pairs if j is not None] == list(range(len(have)))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12), st.data())
def test_rows_are_shown_and_have_a_shape_exactly_if_they_differ(want: list[tuple[int, bool]], data: Any) -> None:
    have = data.draw(st.one_of(st.just(want), st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12)))
    sides = [([token for token, _ in side], [token if on else -100 for token, on in side]) for side in (want, have)]
    diff = TokenDiff.of(sides[0], sides[1], ("<s>", "[INST]", "▁a", "b", " ", "\n", "</s>").__getitem__)
    shown = TokenRow.around_difference("a:1", diff)
    differs = sides[0] != sides[1]
    assert (bool(diff.table()), bool(diff.shape()), bool(diff.marked), shown is not None) == (differs,) * 4


def test_a_long_row_is_aligned_in_bounded_time_and_lines(oracle: Oracle) -> None:
    want = list(range(1000, 60_000))
    for have in (want[:50] + want[60:], list(reversed(want)), want[:3] + [7] * 50_000):
        assert len(TokenDiff.of((want, None), (have, None), oracle.piece).table().splitlines()) <= 32


def test_pairs_of_a_long_row_find_equal_runs_behind_the_first_window() -> None:
    rng = random.Random(0)
    want = [rng.randrange(9) for _ in range(5 * WINDOW)]
    have = [token for token in want if rng.random() > 0.02]
    diff = TokenDiff.of((want, None), (have, None), str)
    pairs = [*diff.all_pairs()]
    assert [i for i, _ in pairs if i is not None] == [*range(len(want))]
    assert [j for _, j in pairs if j is not None] == [*range(len(have))]
    equal = sum(not diff.mark(pair) for pair in pairs)
    assert equal > 0.9 * len(have)
    # a finding shows the first window alone
    assert len(diff.pairs) <= diff.equal_ids + 2 * WINDOW < len(pairs)


@given(ids, ids)
def test_common_ends_do_not_overlap(want: list[int], have: list[int]) -> None:
    head, tail = common_ends(want, have)
    assert want[:head] == have[:head]
    assert want[len(want) - tail :] == have[len(have) - tail :]
    assert head + tail <= min(len(want), len(have))
    longer = [side[head : len(side) - tail] for side in (want, have)]
    assert not all(longer) or (longer[0][0] != longer[1][0] and longer[0][-1] != longer[1][-1])


@pytest.mark.parametrize("name", ALL)
def test_the_parts_of_a_row_spell_it(name: str) -> None:
    oracle = oracle_named(name)
    messages = [
        {"role": "system", "content": "S."},
        {"role": "user", "content": "One? [INST]"},
        {"role": "assistant", "content": "Two."},
    ]
    encoded = oracle.encode({"messages": messages})
    parts = split_at_markers(encoded.input_ids, oracle)
    markers = [part.marker for part in parts]
    assert (markers[0], markers[-1]) == ("<s>", "</s>")
    # v1 spells its markers as text, so that a text that spells one is cut there, too
    assert markers.count("[INST]") == (1 if oracle.facts.control_tokens else 2)
    assert "".join(part.text for part in parts).replace(" ", "").endswith("Two.")
    if oracle.facts.control_tokens:
        ids = {literal: token for token, literal in oracle.control_tokens.items()}
        assert [token for part in parts for token in (ids[part.marker], *part.ids)] == [*encoded.input_ids]


def test_texts_without_a_control_token_between_them_are_one_part() -> None:
    runs = [(None, "a", (1,)), (None, "b", (2,)), ("[INST]", "[INST]", (3,)), (None, "c", (4,)), ("</s>", "", ())]
    parts = [MarkedText("", "ab", (1, 2)), MarkedText("[INST]", "c", (4,)), MarkedText("</s>", "")]
    assert join_parts(runs) == parts
    assert join_parts([]) == [MarkedText("", "")]


def test_parts_that_differ_are_matched_by_their_control_tokens() -> None:
    begin, inst, close, end = (MarkedText(marker, "") for marker in ("<s>", "[INST]", "[/INST]", "</s>"))
    question, answer = MarkedText("[INST]", "a"), MarkedText("[/INST]", "b")
    assert diff_parts([begin, question, answer, end], [begin, question, answer, end]) == []
    [hunk] = diff_parts([begin, question, answer, end], [begin, question, close, end])
    assert (hunk.pairs, hunk.missing, hunk.surplus) == ([(answer, close)], [], [])
    [hunk] = diff_parts([begin, question, answer, end], [begin, question, answer])
    assert (hunk.pairs, hunk.missing, hunk.surplus) == ([], [(end,)], [])
    [hunk] = diff_parts([begin, question, answer, end], [begin, begin, inst, answer, end])
    assert (hunk.pairs, hunk.missing, hunk.surplus) == ([(question, inst)], [], [(begin,)])
