from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
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


def search(words: str, capsys: Any) -> list[str]:
    """Return the ids of the rules that a search lists, in their order."""
    assert main(["rules", "--search", words, "--json"]) == 0
    return [rule["id"] for rule in json.loads(capsys.readouterr().out)]


# what people ask, written before the symptoms of the rules; each with the rules that answer it
_QUESTIONS = {
    "model never stops": ["ML546"],
    "keeps generating until max tokens": ["ML546", "ML522", "ML204", "ML240"],
    "last turn": ["ML508"],
    "unsloth": ["ML326"],
    "garbage output": ["ML902", "ML205", "ML214", "ML440", "ML211"],
    "wrong prompt format": ["ML004", "ML902", "ML603", "ML442"],
    "loss is nan": ["ML322"],
    "loss stuck at zero": ["ML544", "ML605"],
    "adapter has no effect": ["ML413", "ML403"],
    "ollama output differs": ["ML934"],
    "double bos": ["ML105", "ML226", "ML521"],
    "tool call printed as plain text": ["ML548", "ML524", "ML530"],
    "eval rows leaked into training": ["ML610", "ML632"],
    "mojibake": ["ML617", "ML636"],
    "pad equals eos": ["ML204"],
    "answers are cut off": ["ML531", "ML664", "ML669"],
    "system message ignored": ["ML525"],
    "lora alpha scaling wrong": ["ML325", "ML428", "ML434", "ML914"],
    "tokenizer from a different revision": ["ML212", "ML211", "ML705"],
    "packing leaks between samples": ["ML313", "ML512", "ML513"],
    "missing space after [INST]": ["ML528"],
}


@pytest.mark.of_field
@pytest.mark.parametrize("question", _QUESTIONS)
def test_a_question_finds_a_rule_that_answers_it_first(question: str, capsys: Any) -> None:
    assert search(question, capsys)[0] in _QUESTIONS[question]


def _symptoms_of_page() -> list[tuple[str, list[str]]]:
    page = (Path(__file__).parent.parent / "docs" / "symptoms.md").read_text("utf-8")
    table = page[page.index("| you see |") : page.index("## By trainer")].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table if line]
    return [(seen.strip("| "), re.findall(r"\[(ML\d+)\]", rules)) for seen, _, rules, *_ in cells]


@pytest.mark.of_field
@pytest.mark.parametrize(("seen", "rules"), _symptoms_of_page())
def test_a_symptom_of_the_page_finds_a_rule_of_its_line_first(seen: str, rules: list[str], capsys: Any) -> None:
    assert search(seen, capsys)[0] in rules


def test_words_are_found_in_any_form(capsys: Any) -> None:
    assert search("Trailing SPACES", capsys)[0] == "ML529"
    assert search("trained paddings", capsys)[0] == "ML510"
    assert search("pad eos", capsys) == search("PADDING eos", capsys)


def test_a_search_lists_the_rules_that_fit_best(capsys: Any) -> None:
    assert main(["rules", "--search", "the model"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 10
    assert "more rules have one of these words" in err
    assert len(search("the model", capsys)) > 10


@pytest.mark.parametrize("words", ["zzzz", "(", '"'])
def test_words_that_no_rule_has_are_refused(words: str, capsys: Any) -> None:
    assert main(["rules", "--search", words]) == 2
    assert f"no rule has a word of {words!r}" in capsys.readouterr().err


def test_a_new_rule_is_found_by_its_own_words(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    new = replace(RULES["ML204"], id="ML299", symptoms=("the giraffe is upside down",))
    monkeypatch.setattr("pytest_mistral_lora.conformance.finding.RULES", {**RULES, "ML299": new})
    assert search("upside-down giraffes", capsys)[0] == "ML299"
