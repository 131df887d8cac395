from __future__ import annotations

from pytest_mistral_lora.report import unchecked_lines


def test_a_reason_is_one_line_with_its_targets_and_its_number() -> None:
    reasons = [("a", "no base"), ("a", "no base"), ("b", "no base"), ("c", ""), ("a", "no oracle")]
    records = [{"target": target, "not_checked": reason} for target, reason in reasons]
    assert unchecked_lines(records) == ["not checked:", "  a, b: no base (3)", "  a: no oracle (1)"]
    many = [{"target": name, "not_checked": "no base"} for name in "abcde"]
    assert unchecked_lines(many)[1:] == ["  a, b, c, and 2 more: no base (5)"]
    assert unchecked_lines([{"target": "a", "not_checked": ""}]) == []
