from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import declare
from safetensors.torch import load_file, save_file
from tiny_runs import CONVERSATIONS, recipe_data, write_rows

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.rerun import _elsewhere, _recipe, rerun
from pytest_mistral_lora.training.run import RunResult, train

DRAWN = {
    "lora": {"dropout": 0.1},
    "training": {"steps": 8, "batch_size": 2, "eval_steps": 4},
    "data": {"held_out": 0.2},
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """A run with everything that draws random numbers: dropout, an order, a split; and generations on the way."""
    folder = tmp_path_factory.mktemp("short")
    write_rows(folder / "rows.jsonl")
    evaluation = {"generations": 1, "max_new_tokens": 4, "generation_steps": 4}
    return train(parse_recipe(recipe_data(base, **DRAWN, evaluation=evaluation), folder=folder))


@pytest.fixture
def folder(short: RunResult, tmp_path: Path) -> Path:
    """The run's folder, with the rows beside it as the recipe had them."""
    write_rows(tmp_path / "rows.jsonl")
    return Path(shutil.copytree(short.output, tmp_path / "out"))


def redeclared(folder: Path, part: str, change: Mapping[str, Any]) -> None:
    """Change a section of the recipe in the manifest, as if the run had been made from it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"][part] = {**manifest["recipe"].get(part, {}), **change}
    declare(folder, manifest)


def test_the_manifest_alone_gives_the_same_adapter_bit_for_bit(folder: Path) -> None:
    again = rerun(folder)
    assert (again.sha256, again.distance, again.elsewhere) == (again.recorded_sha256, 0.0, ())
    assert (again.fact.state, again.fact.found) == ("match", "equal bit for bit")


def test_base_and_rows_may_have_moved(short: RunResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(short.output, tmp_path / "moved" / "adapter"))
    rows = write_rows(tmp_path / "renamed.jsonl")
    base = Path(shutil.copytree(short.base_folder, tmp_path / "elsewhere"))
    assert rerun(folder, base=base, dataset=[rows]).fact.state == "match"
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        rerun(folder, base=base)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        pytest.param("training", {"seed": 1}, marks=pytest.mark.slow),
        ("training", {"learning_rate": 0.0101}),
        ("lora", {"dropout": 0.0}),
        pytest.param("lora", {"alpha": 17.0}, marks=pytest.mark.slow),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_another_recipe_than_was_trained_is_a_mismatch(folder: Path, part: str, change: dict[str, Any]) -> None:
    redeclared(folder, part, change)
    again = rerun(folder)
    assert again.fact.state == "mismatch"
    assert again.distance > 0
    assert "equal was expected on this machine" in again.fact.found


def test_an_adapter_that_was_not_trained_so_is_a_mismatch(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * 1.001}, file)
    assert rerun(folder).fact.state == "mismatch"


@pytest.mark.slow
def test_on_another_processor_the_adapter_is_near(folder: Path, short: RunResult) -> None:
    """PyTorch without its vector instructions adds up in another order."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "verify", str(folder), "--rerun", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fact = json.loads(done.stdout)[-1]
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no vector instructions that could be left out")
    assert (fact["name"], fact["state"]) == ("rerun", "match")
    assert "10% are allowed, with another processor (DEFAULT)" in fact["found"]


def test_other_libraries_do_not_excuse_another_recipe(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["environment"]["packages"]["torch"] = "2.0.0"
    declare(folder, manifest)
    redeclared(folder, "training", {"learning_rate": 0.01001})
    near = rerun(folder)
    assert near.elsewhere == (f"torch ({torch.__version__})",)
    assert (near.fact.state, 0 < near.distance < near.tolerance) == ("match", True)
    redeclared(folder, "training", {"seed": 1})
    assert rerun(folder).fact.state == "mismatch"


def test_a_run_whose_memory_ran_out_or_in_an_image_may_be_rounded_otherwise(short: RunResult) -> None:
    training = {**short.manifest["training"], "memory_relief": ["micro_batch_tokens: 40 from step 1 on"]}
    assert list(_elsewhere(short.manifest)) == []
    [why] = _elsewhere({**short.manifest, "training": training})
    assert why.startswith("size of passes")
    environment = {**short.manifest["environment"], "image": f"sha256:{'0' * 64}"}
    assert list(_elsewhere({**short.manifest, "environment": environment})) == ["image (None)"]


def test_a_declared_tokenizer_is_that_of_the_rerun(folder: Path, short: RunResult, tmp_path: Path) -> None:
    file = tmp_path / "own.model.v3"
    shutil.copy(shipped_tokenizer("spm-v3"), file)
    for oracle, expected in (("spm-v3", "spm-v3"), ("own.model.v3", str(file))):
        redeclared(folder, "base", {"oracle": oracle})
        recipe = _recipe(AdapterFolder(folder, BaseFolder(short.base_folder)), None, tmp_path / "again")
        assert recipe.base.oracle == expected


def test_what_cannot_be_trained_again_says_why(folder: Path, short: RunResult, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", CONVERSATIONS[:4])
    with pytest.raises(InputError, match=r"(?s)other\.jsonl.*as recorded.*--dataset"):
        rerun(folder, dataset=[other])
    for output in ("/elsewhere/with/more/folders/than/here/out", "../out", "many/folders/" * 20 + "out"):
        written = json.loads((folder / "manifest.json").read_text())
        declare(folder, {**written, "recipe": {**written["recipe"], "output": output}})
        with pytest.raises(InputError, match=r"(?s)other\.jsonl.*as recorded.*--dataset"):
            rerun(folder, dataset=[other])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file.*--dataset"):
        rerun(folder)
    write_rows(tmp_path / "rows.jsonl")
    base = Path(shutil.copytree(short.base_folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, base / "model.safetensors")
    with pytest.raises(InputError, match=r"(?s)as recorded.*--base"):
        rerun(folder, base=base)
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {key: manifest[key] for key in ("base", "dataset_sha256", "seed")}
    declare(folder, {"revision": None, "base_weights_sha256": "0" * 64, **known})
    with pytest.raises(InputError, match="records no recipe"):
        rerun(folder)
