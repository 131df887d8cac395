"""Each way to train gives a sound adapter that verifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import HELD_OUT, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import FindingsError, RowError, RowsError, TrainingError
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_folder import describe_failure, work_folder


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "activation_checkpointing": True},
        {"steps": None, "epochs": 2, "batch_size": 2, "micro_batch_tokens": 1},
        pytest.param({"schedule": "linear", "warmup_steps": 1}, marks=pytest.mark.slow),
        pytest.param({"schedule": "constant", "warmup_steps": 2}, marks=pytest.mark.slow),
        {"weight_decay": 0.1, "max_grad_norm": 0.0},
    ],
)
def test_training_settings(make_recipe: MakeRecipe, base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(make_recipe(training={"steps": 4, **settings}))
    assert {fact.state for fact in verify(result.output, base=base, dataset=tmp_path)} == {"match"}
    assert result.log[-1]["loss"] < result.log[0]["loss"] or result.manifest["training"]["steps"] < 10
    recorded = result.manifest["training"]
    for name, value in settings.items():
        if value is not None and name not in ("schedule", "warmup_steps"):
            assert recorded[name] == value
    assert recorded["schedule"]["name"] == settings.get("schedule", "constant")
    assert recorded["steps"] == {None: 6}.get(settings.get("steps", 4), 4)


@pytest.mark.parametrize("lora", [{"rslora": True}, {"dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}])
def test_lora_settings(make_recipe: MakeRecipe, base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    result = train(make_recipe(training={"steps": 4}, lora=lora))
    assert {fact.state for fact in verify(result.output, base=base, dataset=tmp_path)} == {"match"}
    assert result.manifest["lora"]["layers"] == 2 * len(lora.get("target_modules", "qkvo"))


def test_chat_template_backend_trains_the_same_rows_to_the_same_adapter(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    oracle = train(make_recipe(training={"steps": 3}))
    oracle.output.rename(tmp_path / "oracle")
    data = {**recipe_data(base, training={"steps": 3}), "backend": "chat-template"}
    template = train(parse_recipe(data, folder=tmp_path))
    assert template.manifest["tokenizer"]["backend"] == "chat-template"
    assert template.manifest["lora"] == oracle.manifest["lora"]
    assert template.manifest["masking"] == oracle.manifest["masking"]
    facts = {fact.name: fact.state for fact in verify(template.output, base=base, dataset=tmp_path)}
    assert set(facts.values()) == {"match"}
    assert "masking.labels_sha256" in facts


def test_verify_encodes_again_through_the_folders_own_chat_template(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    data = {**recipe_data(base, training={"steps": 3}), "backend": "chat-template"}
    file = train(parse_recipe(data, folder=tmp_path)).output / "chat_template.jinja"

    def mismatches() -> set[str]:
        return {fact.name for fact in verify(tmp_path / "out", dataset=tmp_path) if fact.state == "mismatch"}

    hashes = {"template.sha256", "template.probe_sha256"}
    hashes |= {"files.chat_template.jinja.sha256", "files.chat_template.jinja.size"}
    file.write_text(file.read_text().replace("[INST]", "[INST] "))
    assert mismatches() == hashes | {"masking.ids_sha256", "masking.labels_sha256", "masking.tokens"}
    file.unlink()
    assert mismatches() == hashes | {"masking.ids_sha256"}


def test_held_out_loss_is_measured_before_and_after(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.jsonl", HELD_OUT)
    result = train(make_recipe(data={"eval": ["eval.jsonl"]}, training={"steps": 10, "eval_steps": 5}))
    losses = [line["eval_loss"] for line in result.log if "eval_loss" in line]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    results = result.manifest["evaluation"][0]["results"]
    assert (results["held-out loss, before"], results["held-out loss, after"]) == (losses[0], losses[-1])
    assert result.manifest["dataset"]["eval_files"][0]["path"] == "eval.jsonl"
    assert "dataset.eval_files[0].sha256" in {fact.name for fact in verify(result.output, dataset=tmp_path)}


def written(folder: Path, base: Path, **sections: dict[str, Any]) -> str:
    write_rows(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(json.dumps(recipe_data(base, **sections)))
    return str(folder / "recipe.yaml")


def test_exit_codes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", written(tmp_path, base, training={"steps": 2, "learning_rate": 0.0})]) == 1
    assert "did not move" in capsys.readouterr().err
    failure = json.loads((tmp_path / "out.work" / "failure.json").read_text())
    assert failure["exit_code"] == 1
    assert main(["train", written(tmp_path, base, training={"steps": 0})]) == 2
    assert "training.steps: 0" in capsys.readouterr().err
    assert main(["train", written(tmp_path, base, training={"steps": 2}), "--resume"]) == 2
    assert "another training.learning_rate (0.0, now " in capsys.readouterr().err


def test_a_run_that_failed_can_be_started_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"steps": 2, "max_length": 5})
    with pytest.raises(FindingsError):
        train(recipe)
    assert (work_folder(recipe) / "failure.json").is_file()
    result = train(make_recipe(training={"steps": 2}))
    assert result.output.is_dir()
    assert not work_folder(recipe).exists()


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (MemoryError(), 3, "micro_batch_tokens"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            3,
            "micro_batch_tokens",
        ),
        (KeyboardInterrupt(), 130, ""),
        (TrainingError("the loss is nan", next_step="Lower it."), 1, "Lower it."),
        (RowsError([RowError("bad", place="a.jsonl:3")], place="a.jsonl"), 2, ""),
        (RuntimeError("something else"), 1, ""),
    ],
)
def test_failures_are_described(error: BaseException, code: int, advice: str) -> None:
    found = describe_failure(error)
    assert found["exit_code"] == code
    assert advice in found["advice"]
    assert found["cause"]
    assert found["rows"] == (["a.jsonl:3"] if isinstance(error, RowsError) else [])
