"""The example of a rule breaks it, and no other rule than it names; it is recorded as it is made today."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from gallery import examples
from rule_examples import make_example

from pytest_mistral_lora.conformance.finding import RULES, Rule

pytestmark = pytest.mark.gallery
QUICK = ("template", "mask", "dataset", "encoded")
"""Subjects whose examples need no training and no folder of a checkpoint."""


def without_versions(text: str) -> str:
    return re.sub(r"\d+(\.\d+)+", "0.0", text)


def without_numbers_and_texts(text: str) -> str:
    # The numbers and the generated texts of a trained model depend on the processor.
    return re.sub(r"'[^']*'|\[[\d, ]+\]|\b[0-9a-f]{64}\b|\b[0-9a-f]{40}\b|-?\d[\d.,e+-]*", "0", text)


def check_recorded(rule: Rule, folder: Path, comparable: Callable[[str], str]) -> None:
    made = make_example(rule.subject, rule.id, folder)
    assert made.fired == examples(rule.subject)[rule.id].fires
    recorded = rule.example
    assert comparable(recorded.finding) == comparable(made.finding)
    assert recorded.row == made.row
    assert recorded.table == made.table


@pytest.mark.skipif(version("transformers") < "5", reason="the examples show the newest libraries")
@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.subject in QUICK], ids=lambda rule: rule.id)
def test_an_example_of_rows_is_the_one_that_is_made_today(rule: Rule, tmp_path: Path) -> None:
    check_recorded(rule, tmp_path, without_versions)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.subject not in QUICK], ids=lambda rule: rule.id
)
def test_an_example_of_files_is_the_one_that_is_made_today(rule: Rule, tmp_path: Path) -> None:
    check_recorded(rule, tmp_path, without_numbers_and_texts)
