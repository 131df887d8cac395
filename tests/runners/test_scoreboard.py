"""The scoreboard: its pages are what its script writes, and every fault that we know of is found under its class."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import scoreboard_layers

from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.runners import RUNNERS, runner_fixes

ROOT = Path(__file__).parents[2]

KNOWN = [
    ("trl", "spm-v3", "single", "ML543", "everything is trained on by default"),
    ("trl", "spm-v3", "hostile-user", "ML523", "what a user writes becomes control tokens"),
    ("trl", "spm-v3", "tool-round-trip", "ML530", "a tool's JSON result is written as a string"),
    ("trl", "spm-v3", "trailing-spaces", "ML529", "spaces after an answer are kept"),
    ("llamafactory-openai", "spm-v3", "single", "ML527", "a system prompt of its own is put in"),
    ("llamafactory", "spm-v3", "system-multi-turn", "ML526", "the system prompt stands in the first turn"),
    ("llamafactory", "spm-v3", "tool-call", "ML530", "tools and calls have another form"),
    ("llamafactory", "spm-v3", "hostile-user", "ML523", "what a user writes becomes control tokens"),
    ("llamafactory", "spm-v3", "consecutive-users", "ML502", "a row is left out without an error"),
    ("axolotl-v2v3", "spm-v3", "system", "ML525", "the system prompt is left out"),
    ("axolotl-v2v3", "spm-v3", "leading-spaces", "ML529", "answers are trimmed"),
    ("axolotl", "spm-v3", "digits", "ML545", "the first token of an answer is masked"),
    ("axolotl", "spm-v3", "hostile-user", "ML523", "what a user writes becomes control tokens"),
    ("llamafactory-own-template", "spm-v7", "multi-turn", "ML521", "a BOS stands in front of every turn"),
    ("trl", "spm-v7", "empty-system", "ML528", "an empty system prompt is a space"),
    ("axolotl-mistral-common", "tekken-240911-hub", "system-multi-turn", "ML550", "labels are on the wrong tokens"),
    ("axolotl", "derived-v15", "thinking", "ML533", "thinking is left out"),
    ("axolotl", "derived-v15", "effort-high", "ML534", "a row's reasoning_effort is left out"),
    ("axolotl-mistral-common", "derived-v13-hub", "text-chunks", "ML529", "its mistral-common joins chunks by nothing"),
    ("llamafactory-own-template", "derived-v15", "multi-turn", "ML533", "the settings stand before every turn"),
    ("ms-swift", "spm-v3", "single", "ML527", "a system prompt of Llama 2 is put in"),
    ("ms-swift", "spm-v3", "multi-turn", "ML521", "a BOS stands in front of every turn"),
    ("ms-swift", "spm-v3", "tool-call", "ML502", "rows with tools are left out without an error"),
    ("ms-swift-nemo", "spm-v3", "single", "ML527", "the name of a placeholder, {{SYSTEM}}, is trained on"),
    ("ms-swift-nemo", "derived-v15", "single", "ML533", "the settings are left out"),
    ("llamafactory-openai", "derived-v11", "single", "ML527", "a system prompt of its own is put in"),
    ("llamafactory-own-template", "derived-v13-hub", "multi-turn", "ML521", "a BOS stands in front of every turn"),
    ("axolotl-v2v3", "derived-v11", "system", "ML525", "the system prompt is left out"),
]
EXACT = [
    ("llamafactory", "tools-unused", {"ML530"}),
    ("llamafactory", "repeated-text", {"ML526"}),
    ("llamafactory-openai", "system", {"ML527"}),
    ("axolotl-v2v3", "code-answer", {"ML529"}),
]
REFUSED = [
    ("trl-assistant-only", "spm-v3", "training-compatible"),
    ("trl", "tekken-240911-hub", "Expected last role User or Tool"),
    ("trl-assistant-only", "tekken-240911-hub", "expected string or bytes-like object, got 'NoneType'"),
    ("axolotl-v2v3", "derived-v13-hub", "Expected last role User or Tool"),
    ("axolotl-mistral-common", "derived-v11", "No tokenizer file found"),
    ("llamafactory-own-template", "spm-v3", "A placeholder is required in the string formatter"),
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import write_scoreboard
    return write_scoreboard


def test_the_pages_are_what_the_script_writes(script: ModuleType) -> None:
    assert {
        page for page, text in script.pages().items() if (script.PAGES / page).read_text(encoding="utf-8") != text
    } == set()


@pytest.mark.parametrize(("column", "case", "rules"), EXACT)
def test_a_fault_has_no_other_class(column: str, case: str, rules: set[str], script: ModuleType) -> None:
    [found] = [one for one in script.COLUMNS if one.name == column]
    assert {finding.rule for finding in found.recorded["spm-v3"].findings[case]} == rules


@pytest.mark.parametrize(("column", "tokenizer", "case", "rule", "what"), KNOWN)
def test_a_fault_that_we_know_of_has_its_class(
    column: str, tokenizer: str, case: str, rule: str, what: str, script: ModuleType
) -> None:
    [found] = [one for one in script.COLUMNS if one.name == column]
    assert rule in {finding.rule for finding in found.recorded[tokenizer].findings[case]}, what


@pytest.mark.parametrize(
    ("column", "case", "words"),
    [
        ("llamafactory", "single", "[MODEL_SETTINGS] is missing: the row's settings"),
        ("axolotl", "thinking", "[THINK] is missing: the thinking is lost"),
    ],
)
def test_a_block_that_is_no_turn_is_named(column: str, case: str, words: str, script: ModuleType) -> None:
    [found] = [one for one in script.COLUMNS if one.name == column]
    assert any(one.found.startswith(words) for one in found.recorded["derived-v15"].findings[case])


@pytest.mark.parametrize(("column", "tokenizer", "words"), REFUSED)
def test_a_configuration_that_no_row_can_use_is_refused_by_the_runner(
    column: str, tokenizer: str, words: str, script: ModuleType
) -> None:
    [found] = [one for one in script.COLUMNS if one.name == column]
    assert words in found.recorded[tokenizer].refused


def test_every_configuration_was_run_on_every_tokenizer(script: ModuleType) -> None:
    runs = [(column.name, tokenizer) for column in script.COLUMNS for tokenizer in column.recorded]
    assert runs == [(column.name, tokenizer) for column in script.COLUMNS for tokenizer in script.TOKENIZERS]


def test_every_record_has_its_day_and_the_version_of_its_trainer(script: ModuleType) -> None:
    for column in script.COLUMNS:
        for tokenizer, one in column.recorded.items():
            place = f"{column.name} on {tokenizer}"
            assert re.fullmatch(r"2\d{3}-\d\d-\d\d", one.date), place
            assert one.environment.get(column.runner.distribution, "not installed") != "not installed", place
            assert bool(one.refused) != bool(one.lines), place


def test_every_configuration_that_is_not_refused_was_run_on_real_dialogues(script: ModuleType) -> None:
    runs = [(column, name) for column in script.COLUMNS for name in script.REAL_TOKENIZERS]
    accepted = [f"| {column.name} | {name} " for column, name in runs if not column.recorded[name].refused]
    lines = [line for line in script.board_page().splitlines() if "chatterbot-corpus 1" in line]
    assert [one for one, line in zip(accepted, lines, strict=True) if not line.startswith(one)] == []
    assert len(accepted) == 16


def test_our_own_trainer_is_sound_on_every_row(script: ModuleType) -> None:
    for tokenizer in script.TOKENIZERS:
        assert not any(script.our_findings(tokenizer).values())


def test_every_fault_of_a_runner_has_a_fix_in_its_own_configuration(script: ModuleType) -> None:
    faults = {
        (column.runner.name, finding.rule)
        for column in script.COLUMNS
        for recorded in column.recorded.values()
        for findings in recorded.findings.values()
        for finding in findings
    }
    assert {(name, rule) for name, rule in faults if rule not in runner_fixes(name)} == set()


@pytest.mark.parametrize("name", RUNNERS)
def test_a_fix_is_a_key_or_a_command_and_belongs_to_a_rule_of_rows(name: str) -> None:
    for rule, fix in runner_fixes(name).items():
        assert RULES[rule].subject == "encoded"
        assert re.search(r"`(mistral-lora .+|\w+: .+|\"\w+\": .+|content\.rstrip.*|messages)`", fix), rule
        assert Finding(rule, "found", fix=fix).text().splitlines()[-1] == f"  fix:      {fix}"
        assert Finding(rule, "found", fix=fix).to_json()["fix"] == fix


def test_a_script_of_one_s_own_has_the_fixes_of_the_rules() -> None:
    assert runner_fixes("tests/my_runner.py") == {}
    assert Finding("ML543", "found").to_json()["fix"] == RULES["ML543"].fix


LAYERS = [
    ("trl: lora_target_modules: all-linear: mistral", "vision_tower", True),
    ("axolotl: lora_target_linear: true: ministral3", "multi_modal_projector", True),
    ("ms-swift: target_modules: all-linear (default): mistral", "vision_tower", False),
    ("llamafactory: lora_target: all (default): mistral4", "vision_tower", False),
]


@pytest.mark.parametrize(("recorded", "part", "is_adapted"), LAYERS)
def test_the_layers_that_a_trainer_adapts_are_recorded(recorded: str, part: str, is_adapted: bool) -> None:
    found = scoreboard_layers.read()[recorded]["layers"]
    assert any(".language_model." in name for name in found)
    assert any(part in name for name in found) is is_adapted


def test_the_pattern_of_an_example_reaches_one_kind_of_layer_in_small_4() -> None:
    [pattern] = [key for key in scoreboard_layers.read() if "(its examples): mistral4" in key]
    assert {name.rpartition(".")[2] for name in scoreboard_layers.read()[pattern]["layers"]} == {"o_proj"}


def test_every_trainer_was_run_on_every_text_model() -> None:
    assert not any("not run" in line or "refused" in line for line in scoreboard_layers.table())
    versions = {key: one.get("version", "") for key, one in scoreboard_layers.read().items()}
    assert {key for key, version in versions.items() if not re.match(r"\d+\.\d+", version)} == set()
