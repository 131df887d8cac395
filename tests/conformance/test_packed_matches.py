"""Which stretch of a packed sequence is which of its conversations: the choice, and how the work grows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.packing import (
    cut_at_starts,
    match_conversations,
    number_faults,
    order_faults,
)

A, B, C = ((1, number, 2) for number in (10, 11, 12))


def matches(found: Sequence[Ids], expected: Sequence[Ids]) -> dict[int, int | None]:
    """The number of the stretch of each conversation; None if it is not there."""
    starts = [0, *accumulate(map(len, found))]
    stretches = list(pairwise(starts))
    ids = tuple(token for part in found for token in part)
    made = match_conversations(ids, stretches, expected)
    assert sorted(match.listed for match in made if match.listed is not None) == list(range(len(expected)))
    given = [match.stretch for match in made if match.stretch is not None]
    assert sorted(given) == stretches
    return {
        match.listed: None if match.stretch is None else stretches.index(match.stretch)
        for match in made
        if match.listed is not None
    }


@pytest.mark.parametrize(
    ("found", "expected", "wanted"),
    [
        ([A, B, C], [A, B, C], {0: 0, 1: 1, 2: 2}),
        # lost ones: the equal ones behind them stay in order
        ([B, A], [A, B, A], {0: None, 1: 0, 2: 1}),
        ([A, B], [A, B, A], {0: 0, 1: 1, 2: None}),
        ([A, A, B], [A, A, A, B], {0: None, 1: 0, 2: 1, 3: 2}),
        ([C, A, B], [A, B, C], {0: 1, 1: 2, 2: 0}),
        # a fault within: its beginning or its end is the conversation's
        ([(1, 10, 10, 2), B, (1, 3, 12, 2)], [A, B, C], {0: 0, 1: 1, 2: 2}),
        ([(9, 9, 12, 2), (1, 10, 9, 9)], [A, C], {0: 1, 1: 0}),
        ([A, C], [A], {0: 0}),
    ],
)
def test_equal_ones_are_matched_in_order_and_the_others_by_their_ends(
    found: list[Ids], expected: list[Ids], wanted: dict[int, int | None]
) -> None:
    assert matches(found, expected) == wanted


def test_lost_conversations_leave_the_others_in_order() -> None:
    drawn = random.Random(0)
    for _ in range(200):
        expected = [(1, drawn.randrange(12), 2) for _ in range(30)]
        lost = set(drawn.sample(range(30), 3))
        found = [row for n, row in enumerate(expected) if n not in lost]
        pairs = {listed: n for listed, n in matches(found, expected).items() if n is not None}
        assert all(found[n] == expected[listed] for listed, n in pairs.items())
        assert list(pairs.values()) == sorted(pairs.values())


@pytest.mark.parametrize("is_fault_in_front", [False, True])
def test_many_conversations_with_faults_are_each_matched_by_the_sound_end(is_fault_in_front: bool) -> None:
    drawn = random.Random(1)
    expected = [(1, *([100 + n] * 6), 50, *([300 + n] * 6), 2) for n in range(40)]
    order = drawn.sample(range(40), 40)
    found = []
    for n in order:
        row = list(expected[n])
        row[slice(0, 5) if is_fault_in_front else slice(-5, None)] = [9] * 5
        found.append(tuple(row))
    assert matches(found, expected) == {n: order.index(n) for n in range(40)}


def test_a_long_list_of_lost_conversations_is_cut_off() -> None:
    [fault] = order_faults(match_conversations(A, [(0, 3)], [A, *[(1, n, 2) for n in range(20, 60)]]), 41)
    assert fault.rule == "ML515"
    assert "20, and 20 more] of 41" in fault.found


class Token(int):
    """An id that counts how often it is compared and hashed."""

    work: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        Token.work += 1
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        Token.work += 1
        return int(self) < int(other)

    def __hash__(self) -> int:
        Token.work += 1
        return hash(int(self))


def conversations(count: int, *, shift: int = 0) -> list[Ids]:
    return [(Token(1), Token(100 + n), Token(5000 + shift + n), Token(2)) for n in range(count)]


def swapped(rows: list[Ids]) -> list[Ids]:
    return [row for pair in zip(rows[1::2], rows[::2], strict=True) for row in pair]


@pytest.mark.parametrize("kind", ["equal", "swapped", "reversed", "repeated", "faulty", "strange"])
def test_the_work_grows_with_the_number_of_conversations(kind: str) -> None:
    work = []
    for count in (200, 800):
        expected, found = conversations(count), conversations(count)
        if kind == "repeated":
            expected, found = ([(Token(1), Token(7), Token(2))] * count for _ in range(2))
        elif kind == "strange":
            found = [tuple(Token(token + 20_000) for token in row) for row in found]
        elif kind != "equal":
            found = {"swapped": swapped, "reversed": lambda rows: rows[::-1]}.get(
                kind, lambda rows: conversations(len(rows), shift=9000)
            )(found)
        Token.work = 0
        matches(found, expected)
        work.append(Token.work)
    # four times as many conversations: sixteen times the work if each were compared with each
    assert work[1] < 7 * work[0]


@pytest.mark.parametrize(
    ("ids", "positions", "starts"),
    [
        # 1 is BOS, 2 is EOS, and 3 is [INST]
        ((1, 3, 50, 4, 60, 2, 1, 3, 51, 4, 61, 2), None, [0, 6]),
        # without EOS before it, [INST] behind it shows a beginning; so does EOS before it without [INST]
        ((1, 3, 50, 4, 60, 1, 3, 51, 4, 61, 2), None, [0, 5]),
        ((1, 3, 50, 4, 60, 2, 1, 51, 4, 61, 2), None, [0, 6]),
        # neither: text became a control token
        ((1, 3, 50, 1, 51, 4, 61, 2), None, [0]),
        ((1, 3, 50, 4, 60, 1), None, [0]),
        # BOS twice is one beginning
        ((1, 1, 3, 50, 4, 60, 2, 1, 1, 3, 51, 4, 61, 2), None, [0, 7]),
        # positions count only if there is no BOS
        ((3, 50, 4, 60, 2, 3, 51, 4, 61, 2), (0, 1, 2, 3, 4, 0, 1, 2, 3, 4), [0, 5]),
        ((1, 3, 50, 4, 60, 2, 3, 51, 4, 61), (0, 1, 2, 3, 4, 0, 1, 2, 3, 4), [0]),
        ((3, 50, 4, 60, 2, 3, 51, 4, 61, 2), None, [0]),
    ],
)
def test_an_unknown_sequence_is_cut_where_conversations_begin(
    ids: Ids, positions: Ids | None, starts: list[int]
) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    assert (oracle.bos_id, oracle.eos_id, oracle.control_ids["[INST]"]) == (1, 2, 3)
    assert cut_at_starts(ids, positions, oracle) == list(pairwise([*starts, len(ids)]))


@pytest.mark.parametrize(
    ("numbers", "of_mask", "of_column"),
    [
        ((1, 1, 1, 2, 2), [], []),
        ((1, 1, 1, 1, 1), ["share the number 1"], ["share the number 1"]),
        ((1, 1, 2, 2, 2), ["1 and 2, cut at token 2", "share the number 2"], ["1 and 2, cut at token 2", "share the"]),
        # a mask counts up, and a column need not
        ((2, 2, 2, 1, 1), ["the number 1, after 2"], []),
        # 0 is a token of no conversation
        ((1, 0, 1, 2, 0), [], []),
        ((0, 0, 0, 0, 0), [], []),
    ],
)
def test_each_conversation_has_a_number_of_its_own(numbers: Ids, of_mask: list[str], of_column: list[str]) -> None:
    for key, wanted in (("", of_mask), ("seq_idx", of_column)):
        found = [fault.found for fault in number_faults([(0, 3), (3, 5)], numbers, key=key)]
        assert len(found) == len(wanted)
        assert all(words in text for words, text in zip(wanted, found, strict=True))
