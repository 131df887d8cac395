from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from safetensors.torch import load_file
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora import training
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import FindingsError, InputError, PinError, RecipeError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.generate import adapter_effect, load_adapted, probe
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import work_folder


def test_every_public_name_can_be_imported() -> None:
    for name in training.__all__:
        assert getattr(training, name).__name__ == name


def test_the_folder_holds_the_adapter_and_no_base_weight(run: RunResult) -> None:
    saved = load_file(run.output / "adapter_model.safetensors")
    assert saved.keys() == run.adapter.tensors.keys()
    assert all(".lora_" in name for name in saved)
    assert not list(run.output.glob("model*.safetensors"))


def test_model_in_memory_knows_the_rows_by_heart(run: RunResult) -> None:
    assert [one.equal for one in run.completions] == [True] * 5
    assert [one.stop for one in run.completions] == ["eos"] * 5


def test_same_seed_in_a_fresh_process_writes_the_same_folder(run: RunResult, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    data = recipe_data(run.base_folder, evaluation={"generations": 5, "max_new_tokens": 40})
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    # a process with another order of sets than this one
    done = run_forked([sys.executable, "-m", "pytest_mistral_lora.training", tmp_path / "recipe.yaml"])
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr  # a log file keeps each state of a line that is redrawn
    first, second = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (run.output, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_adapter_whose_names_do_not_fit_is_refused(run: RunResult, tmp_path: Path) -> None:
    from peft import PeftConfig
    from safetensors.torch import save_file

    tensors = load_file(run.output / "adapter_model.safetensors")
    PeftConfig.from_pretrained(run.output).save_pretrained(tmp_path)
    renamed = {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(InputError, match="do not fit the base"),
    ):
        load_adapted(AdapterFolder(tmp_path), BaseFolder(run.base_folder), "fp32", "cpu")


def test_adapter_effect_is_zero_before_training(run: RunResult) -> None:
    with run.model.disable_adapter():
        without = probe(run.model, run.data.train.encoded)
    assert without.sha256 != run.probe.sha256
    assert adapter_effect(run.model, run.data.train.encoded) > 1


def test_rendered_row_shows_pieces_labels_and_spans(run: RunResult) -> None:
    row = json.loads((run.output / "rendered_row.json").read_text())
    encoded = run.data.train.encoded[0]
    assert row["input_ids"] == list(encoded.input_ids)
    assert row["labels"] == list(encoded.labels or ())
    assert len(row["pieces"]) == len(row["input_ids"])
    assert row["pieces"][0] == "<s>"
    assert row["spans"][-1]["kind"] == "eos"


def test_finished_run_leaves_no_work_folder(run: RunResult) -> None:
    assert not run.output.with_name("out.work").exists()


def test_output_that_exists_is_an_error_and_stays(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.output.mkdir()
    with pytest.raises(InputError, match="exists already"):
        train(recipe)
    assert list(recipe.output.iterdir()) == []


def test_other_weights_than_the_pinned_ones_are_refused(make_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_recipe()
    other = recipe.model_copy(update={"base": recipe.base.model_copy(update={"weights_sha256": "0" * 64})})
    with pytest.raises(PinError, match="sha256sum"):
        train(other)


@pytest.mark.parametrize(
    "architecture", ["Mistral3ForConditionalGeneration", "Ministral3ForCausalLM", "MixtralForCausalLM"]
)
def test_other_architectures_are_refused_by_name(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, architecture: str
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).hardlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    recipe = make_recipe(folder)
    with pytest.raises(RecipeError, match=architecture):
        train(recipe)
    assert not recipe.output.exists()


def test_failure_names_cause_rows_and_exit_code(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"max_length": 26})
    with pytest.raises(FindingsError):
        train(recipe)
    failure: dict[str, Any] = json.loads((work_folder(recipe) / "failure.json").read_text())
    assert failure["rows"] == [f"{recipe.data.train[0]}:{line}" for line in (2, 3)]
    assert failure["exit_code"] == 1
    assert "at most training.max_length = 26" in failure["cause"]
    assert not recipe.output.exists()


def test_files_of_a_run_and_of_a_merge_have_the_permissions_that_the_umask_gives(make_full: MakeRecipe) -> None:
    recipe = make_full(training={"steps": 2}, evaluation={"generations": 1, "max_new_tokens": 2})
    # neither the modes of a temporary file nor those of the usual umask
    before = os.umask(0o027)
    try:
        result = train(recipe)
        merged = merge(result.output, result.output.with_name("merged"), result.base_folder)
    finally:
        os.umask(before)
    files = [path for folder in (result.output, merged.output) for path in (folder, *folder.rglob("*"))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640, 0o750}, [
        (path.name, oct(path.stat().st_mode)) for path in files
    ]
