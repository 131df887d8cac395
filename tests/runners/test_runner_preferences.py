"""`mistral-lora check --runner` with preference pairs and rated answers: which runner and which command takes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hostile_runners as hostile
import pytest
from preference_records import Data, said, texts_pair

from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.runners.given_rows import by_record, preference_rows
from pytest_mistral_lora.runners.process import reader_of
from pytest_mistral_lora.runners.tasks import PreferenceTasks

PAIR = texts_pair("Which colour?", "Red.", "Blue.")
RATED: Data = {"prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": True}
CHAT: Data = {"messages": [said("user", "Hi"), said("assistant", "Hello")]}


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([RATED], ["--runner", "trl", "--task", "reward"], "'reward' does not take a rated answer; expected kto"),
        ([RATED], ["--runner", "trl", "--task", "dpo"], "'dpo' does not take a rated answer; expected kto"),
        ([CHAT], ["--runner", "trl", "--task", "dpo"], "'dpo' does not take a conversation; expected no --task"),
        ([PAIR, RATED], ["--runner", "trl"], "a preference pair and a rated answer in one dataset"),
        (
            [PAIR],
            ["--runner", "axolotl", "--task", "kto"],
            "'kto' does not take a preference pair; expected dpo or ipo",
        ),
        ([PAIR], ["--runner", "lm-eval"], "this is a preference pair"),
    ],
)
def test_records_that_a_command_does_not_take_are_refused(
    rows: list[Data], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", *words, "--tokenizer", "spm-v3", "--dataset", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_script_of_the_user_takes_chat_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    words = ["--runner", str(hostile.script(tmp_path, hostile.SOUND)), "--tokenizer", "spm-v3", "--dataset", str(file)]
    assert main(["check", *words]) == 2
    assert "this is a preference pair" in capsys.readouterr().err


def test_the_sides_of_a_pair_are_one_record() -> None:
    rows = [row for record in (CHAT, PAIR, RATED, PAIR) for row in parse_rows(record)]
    assert [len(record) for record in by_record(rows)] == [1, 2, 1, 2]


def test_the_columns_of_a_script_are_checked() -> None:
    read = reader_of(1)
    columns = {"chosen_input_ids": [1], "rejected_input_ids": [2]}
    assert read({"row": 0, **columns, "more": 1}, "x") == (0, columns)
    rated = {"completion_input_ids": [1], "completion_labels": [-100], "label": True}
    assert read({"row": 0, **rated}, "x") == (0, rated)
    with pytest.raises(RunnerError, match="rejected_input_ids"):
        read({"row": 0, **columns, "rejected_input_ids": ["2"]}, "x")


def test_without_rows_a_task_that_a_runner_lacks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--runner", "trl", "--task", "orpo", "--tokenizer", "spm-v3"]) == 2
    error = capsys.readouterr().err
    assert [value for value in ("'orpo'", "expected dpo or reward or kto") if value not in error] == []


def test_a_task_for_rated_answers_is_given_each_answer_of_a_pair() -> None:
    runner = replace(TRAINERS["trl"], tasks=PreferenceTasks(("dpo",), ("kto",)))
    pair = parse_rows(PAIR, place=Place.of("rows.jsonl", 1))
    assert preference_rows([pair], runner, "dpo") == list(pair)
    rated = preference_rows([pair], runner, "kto")
    assert [(row.side, str(row.place)) for row in rated] == [
        ("wanted", "rows.jsonl:1, chosen"),
        ("unwanted", "rows.jsonl:1, rejected"),
    ]
    assert rated[0].kind.record(rated[:1]) == RATED
