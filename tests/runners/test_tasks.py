"""Which command of a trainer takes preferences: by name, by the trainer's own configuration, or by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.rated import RATED
from pytest_mistral_lora.chat.rows import RecordKind
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.runners.given_rows import GivenRows
from pytest_mistral_lora.runners.tasks import PreferenceTasks

TASKS = PreferenceTasks(pairs=("dpo", "rm"), rated=("kto",), key="stage", configs={"rm": "other"})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("kind", "named", "text", "task"),
    [
        (PAIR, None, "template: mistral\n", "dpo"),
        (PAIR, None, "stage: rm\n", "rm"),
        (PAIR, "rm", "template: mistral\n", "rm"),
        (PAIR, "rm", "stage: rm\n", "rm"),
        (RATED, None, "stage: kto\n", "kto"),
        (RATED, None, "stage:\n", "kto"),
        (CONVERSATION, None, "stage: sft\n", ""),
        (CONVERSATION, None, "stage: pt\n", ""),
        # the trainer itself says what is wrong with these
        (PAIR, None, "[stage", "dpo"),
        (PAIR, None, "- stage\n", "dpo"),
    ],
)
def test_the_configuration_decides_where_the_user_does_not(
    kind: RecordKind, named: str | None, text: str, task: str, config: Path
) -> None:
    config.write_text(text)
    assert TASKS.task_for(kind, named, config) == task


@pytest.mark.parametrize(
    ("kind", "named", "text", "found", "expected"),
    [
        (PAIR, None, "stage: kto\n", "`stage: kto` does not take a preference pair", "stage: dpo or stage: rm"),
        (PAIR, None, "stage: sft\n", "`stage: sft` does not take a preference pair", "stage: dpo or stage: rm"),
        (RATED, None, "stage: dpo\n", "`stage: dpo` does not take a rated answer", "stage: kto"),
        (CONVERSATION, None, "stage: dpo\n", "`stage: dpo` does not take a conversation", "preference pairs"),
        (PAIR, "dpo", "stage: rm\n", "--task dpo, and `stage: rm` in the configuration", "one of them"),
        (PAIR, "kto", "stage: dpo\n", "'kto' does not take a preference pair", "dpo or rm"),
        (CONVERSATION, "dpo", "", "'dpo' does not take a conversation", "no --task"),
    ],
)
def test_a_contradiction_is_an_error(
    kind: RecordKind, named: str | None, text: str, found: str, expected: str, config: Path
) -> None:
    config.write_text(text)
    with pytest.raises(InputError) as error:
        TASKS.task_for(kind, named, config)
    assert error.value.found == found
    assert (error.value.expected or "").startswith(expected)


def test_a_trainer_whose_command_line_names_the_task_reads_no_configuration(config: Path) -> None:
    config.write_text("stage: kto\n")
    assert TRAINERS["trl"].tasks.task_for(PAIR, None, config) == "dpo"
    assert TRAINERS["trl"].tasks.task_for(PAIR, None, None) == "dpo"


@pytest.mark.parametrize(("text", "task"), [("stage: rm\n", "rm"), ("stage: kto\n", "kto"), ("stage: sft\n", "")])
def test_without_rows_the_configuration_chooses_the_packaged_ones(text: str, task: str, config: Path) -> None:
    config.write_text(text)
    assert GivenRows.read(TRAINERS["llamafactory"], [], config=config) == GivenRows((), task)


def test_each_task_has_a_default_configuration() -> None:
    for runner in TRAINERS.values():
        for task in ("", *runner.tasks.pairs, *runner.tasks.rated):
            assert runner.default_config(task).is_file()
        assert runner.tasks.configs.keys() <= {*runner.tasks.pairs, *runner.tasks.rated}


@pytest.mark.parametrize("name", [name for name, runner in TRAINERS.items() if runner.tasks.pairs])
def test_each_trainer_of_preferences_has_fixes_of_its_own(name: str) -> None:
    fixes = TRAINERS[name].fixes("preferences")
    assert {RULES[rule].subject for rule in fixes} <= {"encoded", "dataset"}
    # what a text can be in any trainer
    assert {"ML502", "ML523", "ML529", "ML531", "ML568"} <= fixes.keys()
