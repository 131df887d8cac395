"""Two runs that differ in one key of their recipes differ in the facts of that key, and in what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import CONVERSATIONS, recipe_data, write_rows

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train

OUTCOMES = {"files", "evaluation"}
"""What came of a run."""
DATA = {"$.dataset_sha256", "$.dataset.files[0].sha256", "$.dataset.rows_sha256", "$.masking.ids_sha256"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Callable[..., Path]:
    def make(conversations: Any = CONVERSATIONS, **sections: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("made")
        write_rows(folder / "rows.jsonl", conversations)
        training = {"steps": 2, **sections.pop("training", {})}
        evaluation = {"generations": 1, "max_new_tokens": 3}
        data = recipe_data(base, training=training, evaluation=evaluation, **sections)
        return train(parse_recipe(data, folder=folder)).output

    return make


@pytest.fixture(scope="module")
def first(made: Callable[..., Path]) -> Path:
    return made()


def test_the_same_recipe_gives_the_same_run(
    first: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    second = made()
    capsys.readouterr()
    assert main(["diff", str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"a: {first}",
        f"b: {second}",
        "facts: 0 differ",
        "tensors: 0 of 16 differ",
        "answers: 0 of 1 differ",
    ]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"learning_rate": 0.02}}, {"$.training.learning_rate"}),
        pytest.param({"training": {"order_seed": 3}}, {"$.training.order_seed"}, marks=pytest.mark.slow),
        pytest.param(
            {"training": {"micro_batch_tokens": 64}}, {"$.training.micro_batch_tokens"}, marks=pytest.mark.slow
        ),
        pytest.param({"lora": {"alpha": 32}}, {"$.lora.alpha"}, marks=pytest.mark.slow),
        ({"lora": {"r": 4}}, {"$.lora.r", "$.lora.parameters"}),
        (
            {"lora": {"target_modules": ["q_proj"]}},
            {"$.lora.target_modules", "$.lora.layers", "$.lora.modules", "$.lora.parameters"},
        ),
    ],
    ids=lambda value: next(iter(next(iter(value.values())))) if isinstance(value, dict) else "",
)
def test_one_other_key_is_the_only_cause_named(
    sections: dict[str, Any], expected: set[str], first: Path, made: Callable[..., Path]
) -> None:
    second = made(**sections)
    found = compare_runs(first, second)
    [(section, keys)] = sections.items()
    in_recipe = {f"$.recipe.{section}.{key}" for key in keys}
    assert {fact.path for fact in found.facts if fact.group == "recipe"} == in_recipe
    assert {fact.path for fact in found.facts if fact.group not in OUTCOMES} - in_recipe == expected
    assert not found.equal
    assert not isinstance(found.tensors, str)
    if "r" in sections.get("lora", {}):
        assert len(found.tensors.reshaped) == 16
    elif "target_modules" in sections.get("lora", {}):
        assert len(found.tensors.only_a) == 12


def test_another_row_changes_the_data_alone(first: Path, made: Callable[..., Path]) -> None:
    second = made([*CONVERSATIONS[:-1], [("user", "Which colour is the sky?"), ("assistant", "Grey.")]])
    found = {fact.path for fact in compare_runs(first, second).facts if fact.group not in OUTCOMES}
    assert found == {*DATA, "$.masking.labels_sha256", "$.masking.tokens", "$.masking.supervised_tokens"}


def test_what_came_of_another_learning_rate_is_told(
    first: Path, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    second = made(training={"learning_rate": 0.02})
    capsys.readouterr()
    assert main(["diff", str(first), str(second), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    files = {fact["path"] for fact in data["facts"] if fact["group"] == "files"}
    assert {"$.lora.tensors_sha256", "$.files['adapter_model.safetensors'].sha256"} <= files
    kinds = {kind["kind"]: kind for kind in data["tensors"]["kinds"]}
    assert set(kinds) == {f"self_attn.{name}_proj.lora_{side}" for name in "qkvo" for side in "AB"}
    assert all(kind["different"] == kind["tensors"] == 2 for kind in kinds.values())
    assert all(0 < kind["max_abs"] < 0.1 and 0 < kind["cosine"] < 1 for kind in kinds.values())
    assert data["answers"]["compared"] == 1
