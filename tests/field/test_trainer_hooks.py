"""What a `Trainer` tells the judge, the guard and the runners about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Trainer as TransformersTrainer

from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.known_programs import observers_of_programs
from pytest_mistral_lora.conformance.row_pass import named_observer
from pytest_mistral_lora.guarding.batches import known_libraries
from pytest_mistral_lora.runners.extract import _environment
from pytest_mistral_lora.runners.trainer import TRAINERS, find_runner, owner_of_loss


@pytest.mark.parametrize(
    ("module", "name", "own"),
    [
        ("trl.trainer.dpo_trainer", "DPOTrainer", True),
        ("trl.trainer.sft_trainer", "SFTTrainer", False),
        ("trlx.trainer", "DPOTrainer", False),
        ("llamafactory.train.sft.trainer", "CustomSeq2SeqTrainer", False),
        ("__main__", "DPOTrainer", False),
    ],
)
def test_a_trainer_names_its_classes_with_the_loss_of_labels(module: str, name: str, own: bool) -> None:
    assert (owner_of_loss(type(name, (), {"__module__": module})) is not None) is own


def test_the_trainer_of_transformers_has_the_loss_of_labels() -> None:
    assert owner_of_loss(TransformersTrainer) is None


def test_a_trainer_that_is_used_as_a_library_is_one_of_the_guard() -> None:
    assert {"trl", "torch"} <= known_libraries()
    assert "axolotl" not in known_libraries()


@pytest.mark.parametrize("name", ["axolotl", "mine.py"])
def test_a_runner_gets_the_variables_of_trainers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    found = _environment(find_runner(name), tmp_path, is_this_python=True)
    expected = {key: value for trainer in TRAINERS.values() for key, value in trainer.variables.items()}
    assert expected
    assert expected.items() <= found.items()


def test_the_rules_about_trainers_are_observers_of_their_checks() -> None:
    names = observers_of_programs()
    assert names
    for name in names:
        assert named_observer(name).case in {case for rule in RULES.values() for case in rule.cases}
