"""Another trainer's run that goes on from an adapter is judged by the first loss in its log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from continued_runs import CONFIGURATION, configuration, continued_runs

from pytest_mistral_lora.conformance.adapter.continued_run import ContinuedRun
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.runners.going_on import GoingOn

STATE = "trainer_state.json"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(continued_runs(), tmp_path / "runs"))


def judge(folder: Path) -> Result:
    return ContinuedRun(AdapterFolder(folder)).judge()


def write(run: Path, **changed: Any) -> None:
    start = "" if run.name == "first" else "../first/adapter"
    (run / CONFIGURATION).write_text(yaml.safe_dump(configuration(start, **changed)))


def change_log(run: Path, **changed: Any) -> None:
    file = run / "adapter" / STATE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def log(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "adapter" / STATE).read_text())["log_history"]
    return found


def held_out(run: Path) -> list[float]:
    return [line["eval_loss"] for line in log(run) if "eval_loss" in line]


def test_a_run_that_loads_the_adapter_is_sound(runs: Path) -> None:
    assert held_out(runs / "right")[0] == pytest.approx(held_out(runs / "first")[-1], abs=1e-5)
    assert judge(runs / "right" / "adapter") == Result(())


@pytest.mark.parametrize(("how", "says"), [("dropped", "the adapter was dropped"), ("half", "loaded in part")])
def test_a_run_that_does_not_is_an_error_with_both_numbers(runs: Path, how: str, says: str) -> None:
    [finding] = judge(runs / how / "adapter").findings
    assert (finding.rule, finding.severity) == ("ML456", "error")
    assert says in finding.found
    assert f"{held_out(runs / how)[0]:.6g}" in finding.found
    assert f"{held_out(runs / 'first')[-1]:.6g}" in finding.expected
    if how == "dropped":
        assert held_out(runs / how)[0] == pytest.approx(held_out(runs / "first")[0], abs=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"test_datasets": [{"path": "../other.jsonl", "type": "chat_template"}]},
        {"test_datasets": [{"path": "../eval.jsonl", "type": "alpaca"}]},
        {"sequence_len": 32},
        {"val_set_size": 0.1},
        {"base_model": "../copy"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_on_rows_that_may_be_others_it_is_a_note(runs: Path, changed: dict[str, Any]) -> None:
    write(runs / "dropped", **changed)
    [finding] = judge(runs / "dropped" / "adapter").findings
    assert finding.severity == "note"
    assert f"{held_out(runs / 'first')[-1]:.6g}" in finding.found
    assert judge(runs / "right" / "adapter").findings == ()


@pytest.mark.parametrize("changed", [{"learning_rate": 0.5}, {"datasets": [{"path": "../more.jsonl"}]}, {"seed": 3}])
def test_settings_of_training_and_other_rows_to_train_on_leave_the_held_out_rows(
    runs: Path, changed: dict[str, Any]
) -> None:
    write(runs / "dropped", **changed)
    assert [finding.severity for finding in judge(runs / "dropped" / "adapter").findings] == ["error"]


def test_held_out_rows_that_were_written_later_may_be_others(runs: Path) -> None:
    (runs / "eval.jsonl").touch()
    assert [finding.severity for finding in judge(runs / "dropped" / "adapter").findings] == ["note"]


def test_other_files_of_one_name_are_other_rows(runs: Path) -> None:
    for name, rows in (("first", "a"), ("dropped", "b")):
        (runs / name / "eval.jsonl").write_text(rows)
        write(runs / name, test_datasets=[{"path": "eval.jsonl"}])
    assert [finding.severity for finding in judge(runs / "dropped" / "adapter").findings] == ["note"]


def test_without_held_out_losses_the_first_training_loss_is_a_sign(runs: Path) -> None:
    for name in ("first", "right", "dropped"):
        change_log(runs / name, log_history=[line for line in log(runs / name) if "loss" in line])
    [finding] = judge(runs / "dropped" / "adapter").findings
    assert (finding.severity, "training loss" in finding.found) == ("note", True)
    assert judge(runs / "right" / "adapter").findings == ()


def test_the_best_adapter_of_the_run_may_be_the_one_that_was_saved(runs: Path) -> None:
    """`load_best_model_at_end` saves the adapter of an earlier step."""
    first = held_out(runs / "first")
    change_log(runs / "right", log_history=[{"step": 0, "eval_loss": first[2]}])
    assert [finding.severity for finding in judge(runs / "right" / "adapter").findings] == ["error"]
    change_log(runs / "first", best_metric=first[2])
    assert judge(runs / "right" / "adapter").findings == ()


def test_a_checkpoint_is_judged_by_the_configuration_of_its_run(runs: Path) -> None:
    run = runs / "dropped" / "adapter"
    checkpoint = run / "checkpoint-2"
    shutil.copytree(run, runs / "moved")
    shutil.move(runs / "moved", checkpoint)
    (run / STATE).unlink()
    assert [finding.rule for finding in judge(checkpoint).findings] == [judge(run).findings[0].rule]


@pytest.mark.parametrize("state", ["[]", "{", '{"log_history": 3}', '{"log_history": [{"loss": "a", "step": 0}, 3]}'])
def test_a_log_that_says_nothing_is_no_finding(runs: Path, state: str) -> None:
    (runs / "dropped" / "adapter" / STATE).write_text(state)
    assert judge(runs / "dropped" / "adapter").findings == ()


def test_a_loss_of_preferences_is_not_compared(runs: Path) -> None:
    change_log(runs / "dropped", log_history=[*log(runs / "dropped"), {"step": 1, "rewards/chosen": 0.1}])
    assert not ContinuedRun(AdapterFolder(runs / "dropped" / "adapter")).is_known


def test_a_start_without_a_log_is_not_checked(runs: Path) -> None:
    (runs / "first" / "adapter" / STATE).unlink()
    assert "which the run went on from" in judge(runs / "dropped" / "adapter").not_checked
    (runs / "dropped" / CONFIGURATION).unlink()
    assert not ContinuedRun(AdapterFolder(runs / "dropped" / "adapter")).is_known


@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINERS.of_this_package() if trainer.going_on is not None])
def test_each_trainer_is_known_by_its_own_keys(runs: Path, trainer: Any) -> None:
    keys: GoingOn = trainer.going_on
    for name in ("first", "half"):
        (runs / name / CONFIGURATION).unlink()
        start = {keys.start: "../first/adapter" if keys.start != "adapters" else [str(runs / "first" / "adapter")]}
        settings = {"output_dir": "adapter", keys.held_out: "../eval.jsonl", **(start if name == "half" else {})}
        if keys.file:
            settings[keys.held_out] = [str(runs / "eval.jsonl")]
            (runs / name / "adapter" / keys.file).write_text(json.dumps(settings))
        else:
            (runs / name / "my.yaml").write_text(yaml.safe_dump(settings))
    assert [finding.severity for finding in judge(runs / "half" / "adapter").findings] == ["error"]
