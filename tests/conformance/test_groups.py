"""Findings by cause, and two encodings side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.difference import Block, least_changes, units_shape, visible
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.versions import version_facts
from pytest_mistral_lora.conformance.alignment import Alignment
from pytest_mistral_lora.conformance.finding import Finding, rest_of_findings
from pytest_mistral_lora.conformance.groups import MOST_CAUSES, MOST_NAMES, FindingGroups, group_findings, listed_names
from pytest_mistral_lora.records.goldens import packaged_cases

Sides = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


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
    assert {Alignment(row, change(row), oracle.piece).shape() for row in rows} == {shape}


def test_two_faults_have_two_shapes(rows: list[Sides], oracle: Oracle) -> None:
    shapes = [Alignment(rows[0], change(rows[0]), oracle.piece).shape() for change in (_trained, _second_bos)]
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

    blocks = least_changes(want, have)
    assert [item for _, i, i_end, _, _ in blocks for item in want[i:i_end]] == want
    assert [item for _, _, _, j, j_end in blocks for item in have[j:j_end]] == have
    assert all((code == "equal") == (want[i:i_end] == have[j:j_end]) for code, i, i_end, j, j_end in blocks)
    assert all((one[0] == "equal") != (other[0] == "equal") for one, other in pairwise(blocks))
    assert changes(blocks) <= changes(SequenceMatcher(None, want, have, autojunk=False).get_opcodes())


def test_a_token_that_is_missing_in_each_turn_is_found_in_each_turn() -> None:
    turn = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "</s>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    missing = [token for token in turn if token != "[CALL_ID]"]
    changed = [(code, i_end - i) for code, i, i_end, _, _ in least_changes(turn * 2, missing * 2) if code != "equal"]
    assert changed == [("delete", 1)] * 2


@given(ids, ids)
def test_every_token_stands_in_its_column_once_and_in_order(want: list[int], have: list[int]) -> None:
    pairs = list(Alignment((want, None), (have, None), str).pairs())
    assert [i for i, _ in pairs if i is not None] == list(range(len(want)))
    assert [j for _, j in pairs if j is not None] == list(range(len(have)))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12), st.data())
def test_rows_are_shown_and_have_a_shape_exactly_if_they_differ(want: list[tuple[int, bool]], data: Any) -> None:
    have = data.draw(st.one_of(st.just(want), st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12)))
    sides = [([token for token, _ in side], [token if on else -100 for token, on in side]) for side in (want, have)]
    alignment = Alignment(sides[0], sides[1], lambda token: ("<s>", "[INST]", "▁a", "b", " ", "\n", "</s>")[token])
    assert bool(alignment.table()) == bool(alignment.shape()) == (sides[0] != sides[1])


def test_a_long_row_is_aligned_in_bounded_time_and_lines(oracle: Oracle) -> None:
    want = list(range(1000, 60_000))
    for have in (want[:50] + want[60:], list(reversed(want)), want[:3] + [7] * 50_000):
        assert len(Alignment((want, None), (have, None), oracle.piece).table().splitlines()) <= 32


def test_the_simplest_row_stands_for_its_cause() -> None:
    causes = FindingGroups()
    for name, messages in (("a", 4), ("b", 2), ("c", 6)):
        row = '{"role": 1}' * messages
        causes.add(
            Finding("ML547", f"{messages} tokens", f"rows.jsonl:{messages}", row=row, shape="s"), f"t::mask::{name}"
        )
    [cause] = causes
    assert (cause.check, cause.count) == ("t::mask::b", 3)
    assert cause.text(80).splitlines()[-1] == "and 2 more like it: t::mask: a, c"


def test_findings_without_tokens_are_told_apart_by_their_file_and_their_words() -> None:
    causes = FindingGroups()
    for file, line, found in (
        ("a.jsonl", 1, "'bot'"),
        ("a.jsonl", 9, "'bot'"),
        ("b.jsonl", 1, "'bot'"),
        ("a.jsonl", 1, "5"),
    ):
        causes.add(Finding("ML601", found, f"{file}:{line}, messages[{line}].role"), "check")
    assert [cause.count for cause in causes] == [2, 1, 1]


def test_notes_come_after_errors() -> None:
    causes = FindingGroups()
    for rule in ("ML227", "ML004"):
        causes.add(Finding(rule, "found"), "check")
    assert [cause.simplest.rule for cause in causes] == ["ML004", "ML227"]


def test_findings_that_are_only_counted_are_counted_with_their_rule() -> None:
    causes = FindingGroups()
    causes.add(Finding("ML547", "a", "rows.jsonl:1"), "check", "rows.jsonl:1")
    causes.add(rest_of_findings("ML547", 40), "check")
    [cause] = causes
    assert cause.count == 41
    assert cause.text(80).splitlines()[-1] == "and 40 more like it: 40 that are only counted"


def test_a_file_of_any_length_keeps_a_bounded_number_of_findings() -> None:
    causes = FindingGroups()
    for number in range(3 * MOST_NAMES):
        causes.add(Finding("ML547", "x", shape="the same"), "check", f"rows.jsonl:{number}")
        causes.add(Finding("ML534", "x", shape=str(number)), "check", f"rows.jsonl:{number}")
    same, *others = causes
    assert (same.count, len(same.others)) == (3 * MOST_NAMES, MOST_NAMES)
    assert len(others) == MOST_CAUSES
    assert sum(one.count for one in others) == 3 * MOST_NAMES


def test_names_are_listed_in_short() -> None:
    rows = [f"rows.jsonl:{number}, messages[1].role" for number in (3, 1, 2, 7)]
    assert listed_names(["t::mask::b", *rows, "t::mask::a"]) == ["t::mask: a, b", "rows.jsonl:1-3, 7"]
    assert listed_names([f"t::mask::{n:03}x" for n in range(400)])[1:] == ["… and 233 more"]
    assert listed_names([f"rows.jsonl:{n}" for n in range(0, 2000, 2)])[1:] == ["… and 789 more"]


def test_one_fault_in_each_tensor_is_one_cause() -> None:
    names = [f"model.layers.{n}.self_attn.{kind}_proj.lora_B.weight" for n in range(32) for kind in "qkvo"]
    found = [Finding("ML403", f"{name} is zero: this layer learned nothing", "lora-out/x") for name in names]
    record = {"nodeid": "mistral-golden::lora-out::adapter::x", "findings": [one.to_json() for one in found]}
    [cause] = group_findings([record])
    assert cause.count == 128
    assert "model.layers.0.self_attn.o_proj.lora_B.weight" in cause.text(120)
    assert "… and 1" in cause.text(120)


def test_texts_of_rows_are_not_part_of_a_cause_and_keys_of_a_file_are() -> None:
    rows = [Finding("ML624", f"the text has '{text}' as letters", f"rows.jsonl:{text}, x") for text in ("1", "2")]
    keys = [Finding("ML409", f"target_modules has '{key}'", "adapter_config.json") for key in ("kproj", "vproj")]
    assert len({one.cause for one in rows}) == 1
    assert len({one.cause for one in keys}) == 2
