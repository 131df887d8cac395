"""Every command finds the same base of an adapter, from every working directory, and takes no other folder for it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cut_sentencepiece import cut_v3
from forked import run_forked
from safetensors.torch import load_file, save_file
from sampling import sampled
from suite_outcomes import suite_outcomes
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora import cli
from pytest_mistral_lora.assertions import assert_adapter_sound
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.run import train

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
NEEDS_BASE = {"adapter::fits-base", "adapter::changes-the-base", "manifest::base", "manifest::declared"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A project with `recipe.yaml`, `models/base` and `lora-out`; the recipe gives the base no name."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(base, project / "models" / "base")
    write_rows(project / "rows.jsonl")
    recipe = recipe_data(base, training={"steps": 1}, evaluation={"generations": 1, "max_new_tokens": 2})
    recipe["base"] = {"path": "models/base", "weights_sha256": recipe["base"]["weights_sha256"]}
    (project / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output": "lora-out"}))
    train(load_recipe(project / "recipe.yaml"))
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "here" / "project"))


@pytest.fixture(params=sampled(["project", "project/lora-out", "/"], ["/"]))
def adapter(request: pytest.FixtureRequest, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the adapter, relative to a working directory."""
    monkeypatch.chdir(project.parent / request.param)
    return Path(os.path.relpath(project / "lora-out"))


def not_checked(adapter: Path, base: Path | None = None) -> dict[str, str]:
    """Return the reason of each check of the suite that did not run; no check may fail."""
    outcomes = {f"{outcome.subject}::{outcome.case}": outcome for outcome in suite_outcomes([adapter], base)}
    assert [name for name, outcome in outcomes.items() if outcome.state == "failed"] == []
    return {name: outcome.not_checked for name, outcome in outcomes.items() if outcome.not_checked}


def verified(adapter: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    capsys.readouterr()
    assert cli.main(["verify", str(adapter), "--json"]) == 0
    return {one["name"]: (one["state"], one["found"]) for one in json.loads(capsys.readouterr().out)}


def test_every_command_finds_the_base_from_every_working_directory(
    adapter: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = project / "models" / "base"
    assert not NEEDS_BASE & not_checked(adapter).keys()
    assert compare(adapter).base.samefile(base)
    assert verified(adapter, capsys)["base_weights_sha256"][0] == "match"
    assert merge(adapter, tmp_path / "merged", device="cpu").manifest["base"] == "models/base"


def test_the_plugin_finds_the_base_from_another_working_directory(project: Path, tmp_path: Path) -> None:
    words = ("--mistral-golden", "--mistral-adapter", os.path.relpath(project / "lora-out", tmp_path), "-v")
    chosen = ("-p", "no:cacheprovider", "-k", "adapter::fits-base or manifest::base or manifest::declared")
    command = [sys.executable, "-m", "pytest", *words, *chosen]
    done = run_forked(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" PASSED") == 4  # and manifest::base-config
    assert "SKIPPED" not in done.stdout


def test_without_a_manifest_the_configuration_is_enough(adapter: Path, project: Path) -> None:
    (adapter / MANIFEST).unlink()
    shutil.rmtree(adapter / "transcripts")
    assert not {"adapter::fits-base", "adapter::changes-the-base"} & not_checked(adapter).keys()
    found = AdapterFolder(adapter).located_base.folder
    assert found is not None
    assert found.path.samefile(project / "models" / "base")
    file = adapter / TENSORS
    tensors = load_file(file)
    name = next(name for name in tensors if ".lora_A." in name)
    save_file({**tensors, name: torch.cat([tensors[name], tensors[name][:, :1]], dim=1)}, file)
    with pytest.raises(AssertionError, match=r"^ML412 "):
        assert_adapter_sound(adapter)


def test_a_base_with_other_weights_is_not_taken_by_any_command(
    adapter: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = project / "models" / "base"
    shutil.rmtree(other)
    write_tiny_base(other, cut_v3(), seed=1)
    reason = AdapterFolder(adapter).located_base.missing
    assert f"'models/base' is missing; {other.resolve()} has other weights" in reason
    skipped = not_checked(adapter)
    assert {reason in skipped[name] for name in NEEDS_BASE} == {True}
    assert verified(adapter, capsys)["base_weights_sha256"] == ("not available", reason)
    for command in (lambda: compare(adapter), lambda: merge(adapter, tmp_path / "merged", device="cpu")):
        with pytest.raises(InputError) as caught:
            command()
        assert caught.value.found == reason


def recorded(folder: Path, name: str, *, weights: bool = False) -> AdapterFolder:
    """Change the recorded name of the base, in the manifest or, without a hash, in the configuration alone."""
    file = folder / (MANIFEST if weights else CONFIG)
    key = "base" if weights else "base_model_name_or_path"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: name}))
    if not weights:
        (folder / MANIFEST).unlink()
    return AdapterFolder(folder)


def _as_configuration_alone(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return str(folder)


def _as_link(folder: Path) -> str:
    (folder.parent / "link").symlink_to(folder)
    return str(folder.parent / "link")


@pytest.mark.parametrize(
    "name",
    ["", "\0", "x" * 5000, "/", ".", "..", "../../../../etc", "/dev", "models", _as_configuration_alone, _as_link],
    ids=lambda name: name.__name__ if callable(name) else repr(name),  # the same in every worker of pytest-xdist
)
def test_a_name_that_leads_to_no_base_is_data(name: str | Callable[[Path], str], project: Path) -> None:
    adapter, base = project / "lora-out", project / "models" / "base"
    found = recorded(adapter, name if isinstance(name, str) else name(base)).located_base
    assert found.folder is None
    assert found.missing


@pytest.mark.parametrize("name", ["../elsewhere/base", "{here}/elsewhere/base", "{here}/link"])
def test_a_name_that_leaves_the_project_needs_the_recorded_weights(name: str, project: Path, base: Path) -> None:
    here, elsewhere = project.parent, project.parent / "elsewhere" / "base"
    shutil.move(project / "models" / "base", elsewhere)
    (here / "link").symlink_to(elsewhere)
    folder = recorded(project / "lora-out", name.format(here=here), weights=True)
    found = folder.located_base.folder
    assert found is not None
    assert found.path.samefile(elsewhere)
    shutil.rmtree(elsewhere)
    write_tiny_base(elsewhere, cut_v3(), seed=1)
    assert AdapterFolder(folder.path).located_base.folder is None


def test_a_base_is_found_from_an_output_below_the_project(project: Path) -> None:
    manifest = json.loads((project / "lora-out" / MANIFEST).read_text())
    manifest["recipe"]["output"] = "runs/first/lora-out"
    (project / "lora-out" / MANIFEST).write_text(json.dumps(manifest))
    (project / "runs" / "first").mkdir(parents=True)
    moved = Path(shutil.move(project / "lora-out", project / "runs" / "first" / "lora-out"))
    found = AdapterFolder(moved).located_base.folder
    assert found is not None
    assert found.path == (project / "models" / "base").resolve()
