"""Folders that do not allow a run: an error before any weight is loaded, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from refusing_disks import read_only_folder, without_privileges
from tiny_runs import MakeRecipe

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training import prepare as preparation
from pytest_mistral_lora.training import run
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.run import train, work_folder
from pytest_mistral_lora.training.work_folder import WorkFolder


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rows or weights are read")

    for module, name in ((preparation, "resolve_base"), (preparation, "load_data"), (run, "load_base")):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that anybody may read, and nobody write."""
    with read_only_folder() as folder:
        folder.chmod(0o755)
        (folder / "out.work").mkdir(mode=0o755)
        folder.chmod(0o555)
        yield folder


def into(recipe: Recipe, output: Path) -> Recipe:
    return recipe.model_copy(update={"output": output})


def test_a_folder_that_may_not_be_written(make_recipe: MakeRecipe, read_only: Path) -> None:
    recipe = into(make_recipe(), read_only / "out")
    with without_privileges(), pytest.raises(InputError) as caught:
        train(recipe)
    assert caught.value.place == str(read_only)
    assert "cannot be written: Permission denied" in str(caught.value)


def test_a_work_folder_that_may_not_be_written(make_recipe: MakeRecipe, read_only: Path) -> None:
    read_only.chmod(0o777)
    (read_only / "out.work").chmod(0o555)
    recipe = into(make_recipe(), read_only / "out")
    with without_privileges(), pytest.raises(InputError) as caught:
        train(recipe)
    assert caught.value.place == str(read_only / "out.work")


@pytest.mark.parametrize("output", ["file/out", "out"])
def test_a_file_in_the_place_of_a_folder(make_recipe: MakeRecipe, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out.work").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File exists)"):
        train(into(make_recipe(), tmp_path / output))


def test_an_output_that_exists_leaves_why_and_nothing_else(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.output.mkdir()
    with pytest.raises(InputError, match="exists already"):
        train(recipe)
    assert [path.name for path in work_folder(recipe).iterdir()] == ["failure.json"]
    assert not list(recipe.output.iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out", resume=False)
    for left in (tmp_path / ".out.a1b2c3d4", work.path / "checkpoint-7"):
        left.mkdir()
        (left / "adapter_model.safetensors").write_bytes(b"half")
    others = tmp_path / ".out.of-another-kind"
    others.mkdir()
    (work.path / ".run.json.a1b2c3d4").write_text("{")
    (work.path / "failure.json").write_text("{}")
    assert work.claim("this run") is None
    assert {path.name for path in work.path.iterdir()} == {"run.json"}
    assert not (tmp_path / ".out.a1b2c3d4").exists()
    assert others.exists()
