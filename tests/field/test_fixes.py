"""Fixes in the words of the trainers: what `audit` prints of an unknown trainer, and the guard of a known one."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import RULES, Finding, in_words, with_paths
from pytest_mistral_lora.guarding.forms import fixes_of
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners import TRAINERS, find_runner

FILE = shipped_tokenizer("spm-v3")
SCHEMA = Draft202012Validator(
    json.loads(files("pytest_mistral_lora.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
)


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    oracle = Oracle(FILE)
    result = []
    for number in range(8):
        question = {"role": "user", "content": f"Is it {number}?"}
        row = {"messages": [question, {"role": "assistant", "content": f"It is {number}."}]}
        encoded = oracle.encode(row)
        result.append({**row, "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())})
    return result


def _audited(path: Path, lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["check", str(path), "--tokenizer", str(FILE), *options]) == 1
    return capsys.readouterr().out.splitlines()


def test_of_an_unknown_trainer_each_known_one_has_a_line_once_for_a_rule(
    lines: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlearned = [{**line, "labels": [-100] * len(line["labels"])} for line in lines[:2]]
    cut = {**lines[2], "input_ids": lines[2]["input_ids"][:-2], "labels": lines[2]["labels"][:-2]}
    rows = [*unlearned, cut, *({**line, "labels": line["input_ids"]} for line in lines[3:])]
    shown = _audited(tmp_path / "rows.jsonl", rows, capsys)
    at = shown.index(f"  fix:      {RULES['ML543'].fix}")
    fixes = {line.partition(":")[0].strip(): line for line in shown[at + 1 : at + 5]}
    assert [*fixes] == ["TRL", "Axolotl", "LLaMA-Factory", "ms-swift"]
    assert "`train_on_prompt: false`" in fixes["LLaMA-Factory"]
    assert f"--tokenizer {FILE}" in fixes["TRL"]
    assert shown.count(fixes["Axolotl"]) == 1
    data = [json.loads(line) for line in _audited(tmp_path / "rows.jsonl", rows, capsys, "--output-format=jsonl")]
    of_rules = data[-1]["summary"]["fixes"]
    assert {"ML531", "ML543", "ML544"} == of_rules.keys()
    assert of_rules["ML543"]["ms-swift"] == fixes["ms-swift"].partition(": ")[2].strip()
    assert not any("fixes" in finding for finding in data[:-1])


def test_two_causes_of_a_rule_have_the_lines_once(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    one_answer = [{**line, "labels": [-100, *line["input_ids"][1:2], *line["labels"][2:]]} for line in lines[:2]]
    two = [{**line, "labels": [*line["input_ids"][:3], *line["labels"][3:]]} for line in lines[2:]]
    verdict = audit([*one_answer, *two], tokenizer=FILE)
    text = str(verdict)
    assert text.count("\nML547 ") >= 1
    assert text.count(f"  fix:      {RULES['ML547'].fix}") == 2
    assert text.count("  Axolotl:  Set `train_on_inputs: false`") == 1
    assert [bool(finding.fixes) for finding in verdict.findings if finding.rule == "ML547"].count(True) == 1
    verdict.write(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    SCHEMA.validate(report)
    assert [*map(bool, (cause["fixes"] for cause in report["causes"]))].count(True) == 1
    assert str(verdict.write(tmp_path / "report.html").read_text(encoding="utf-8")).count("<dt>Axolotl</dt>") == 1


def test_a_rule_whose_fix_is_enough_has_no_line_of_a_trainer(
    lines: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [{**line, "input_ids": line["input_ids"][1:], "labels": line["labels"][1:]} for line in lines]
    shown = _audited(tmp_path / "rows.jsonl", wrong, capsys)
    assert any(line.startswith("ML521 ") for line in shown)
    assert not any(line.startswith("  TRL:") for line in shown)


def test_a_side_of_a_pair_has_the_settings_of_preferences() -> None:
    row = Place.of("pairs.jsonl", 1)
    finding, other, again = in_words(
        [Finding("ML531", "cut", row / "chosen"), Finding("ML547", "prompt", row), Finding("ML531", "cut", row)], None
    )
    assert dict(finding.fixes)["TRL"] == TRAINERS["trl"].fixes("preferences")["ML531"]
    assert dict(other.fixes)["TRL"] == TRAINERS["trl"].fixes("rows")["ML547"]
    assert again.fixes == ()
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))).fixes == finding.fixes


def test_an_evaluation_is_named_where_it_alone_has_a_setting() -> None:
    [finding] = in_words([Finding("ML580", "no chat")], None)
    assert [name for name, _ in finding.fixes] == [TRAINERS["lm-eval"].title]
    assert "`apply_chat_template: true`" in finding.text()


@pytest.mark.parametrize("rule", [rule.id for rule in RULES.values() if rule.by_program])
def test_each_rule_of_a_setting_is_mended_in_a_known_program(rule: str) -> None:
    assert RULES[rule].program_fixes
    # the general fix stays helpful, and names none of them
    assert len(RULES[rule].fix) > 30
    assert not any(trainer.title.casefold() in RULES[rule].fix.casefold() for trainer in TRAINERS.values())


def test_of_an_unknown_form_a_fix_names_each() -> None:
    fix = fixes_of(TRAINERS["trl"], "")["ML543"]
    assert "rows of messages: set `assistant_only_loss: true`" in fix
    assert "For rendered text: " in fix


def test_rendered_text_is_not_told_the_setting_alone() -> None:
    assert "Give `messages` in its place" in fixes_of(TRAINERS["trl"], "text")["ML543"]
    assert "chat_template_path" in fixes_of(TRAINERS["trl"], "texts")["ML560"]
    assert "Give messages in place of texts" in fixes_of(TRAINERS["trl"], "texts")["ML560"]


def test_other_trainers_keep_their_words() -> None:
    assert fixes_of(TRAINERS["axolotl"], "messages") == TRAINERS["axolotl"].fixes()
    assert fixes_of(TRAINERS["axolotl"], "pairs") == TRAINERS["axolotl"].fixes("preferences")


def test_annotations_have_the_lines(
    lines: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**line, "labels": line["input_ids"]} for line in lines]
    [annotation, *_] = _audited(tmp_path / "rows.jsonl", rows, capsys, "--output-format", "github")
    assert "%0ALLaMA-Factory: Set `train_on_prompt: false`." in annotation


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fix_is_a_key_or_a_command_and_belongs_to_a_rule_of_rows(name: str) -> None:
    for rule, fix in TRAINERS[name].fixes().items():
        assert RULES[rule].subject in ("encoded", "dataset")
        ways = r"mistral-lora .+|\w+: .+|\"\w+\": .+|content\.rstrip.*|dataset\.remove_columns.*|messages"
        assert re.search(rf"`({ways})`", fix), rule
        assert Finding(rule, "found", fix=fix).text().splitlines()[-1] == f"  fix:      {with_paths(fix)}"
        assert Finding(rule, "found", fix=fix).to_json()["fix"] == with_paths(fix)


def test_a_script_of_one_s_own_has_the_fixes_of_the_rules(tmp_path: Path) -> None:
    (tmp_path / "my_runner.py").touch()
    assert find_runner(str(tmp_path / "my_runner.py")).fixes() == {}
    assert Finding("ML543", "found").to_json()["fix"] == RULES["ML543"].fix
