"""`mistral-lora check recipe.yaml`: the recipe with its base, its rows and its adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from check_verb import check, rows
from cut_sentencepiece import cut_v3

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.collection import targets_of
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.conformance.targets import RecipeTarget, Target
from pytest_mistral_lora.errors import InputError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe beside its base and its rows, of which the third can be made to fail."""
    base = write_tiny_base(tmp_path / "base", cut_v3())
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {{path: base, weights_sha256: {BaseFolder(base).weights_sha256}}}\n"
        "data: {train: [rows.jsonl]}\n"
        "training: {steps: 1}\n"
        "output: out\n"
    )
    rows(tmp_path, "assistant")
    return path


def test_a_sound_recipe_passes_with_a_table(recipe: Path, capsys: Any) -> None:
    code, out = check(capsys, str(recipe), "-v")
    assert code == 0
    assert "FAILED" not in out
    assert {line.split()[1] for line in out.splitlines() if line.startswith(" recipe.yaml ")} == {
        "tokenizer",
        "template",
        "mask",
        "dataset",
    }


@pytest.mark.usefixtures("data_alone")
def test_a_bad_row_is_named_and_fails(recipe: Path, capsys: Any) -> None:
    rows(recipe.parent, "bot")
    code, out = check(capsys, str(recipe))
    assert code == 1
    assert "recipe.yaml::dataset::rows-are-valid FAILED" in out.splitlines()
    assert f"ML601 {recipe.parent / 'rows.jsonl'}:3, messages[1].role: 'bot'" in out


@pytest.mark.usefixtures("data_alone")
def test_json_is_the_report(recipe: Path, capsys: Any) -> None:
    rows(recipe.parent, "bot")
    code, out = check(capsys, str(recipe), "--json")
    data = json.loads(out)
    assert code == data["exit_status"] == 1
    assert data["counts"]["failed"] == 1
    failed = [one for one in data["checks"] if one["outcome"] == "failed"]
    assert [finding["rule"] for one in failed for finding in one["findings"]] == ["ML601"]


def test_paths_are_told_apart_by_what_is_there(recipe: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(shipped_tokenizer("spm-v3"), tmp_path / "tokenizer.model.v3"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    targets = targets_of([recognised(path) for path in (file, recipe, adapter, tmp_path / "base")])
    assert [(type(target), target.name) for target in targets] == [
        (Target, "tokenizer.model.v3"),
        (Target, "base"),
        (RecipeTarget, "recipe.yaml"),
        (AdapterTarget, "adapter"),
    ]
    with pytest.raises(InputError, match="no such file or folder"):
        recognised(tmp_path / "nope")


def outcomes(out: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(out)["checks"]:
        found.setdefault(one["outcome"], []).append(one)
    return found


def break_weights(folder: Path) -> None:
    with (folder / "base" / "model.safetensors").open("ab") as file:
        file.write(b"x")


def break_tokenizer(folder: Path) -> None:
    for file in (folder / "base").glob("tokenizer*"):
        file.write_bytes(b"{")


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        pytest.param(lambda folder: (folder / "base" / "model.safetensors").unlink(), "ML208", marks=pytest.mark.slow),
        (lambda folder: (folder / "base").rename(folder / "elsewhere"), "ML208"),
        pytest.param(break_weights, "ML208", marks=pytest.mark.slow),
        (break_tokenizer, "ML201"),
        (lambda folder: (folder / "recipe.yaml").write_text("base: {}\ndata: {}\n"), "ML640"),
    ],
)
def test_one_cause_is_one_failed_check(recipe: Path, capsys: Any, harm: Any, rule: str) -> None:
    harm(recipe.parent)
    code, out = check(capsys, str(recipe), "--json")
    by_outcome = outcomes(out)
    (failed,) = by_outcome["failed"]
    assert code == 1
    assert failed["nodeid"] == "mistral-golden::recipe.yaml::dataset::recipe"
    assert [finding["rule"] for finding in failed["findings"]] == [rule]
    reasons = {one["not_checked"] for one in by_outcome["skipped"]}
    assert f"recipe.yaml::dataset::recipe failed ({rule})" in reasons
    assert len(by_outcome["skipped"]) > 80


def test_a_base_that_fails_is_hashed_once(recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_mistral_lora.checkpoint import base_folder

    calls = []
    monkeypatch.setattr(base_folder, "sha256_files", lambda files: calls.append(files) or "0" * 64)
    assert check(capsys, str(recipe))[0] == 1
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("{steps: 1}", "{steps: 1}\nlora: {target_modules: [qproj]}", "'qproj' matches nothing"),
        pytest.param("{steps: 1}", "{steps: 1, report_to: [tensorbord]}", "'tensorbord'", marks=pytest.mark.slow),
        ("output: out", "output: rows.jsonl/out", "rows.jsonl is not a folder"),
        pytest.param("output: out", "output: base/out", "is inside the base", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("data_alone")
def test_train_and_check_refuse_the_same(recipe: Path, capsys: Any, old: str, new: str, found: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    code, out = check(capsys, str(recipe), "--json")
    (failed,) = outcomes(out)["failed"]
    ((finding,),) = [failed["findings"]]
    assert (code, failed["case"], finding["rule"]) == (1, "recipe", "ML641")
    assert found in finding["found"]
    assert main(["train", str(recipe)]) == 2
    assert finding["found"] in capsys.readouterr().err


@pytest.mark.usefixtures("data_alone")
def test_a_machine_that_cannot_train_a_recipe_is_noted(recipe: Path, capsys: Any) -> None:
    recipe.write_text(recipe.read_text().replace("{steps: 1}", "{steps: 1, kernels: liger}"))
    code, out = check(capsys, str(recipe), "--json")
    noted = [one for one in outcomes(out)["passed"] if one["findings"]]
    assert (code, [(one["case"], one["findings"][0]["rule"]) for one in noted]) == (0, [("recipe", "ML642")])


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        pytest.param({"layer_types": ["full_attention"] * 2}, "MistralForCausalLM", marks=pytest.mark.slow),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}, "MinistralForCausalLM"),
    ],
)
@pytest.mark.usefixtures("data_alone")
def test_layers_are_listed_with_the_class_that_is_trained(
    recipe: Path, capsys: Any, keys: dict[str, Any], name: str
) -> None:
    file = recipe.parent / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    layers = f"8 of {name}: model.layers.*.self_attn.q_proj, model.layers.*.self_attn.k_proj"
    code, out = check(capsys, str(recipe), "-v")
    assert code == 0
    assert f"layers of recipe.yaml: {layers}" in out
    assert main(["train", str(recipe)]) == 0
    assert f"layers with an adapter: {layers}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda folder: (folder / "base").rename(folder / "elsewhere"), marks=pytest.mark.slow),
        break_weights,
    ],
)
def test_the_adapter_of_a_recipe_adds_no_failure_to_that_of_its_base(recipe: Path, capsys: Any, harm: Any) -> None:
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    harm(recipe.parent)
    code, out = check(capsys, str(recipe), "--json")
    by_outcome = outcomes(out)
    assert (code, [one["case"] for one in by_outcome["failed"]]) == (1, ["recipe"])
    # what needs no base is judged as before
    assert {"adapter", "manifest"} <= {one["subject"] for one in by_outcome["passed"]}
