"""The scoreboard: each verdict that is recorded is in its tables, and every fault that we know of has its class."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from boards import layers, pages, tables
from boards.inputs import (
    DERIVED,
    DOCS,
    PAIR_TOKENIZERS,
    REAL_TOKENIZERS,
    TOKENIZERS,
    cases,
    loaded,
    oracle,
    pair_cases,
    tokenizer_file,
)
from boards.results import Result
from boards.trainer_runs import judged, judged_pairs
from boards.trainers import CONFIGURATIONS, PAIR_CONFIGURATIONS, Configuration
from preference_records import Data, with_ids
from preference_rows import rated

from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.conformance.finding import RULES, Finding, with_paths
from pytest_mistral_lora.runners import TRAINERS, find_runner

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


KNOWN_OF_PAIRS = [
    ("trl-dpo", "spm-v3", "hostile-prompt, chosen", "ML523", "what a user writes becomes control tokens"),
    ("trl-dpo", "tekken-240911", "trailing-spaces, chosen", "ML529", "spaces after an answer are kept"),
    ("trl-dpo", "spm-v3", "tool-result-in-answer, chosen", "ML547", "the result of a tool is scored"),
    ("trl-dpo", "spm-v3", "empty-answer", "ML502", "an empty answer ends the run"),
    ("trl-dpo-own-length", "spm-v3", "long-prompt", "ML502", "a pair whose prompt is too long is left out in silence"),
    ("trl-dpo-own-length", "spm-v3", "long-answers", "ML568", "a cut leaves two equal answers"),
    ("trl-reward-own-length", "spm-v3", "long-answers", "ML502", "a conversation that is too long is left out"),
]


def recorded(column: str, tokenizer: str) -> Result:
    [found] = [known for known in (*CONFIGURATIONS, *PAIR_CONFIGURATIONS) if known.name == column]
    return found.recorded[tokenizer]


@pytest.fixture(scope="module")
def of_site() -> dict[str, str]:
    return pages.site_pages()


@pytest.fixture(scope="module")
def board(of_site: dict[str, str]) -> str:
    return of_site["scoreboard/README.md"]


@pytest.fixture(scope="module")
def reproductions(of_site: dict[str, str]) -> str:
    return of_site["scoreboard/reproductions.md"]


def test_the_tables_have_every_verdict(board: str) -> None:
    for tokenizer in TOKENIZERS:
        section = board.partition(f"\n## {tokenizer}, row by row\n")[2].partition("\n## ")[0]
        head, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        assert [line[0] for line in lines] == [case.name for case in cases(tokenizer)]
        for number, column in enumerate(head[1:-1], start=1):
            shown = {line[0]: re.findall(r"\[(ML\d+)\]", line[number]) for line in lines}
            assert shown == recorded(column, tokenizer).verdicts, (column, tokenizer)
    assert "<!-- made" not in board


def test_the_tables_of_pairs_have_every_verdict(board: str) -> None:
    for tokenizer in PAIR_TOKENIZERS:
        section = board.partition(f"\n### {tokenizer}, pair by pair\n")[2].partition("\n##")[0]
        head, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        assert [line[0] for line in lines] == [case.name for case in pair_cases(tokenizer)]
        for number, column in enumerate(head[1:], start=1):
            shown = {line[0]: set(re.findall(r"\[(ML\d+)\]", line[number])) for line in lines}
            verdicts = recorded(column, tokenizer).by_record
            assert shown == {name: set(rules) for name, rules in verdicts.items()}, (column, tokenizer)


def test_a_pair_that_can_only_be_refused_counts_in_no_share(board: str) -> None:
    count = len(pair_cases("spm-v3")) - 1
    [line] = [line for line in board.splitlines() if line.startswith("| trl-dpo | spm-v3 | ")]
    assert f"| {count - 4} of {count} | " in line
    assert "row-dropped" not in line


def test_a_side_is_named_if_the_other_one_is_sound(board: str) -> None:
    section = board.partition("\n### spm-v3, pair by pair\n")[2].partition("\n##")[0]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in section.splitlines() if " | " in line}
    assert cells["single"] == "right"
    assert cells["trailing-spaces"] == "chosen: [ML529](../rules.md#ml529)"
    assert cells["hostile-prompt"] == "[ML523](../rules.md#ml523)"


@pytest.mark.parametrize("column", [*CONFIGURATIONS, *PAIR_CONFIGURATIONS], ids=lambda column: column.name)
def test_each_difference_has_its_smallest_row(column: Configuration, reproductions: str) -> None:
    rules = {rule for run in column.recorded.values() for broken in run.verdicts.values() for rule in broken}
    assert set(re.findall(rf"^### {column.name}: .* \((ML\d+)\)", reproductions, flags=re.MULTILINE)) == rules


@pytest.mark.parametrize(("column", "case", "rules"), EXACT)
def test_a_fault_has_no_other_class(column: str, case: str, rules: set[str]) -> None:
    assert set(recorded(column, "spm-v3").verdicts[case]) == rules


@pytest.mark.parametrize(("column", "tokenizer", "case", "rule", "what"), KNOWN)
def test_a_fault_that_we_know_of_has_its_class(column: str, tokenizer: str, case: str, rule: str, what: str) -> None:
    assert rule in recorded(column, tokenizer).verdicts[case], what


@pytest.mark.parametrize(("column", "tokenizer", "name", "rule", "what"), KNOWN_OF_PAIRS)
def test_a_fault_in_pairs_that_we_know_of_has_its_class(
    column: str, tokenizer: str, name: str, rule: str, what: str
) -> None:
    assert rule in recorded(column, tokenizer).verdicts[name], what


@pytest.mark.parametrize(("column", "tokenizer", "words"), REFUSED)
def test_a_configuration_that_no_row_can_use_is_refused_by_the_runner(column: str, tokenizer: str, words: str) -> None:
    assert words in recorded(column, tokenizer).refused


def test_every_configuration_was_run_on_every_tokenizer() -> None:
    runs = [(column.name, tokenizer) for column in CONFIGURATIONS for tokenizer in column.recorded]
    assert runs == [(column.name, tokenizer) for column in CONFIGURATIONS for tokenizer in TOKENIZERS]


def test_every_record_has_its_day_and_the_version_of_its_trainer() -> None:
    for column in (*CONFIGURATIONS, *PAIR_CONFIGURATIONS):
        for tokenizer, run in column.recorded.items():
            place = f"{column.name} on {tokenizer}"
            assert re.fullmatch(r"2\d{3}-\d\d-\d\d", run.date), place
            assert run.environment.get(column.runner.distribution, "not installed") != "not installed", place
            assert bool(run.refused) != bool(run.verdicts), place


def test_every_configuration_that_is_not_refused_was_run_on_real_dialogues(board: str) -> None:
    runs = [(column, name) for column in CONFIGURATIONS for name in REAL_TOKENIZERS]
    accepted = [f"| {column.name} | {name} " for column, name in runs if not column.recorded[name].refused]
    section = board.partition("<!-- real: start -->\n")[2].partition("\n<!-- real: end -->")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| (?!configuration)", line)]
    assert [start for start, line in zip(accepted, lines, strict=True) if not line.startswith(start)] == []
    assert len(accepted) == 18


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_our_own_trainer_is_sound_on_every_row(tokenizer: str) -> None:
    encoder = make_encoder("mistral-common", loaded(tokenizer_file(tokenizer)))
    encoded = {case.name: encoder.encode(case.row) for case in cases(tokenizer)}
    lines = {name: {"input_ids": row.input_ids, "labels": row.labels} for name, row in encoded.items()}
    assert set(judged(lines, tokenizer)["verdicts"].values()) == {""}


def test_a_row_that_a_trainer_changes_or_drops_is_recorded_with_its_smallest_example() -> None:
    encoder = make_encoder("mistral-common", loaded(tokenizer_file("spm-v3")))
    encoded = {case.name: encoder.encode(case.row) for case in cases("spm-v3")[:3]}
    lines: dict[str, dict[str, Any]] = {
        name: {"input_ids": row.input_ids, "labels": row.input_ids} for name, row in encoded.items()
    }
    lines["multi-turn"] = {"error": "too long"}
    made = judged(lines, "spm-v3")
    assert made["verdicts"] == {"single": "ML543", "multi-turn": "ML502", "system": "ML543"}
    assert made["examples"]["ML502"]["case"] == "multi-turn"
    assert made["examples"]["ML543"]["case"] == "single"


def encoded_pairs(tokenizer: str) -> list[Data]:
    """Return the packaged pairs as a sound trainer writes them, which refuses an empty answer."""
    made = []
    for number, case in enumerate(pair_cases(tokenizer)):
        record = case.rows[0].kind.record(case.rows)
        if case.is_refused:
            made.append({"row": number, **record, "error": "the answer is empty"})
            continue
        made.append({"row": number, **with_ids(oracle(tokenizer), record)})
        for row in case.rows:
            encoded = oracle(tokenizer).encode(row)
            start = len(made[-1]["prompt_ids"])
            made[-1][f"{row.side}_mask"] = [int(label != -100) for label in (encoded.labels or ())[start:]]
    return made


def written(folder: Path, records: list[Data]) -> Path:
    file = folder / "encoded.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("tokenizer", ["spm-v3", "derived-v15"])
def test_pairs_of_a_sound_trainer_are_sound(tokenizer: str, tmp_path: Path) -> None:
    made = judged_pairs(written(tmp_path, encoded_pairs(tokenizer)), tokenizer)
    assert {name for name, rules in made["verdicts"].items() if rules} == {"empty-answer"}
    assert made["verdicts"]["empty-answer"] == "ML502"
    assert len(made["verdicts"]) == 2 * len(pair_cases(tokenizer)) - 1


def test_a_fault_of_a_pair_is_recorded_for_its_side_or_for_the_pair(tmp_path: Path) -> None:
    records = {case.name: record for case, record in zip(pair_cases("spm-v3"), encoded_pairs("spm-v3"), strict=True)}
    records["tool-result-in-answer"]["chosen_mask"] = [1] * len(records["tool-result-in-answer"]["chosen_ids"])
    for column in ("chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"):
        records["long-answers"][column] = records["long-answers"][column][:1000]
    records["long-prompt"] = {**records["long-prompt"], "error": "it was left out"}
    for column in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"):
        del records["long-prompt"][column]
    made = judged_pairs(written(tmp_path, [*records.values()]), "spm-v3")
    assert {name: rules for name, rules in made["verdicts"].items() if rules} == {
        "tool-result-in-answer, chosen": "ML547",
        "long-answers, chosen": "ML531",
        "long-answers, rejected": "ML531",
        "long-answers": "ML568",
        "long-prompt": "ML502",
        "empty-answer": "ML502",
    }
    assert "single, rejected" in made["verdicts"]
    assert made["examples"]["ML547"]["case"] == "tool-result-in-answer, chosen"
    # the shorter pair shows no fault of the trainer
    assert made["examples"]["ML502"]["case"] == "long-prompt"


def test_rated_answers_are_recorded_by_the_sides_of_their_pair(tmp_path: Path) -> None:
    lines: list[Data] = []
    for record in encoded_pairs("spm-v3"):
        for side, answer in zip(("chosen", "rejected"), rated(record), strict=True):
            ids = {"error": "it is empty"}
            if "error" not in record:
                ids = {"prompt_ids": record["prompt_ids"], "completion_ids": record[f"{side}_ids"]}
                ids["completion_mask"] = record[f"{side}_mask"]
            lines.append({"row": len(lines), **answer, **ids})
    made = judged_pairs(written(tmp_path, lines), "spm-v3", is_rated=True)
    assert {name: rules for name, rules in made["verdicts"].items() if rules} == {
        "empty-answer, chosen": "ML502",
        "empty-answer, rejected": "ML502",
    }


def test_every_configuration_was_run_on_pairs_of_every_shipped_tokenizer() -> None:
    shipped = [tokenizer for tokenizer in PAIR_TOKENIZERS if tokenizer not in DERIVED]
    for column in PAIR_CONFIGURATIONS:
        assert [tokenizer for tokenizer in column.recorded if tokenizer not in DERIVED] == shipped, column.name
    # a derived file has the only version with thinking
    assert not recorded("trl-dpo", "derived-v15").refused


def test_every_fault_of_a_runner_has_a_fix_in_its_own_configuration() -> None:
    faults = {
        (column.runner.name, "preferences" if column.task else "rows", rule)
        for column in (*CONFIGURATIONS, *PAIR_CONFIGURATIONS)
        for run in column.recorded.values()
        for rules in run.verdicts.values()
        for rule in rules
    }
    lacking = {fault for fault in faults if fault[2] not in TRAINERS[fault[0]].fixes(fault[1])}
    assert lacking == set()


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


LAYERS = [
    ("trl: lora_target_modules: all-linear: mistral", "vision_tower", True),
    ("axolotl: lora_target_linear: true: ministral3", "multi_modal_projector", True),
    ("ms-swift: target_modules: all-linear (default): mistral", "vision_tower", False),
    ("llamafactory: lora_target: all (default): mistral4", "vision_tower", False),
]


@pytest.mark.parametrize(("recorded", "part", "is_adapted"), LAYERS)
def test_the_layers_that_a_trainer_adapts_are_recorded(recorded: str, part: str, is_adapted: bool) -> None:
    found = layers.read()[recorded]["layers"]
    assert any(".language_model." in name for name in found)
    assert any(part in name for name in found) is is_adapted


def test_the_pattern_of_an_example_reaches_one_kind_of_layer_in_small_4() -> None:
    [pattern] = [key for key in layers.read() if "(its examples): mistral4" in key]
    assert {name.rpartition(".")[2] for name in layers.read()[pattern]["layers"]} == {"o_proj"}


def test_every_trainer_was_run_on_every_text_model() -> None:
    assert not any("not run" in line or "refused" in line for line in layers.table())
    versions = {key: one.get("version", "") for key, one in layers.read().items()}
    assert {key for key, version in versions.items() if not re.match(r"\d+\.\d+", version)} == set()


@pytest.mark.parametrize("board", [name for name in pages.BOARDS if name != "prompts"])
def test_the_tables_of_a_page_are_those_of_its_records(board: str) -> None:
    """That of prompts takes longer: tests/serving/test_server_scoreboard.py."""
    assert pages.filled(board) == (DOCS / pages.page_of(board)).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["scoreboard/README.md", "serving/README.md", "serving/answers.md"])
def test_a_page_begins_with_one_line_a_program_and_what_to_set_in_it(name: str) -> None:
    lines = [line for line in (DOCS / name).read_text(encoding="utf-8").splitlines() if line]
    table = lines[3 : lines.index("</div>")]
    assert table[0].split(" | ")[1] == "what to set"
    programs = [line.split(" | ")[0] for line in table[2:]]
    assert all(line.startswith("| ") for line in programs)
    assert len(programs) == len(set(programs)) >= 3


def result(setting: str, tokenizer: str, right: int, **more: Any) -> Result:
    """Return a result of which so many cases of ten are right."""
    verdicts = {f"case-{number}": [] if number < right else ["ML528"] for number in range(10)}
    return Result("Some trainer", "1.2", "", setting, setting, tokenizer, **{"verdicts": verdicts, **more})


def test_the_first_table_names_the_best_setting_of_each_column() -> None:
    results = [
        result("default", "one", 2),
        result("default", "two", 0),
        result("better", "one", 9),
        result("better", "two", 0),
        result("other", "two", 4, compares_lengths=True),
        result("wrong", "one", 10, is_contrast=True),
        result("refusing", "two", 0, verdicts={}, refused="it is another file"),
    ]
    *_, line = tables.first_table("trainer", results, {"a": ["one"], "b": ["two"], "c": ["three"]})
    name, setting, *cells = (re.sub(r"<span[^>]*>|</span>", "", cell) for cell in line.strip("| ").split(" | "))
    assert (name, setting) == ("Some trainer 1.2", "better (a)<br>other (b)")
    assert cells == ["90 %", "# 40 %", "not run", "0 to 100 %"]


def test_the_first_table_has_one_setting_if_it_is_the_best_of_several() -> None:
    results = [result("first", "one", 5), result("second", "one", 5), result("second", "two", 5)]
    *_, line = tables.first_table("trainer", results, {"a": ["one"], "b": ["two"]})
    assert line.startswith("| Some trainer 1.2 | second | ")
    assert line.endswith(" | 50 % |")


def test_no_setting_is_named_if_none_makes_a_case_right() -> None:
    *_, line = tables.first_table("trainer", [result("a", "one", 0), result("b", "one", 0)], {"v3": ["one"]})
    assert line.startswith("| Some trainer 1.2 | nothing that was tried helps | ")
    assert line.endswith(" | 0 % |")


def test_a_share_is_cut_and_counts_no_case_that_nobody_can_make_right() -> None:
    verdicts = {
        "a, chosen": [],
        "a, rejected": ["ML529"],
        "b": ["ML502"],
        **{f"c{number}": [] for number in range(198)},
    }
    found = result("x", "one", 0, verdicts=verdicts, uncounted=("b",))
    assert (found.right, len(found.counted), tables.percent(found.share)) == (198, 199, 99)
    assert tables.verdict(found, "a") == "rejected: [ML529](../rules.md#ml529)"
    assert tables.verdict(found, "b") == "[ML502](../rules.md#ml502)"
