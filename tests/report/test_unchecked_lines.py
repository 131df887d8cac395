from __future__ import annotations

import pytest
from check_outcomes import outcome_of

from pytest_mistral_lora.report import brief_lines, unchecked_lines
from pytest_mistral_lora.report.lines import line_style


def test_a_reason_is_one_line_with_its_targets_and_its_number() -> None:
    reasons = [("a", "no base"), ("a", "no base"), ("b", "no base"), ("c", ""), ("a", "no oracle")]
    outcomes = [outcome_of(f"{target}::mask::x", not_checked=reason) for target, reason in reasons]
    assert unchecked_lines(outcomes) == ["not checked:", "  a, b: no base (3)", "  a: no oracle (1)"]
    many = [outcome_of(f"{name}::mask::x", not_checked="no base") for name in "abcde"]
    assert unchecked_lines(many)[1:] == ["  a, b, c, and 2 more: no base (5)"]
    assert unchecked_lines([outcome_of("a::mask::x")]) == []


def test_a_green_run_has_a_line_for_each_target_and_one_for_all_reasons() -> None:
    outcomes = [outcome_of("a::mask::x")]
    outcomes += [outcome_of("a::template::x", not_checked=reason) for reason in ("no base", "no oracle")]
    outcomes += [outcome_of(f"{name}::mask::x") for name in "bcde"]
    lines = [
        "a: 1 passed, 2 not checked (mask, template)",
        "b: 1 passed (mask)",
        "c: 1 passed (mask)",
        "2 other targets: 2 passed (-v lists them)",
        "not checked: 2 checks, for 2 reasons: -v lists them",
    ]
    assert brief_lines(outcomes, [], [], []) == lines
    assert brief_lines(outcomes, ["known"], [], []) == [*lines, "known"]
    signs = ["look at these:", "  ML1 a", "  ML2 b", "  ML3 c"]
    assert brief_lines(outcomes, ["known", "known too"], ["from the cache"], signs) == [
        "5 targets: 5 passed, 2 not checked (-v lists them)",
        "not checked: 2 checks, for 2 reasons: -v lists them",
        "known (and 1 more: -v lists them)",
        "from the cache",
        "look at these (1 of 3, -v lists all):",
        "  ML1 a",
    ]


@pytest.mark.parametrize(
    ("line", "style"),
    [
        ("ML601 rows.jsonl:3: 'bot'", "red bold"),
        ("  - lost", "red"),
        ("  + more", "green"),
        ("  >     5  1040", "yellow"),
        ("  fix: rename it", "bold"),
        ("  expected: user", ""),
        (" - lost", ""),
        ("ML60 x", ""),
        ("", ""),
    ],
)
def test_the_parts_of_a_finding_have_colours(line: str, style: str) -> None:
    assert line_style(line) == style
