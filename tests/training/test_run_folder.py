"""Folders that do not allow a run: an error before any weight is loaded, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from refusing_disks import read_only_folder, without_privileges
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training import prepare as preparation
from pytest_mistral_lora.training import run
from pytest_mistral_lora.training.output_folder import sole_writer
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_folder import LIST, RunFolder, work_folder


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rows or weights are read")

    for module, name in ((preparation, "resolve_base"), (preparation, "load_rows"), (run, "load_base")):
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
    assert str(caught.value.place) == str(read_only)
    assert "cannot be written: Permission denied" in str(caught.value)


def test_a_work_folder_that_may_not_be_written(make_recipe: MakeRecipe, read_only: Path) -> None:
    read_only.chmod(0o777)
    (read_only / "out.work").chmod(0o555)
    recipe = into(make_recipe(), read_only / "out")
    with without_privileges(), pytest.raises(InputError) as caught:
        train(recipe)
    assert str(caught.value.place) == str(read_only / "out.work")


@pytest.mark.parametrize("output", ["file/out", "out"])
def test_a_file_in_the_place_of_a_folder(make_recipe: MakeRecipe, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out.work").write_text("")
    with pytest.raises(InputError, match=r"file is not a folder|cannot be written: File exists"):
        train(into(make_recipe(), tmp_path / output))


def test_an_output_that_exists_leaves_why_and_nothing_else(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    recipe.output.mkdir()
    with pytest.raises(InputError, match="exists already"):
        train(recipe)
    assert [path.name for path in work_folder(recipe).iterdir()] == ["failure.json"]
    assert not list(recipe.output.iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    run.open(resume=False)
    for left in (tmp_path / ".out.a1b2c3d4.unfinished", run.work / "checkpoint-7"):
        left.mkdir()
        (left / "adapter_model.safetensors").write_bytes(b"half")
    others = tmp_path / ".out.previous"
    others.mkdir()
    (run.work / ".run.json.a1b2c3d4").write_text("{")
    (run.work / "failure.json").write_text("{}")
    with sole_writer(tmp_path / "out"):
        assert run.claim({"recipe": "this one"}) is None
    assert {path.name for path in run.work.iterdir()} == {"run.json"}
    assert not (tmp_path / ".out.a1b2c3d4.unfinished").exists()
    assert others.exists()


HOLDER = """
import sys, time
from pathlib import Path
from pytest_mistral_lora.training.output_folder import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the output `out`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_into_the_same_output_is_kept_out_until_the_first_has_ended(
    make_recipe: MakeRecipe, held: subprocess.Popen[str], resume: bool
) -> None:
    recipe = make_recipe()
    with pytest.raises(InputError, match="out: another process writes it"):
        train(recipe, resume=resume)
    assert not work_folder(recipe).exists()
    held.kill()
    held.wait()
    # a killed process leaves the file, but not the lock: this run gets as far as its base
    with pytest.raises(AssertionError, match="rows or weights are read"):
        train(recipe, resume=resume)
    assert not list(recipe.output.parent.glob(".out.lock"))


EARLY = """
import sys
from pytest_mistral_lora.cli import main
print(*[main(["train", recipe]) for recipe in sys.argv[1:]])
print(*[name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""


def test_a_fault_that_needs_no_torch_is_reported_without_it(base: Path, tmp_path: Path) -> None:
    changes = {
        "a finished run": ("output", "out", "exists already"),
        "an unfinished run": ("output", "out", "an unfinished run is there, at step 3"),
        "an output in the base": ("output", str(base / "out"), "is inside the base"),
        "no base": ("base", recipe_data(base)["base"] | {"path": "nowhere"}, "no such folder"),
        "no rows": ("data", {"train": ["nothing.jsonl"]}, "nothing.jsonl: cannot be read: No such file or directory"),
    }
    for name, (key, value, _) in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe_data(base), key: value}))
    (tmp_path / "a finished run" / "out").mkdir()
    (checkpoint := tmp_path / "an unfinished run" / "out.work" / "checkpoint-3").mkdir(parents=True)
    (checkpoint / LIST).write_text("{}")
    command = [sys.executable, "-c", EARLY, *(str(tmp_path / name / "recipe.yaml") for name in changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{' '.join('2' * len(changes))}\n\n"
    for line, (_, _, words) in zip(done.stderr.splitlines(), changes.values(), strict=True):
        assert words in line
