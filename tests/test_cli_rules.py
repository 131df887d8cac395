from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import RULES


def test_rules_are_listed_a_line_each(capsys: Any) -> None:
    assert main(["rules"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RULES)


def test_a_rule_is_explained(capsys: Any) -> None:
    assert main(["rules", "ml204"]) == 0
    out = capsys.readouterr().out
    rule = RULES["ML204"]
    example = rule.example
    for text in (rule.title, rule.why, rule.fix, rule.source, example.fault, example.command, example.sound):
        assert text in out
    for line in (*example.excerpt.splitlines(), *example.report.splitlines()):
        assert line in out


def test_the_example_of_a_row_shows_its_tokens(capsys: Any) -> None:
    assert main(["rules", "ML546"]) == 0
    out = capsys.readouterr().out
    assert '"content": "Blue."' in out
    assert [line.split() for line in out.splitlines() if line.strip().startswith(">")] == [
        [">", "11", "2", "</s>", "train", "11", "2", "</s>", "-100"]
    ]
    assert "$ mistral-lora check encoded.jsonl" in out


def test_rules_as_json(capsys: Any) -> None:
    assert main(["rules", "ML204", "--json"]) == 0
    [rule] = json.loads(capsys.readouterr().out)
    assert (rule["id"], rule["subject"], rule["severity"]) == ("ML204", "tokenizer", "error")
    assert rule["example"]["finding"].startswith("ML204 ")


@pytest.mark.parametrize("name", ["ML999", "ML0000601", "ML\u0666\u0660\u0661", f"ML{'9' * 5000}", "99", ""])
def test_what_is_no_rule_is_bad_usage(name: str, capsys: Any) -> None:
    assert main(["rules", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: there is no rule '{name}'")
    assert "mistral-lora rules" in error


def test_rules_are_found_by_the_words_of_a_symptom(capsys: Any) -> None:
    assert main(["rules", "--search", "Trailing SPACES", "--json"]) == 0
    assert [rule["id"] for rule in json.loads(capsys.readouterr().out)] == ["ML529"]
    # in any form, and the rules that have the words in their title come first
    assert main(["rules", "--search", "masked eos"]) == 0
    assert "ML546" in capsys.readouterr().out
    assert main(["rules", "--search", "trained paddings"]) == 0
    assert capsys.readouterr().out.startswith("ML510")
    # the beginning of a word is enough, its end is not
    assert main(["rules", "--search", "pad"]) == 0
    assert "ML510" in capsys.readouterr().out
    assert main(["rules", "--search", "ddings"]) == 2
    assert "no rule has all of the words 'ddings'" in capsys.readouterr().err
