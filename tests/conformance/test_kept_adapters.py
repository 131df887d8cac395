"""The results of a finished adapter are kept, too: its checks run again if anything has changed that they read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors
from forked import run_forked

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance import kept_results
from pytest_mistral_lora.conformance.adapter.weights import reason_not_to_load
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect, targets_of
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.kept_results import KeptResults
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

OF_ADAPTER = {"adapter", "manifest", "transcript"}
OF_RECIPE = {"dataset", "tokenizer", "template", "mask"}
HEAVY = ("torch", "transformers", "peft", "pydantic", "mistral_common", "safetensors", "numpy", "hypothesis")
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

_NOTED = """
import json, os, sys
opened = {}
def note(event, arguments):
    # one with an opener of its own is reported by `os.open`, too, which gives no mode
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[1] is not None:
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(os.getcwd() + os.sep) and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            name = os.path.relpath(path)
            opened[name] = opened.get(name, 0) + 1
sys.addaudithook(note)
from pytest_mistral_lora.cli import main
code = main(sys.argv[1:])
print("\\n" + json.dumps([code, opened, sorted(sys.modules)]))
"""


def check_noted(folder: Path, *words: str, new: bool = False) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Check in another process, and return the report, how often each file was opened, and the imported modules."""
    command = [sys.executable, "-c", _NOTED, "check", *words, "--examples", "1", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    if new:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    else:
        done = run_forked(command, cwd=folder, env=environment)
    output, _, noted = done.stdout.rstrip().rpartition("\n")
    code, opened, modules = json.loads(noted)
    assert code == 0, done.stdout + done.stderr
    return json.loads(output), opened, modules


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[dict[str, Any]]:
    """A recipe with its finished adapter, whose results are in the cache, and the first check of it."""
    folder = tmp_path_factory.mktemp("made") / "work"
    folder.mkdir()
    shutil.copytree(tiny_base, folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "recipe.yaml").write_text(
        f"base: {{path: base, weights_sha256: {BaseFolder(tiny_base).weights_sha256}}}\n"
        "data: {train: [rows.jsonl]}\ntraining: {steps: 2, learning_rate: 1e-2, device: cpu}\n"
        "evaluation: {generations: 1}\noutput: lora-out\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISTRAL_LORA_CACHE", str(folder.parent / "cache"))
        # `check` sets it for its own process
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.delenv("CI", raising=False)
        trained = run_forked([sys.executable, "-m", "pytest_mistral_lora.cli", "train", "recipe.yaml"], cwd=folder)
        assert trained.returncode == 0, trained.stderr
        assert any((folder / "lora-out" / TRANSCRIPTS).iterdir())
        report, opened, _ = check_noted(folder, "recipe.yaml")
        yield {"folder": folder, "report": report, "opened": opened}


@pytest.fixture
def work(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the recipe, which is as it was after the test."""
    folder: Path = made["folder"]
    monkeypatch.chdir(folder)
    saved = folder.parent / "saved"
    shutil.copytree(folder, saved)
    yield folder
    for path in {*folder.rglob("*"), *(folder / file.relative_to(saved) for file in saved.rglob("*"))}:
        before = saved / path.relative_to(folder)
        if before.is_dir() or (before.is_file() and path.is_file() and before.read_bytes() == path.read_bytes()):
            os.utime(path, ns=(before.stat().st_atime_ns, before.stat().st_mtime_ns))
        elif before.is_file():
            shutil.copy2(before, path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(saved)


def kept_subjects(folder: Path, *names: str, **settings: Any) -> set[str]:
    """Return the subjects of the current folder whose results would be taken from the cache; no check runs."""
    chosen = {"examples": 1, "seed": None, "device": "auto", "skip_training": True, "golden_folders": ()}
    run = Settings(**{**chosen, "update": False, "shared_folder": folder, **settings})
    targets = targets_of([recognised(Path(name)) for name in names or ("recipe.yaml",)])
    checks = list(collect(targets, run, KeptResults(folder.parent / "cache" / "results")))
    kept = {check.subject for check in checks if check.is_kept}
    assert not kept & {check.subject for check in checks if not check.is_kept} - {"dataset"}
    return kept - (
        {"dataset"} if any(check.case == "rows-are-valid" and not check.is_kept for check in checks) else set()
    )


def test_a_second_check_says_the_same_and_loads_no_library(made: dict[str, Any]) -> None:
    report, opened, modules = check_noted(made["folder"], "recipe.yaml", new=True)

    def records(data: dict[str, Any]) -> list[dict[str, Any]]:
        return [{name: value for name, value in check.items() if name != "seconds"} for check in data["checks"]]

    assert records(report) == records(made["report"])
    assert {check["subject"] for check in report["checks"]} == OF_ADAPTER | OF_RECIPE
    assert [name for name in HEAVY if name in modules] == []
    assert opened["recipe.yaml"] == 1


def test_all_that_the_checks_of_an_adapter_open_is_declared(made: dict[str, Any]) -> None:
    folder, opened = made["folder"], made["opened"]
    assert {"lora-out/adapter_model.safetensors", "lora-out/manifest.json", "base/model.safetensors"} <= set(opened)
    of_adapter: set[Path] = set()
    declared: set[Path] = set()
    for entry in (folder.parent / "cache" / "results").glob("[!g]*.json"):  # without the note on the green run
        content = json.loads(entry.read_text())["content"]
        paths = {(folder / path).resolve() for path in content["content"]}
        declared |= paths
        if {check["subject"] for check in content["checks"]} & OF_ADAPTER:
            of_adapter |= paths
            assert (folder / "lora-out").resolve() in paths
            assert (folder / "base").resolve() in paths
    assert of_adapter
    read = [folder / name for name in opened if not name.startswith((".hypothesis/", "<"))]
    assert [file for file in read if not declared & {file.resolve(), *file.resolve().parents}] == []


def flip(file: Path) -> None:
    """Change the last byte of a file, and keep its size and its time."""
    before = file.stat()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes((data[-1] ^ 1,)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def of_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        [file] = folder.glob(name)
        flip(file)

    return change


def add_file(folder: Path) -> None:
    (folder / "lora-out" / "more.txt").write_text("more")


def replace_recipe(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("1e-2", "2e-2"))


def touch_tensors(folder: Path) -> None:
    os.utime(folder / "lora-out" / "adapter_model.safetensors", ns=(1, 1))


def begin_repository(folder: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda folder: None, OF_ADAPTER | OF_RECIPE),
        (of_folder("lora-out/adapter_model.safetensors"), OF_RECIPE),
        (of_folder("lora-out/adapter_config.json"), OF_RECIPE),
        (of_folder("lora-out/manifest.json"), OF_RECIPE),
        (of_folder(f"lora-out/{TRANSCRIPTS}/*.json"), OF_RECIPE),
        (of_folder("lora-out/tokenizer.model.v3"), OF_RECIPE),
        (add_file, OF_RECIPE),
        (touch_tensors, OF_RECIPE),
        (of_folder("base/model.safetensors"), set()),
        (of_folder("base/config.json"), set()),
        (replace_recipe, set()),
        # the rows are no input of the model
        (of_folder("rows.jsonl"), (OF_ADAPTER | OF_RECIPE) - {"dataset", "manifest"}),
        # nor is the history that the record is compared with
        (begin_repository, (OF_ADAPTER | OF_RECIPE) - {"manifest"}),
    ],
    # names of their own: a set has another order in each process
    ids=[f"change-{number}" for number in range(13)],
)
def test_a_change_runs_the_checks_that_read_it(change: Callable[[Path], None], kept: set[str], work: Path) -> None:
    change(work)
    assert kept_subjects(work) == kept


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"require_manifest": True}])
def test_another_option_runs_all_checks(option: dict[str, Any], work: Path) -> None:
    assert kept_subjects(work, **option) == set()


def test_an_edited_library_of_weights_runs_the_checks_that_load_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"torch", "peft", "safetensors"} <= set(kept_results._LIBRARIES_OF_WEIGHTS)
    site = tmp_path / "site"
    shutil.copytree(Path(safetensors.__file__).parent, site / "safetensors_copy")
    monkeypatch.setattr(
        kept_results, "_LIBRARIES_OF_WEIGHTS", (*kept_results._LIBRARIES_OF_WEIGHTS, "safetensors_copy")
    )
    monkeypatch.syspath_prepend(site)
    assert kept_subjects(work) == OF_RECIPE
    before = KeptResults(tmp_path)._machine
    (site / "safetensors_copy" / "more.py").touch()
    assert KeptResults(tmp_path)._machine != before


def test_an_adapter_alone_is_kept(work: Path) -> None:
    first, _, _ = check_noted(work, "lora-out")
    assert {check["subject"] for check in first["checks"]} == OF_ADAPTER
    again, _, modules = check_noted(work, "lora-out", new=True)
    assert len(again["checks"]) == len(first["checks"])
    assert [name for name in HEAVY if name in modules] == []
    assert kept_subjects(work, "lora-out") == OF_ADAPTER
    # beside a tokenizer, too, but not beside a folder that it is compared with
    assert kept_subjects(work, "lora-out", "base") == OF_ADAPTER
    shutil.copytree(work / "lora-out", work / "other")
    assert kept_subjects(work, "lora-out", "other") == set()
    flip(work / "base" / "model.safetensors")
    assert kept_subjects(work, "lora-out") == set()


def test_a_check_that_fails_is_judged_in_each_run(work: Path) -> None:
    flip(work / "lora-out" / "README.md")
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "check", "recipe.yaml", "--examples", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    for _ in range(2):
        done = run_forked(command, cwd=work, env=environment)
        assert (done.returncode, "ML702" in done.stdout) == (1, True), done.stdout
        # the record is wrong, and the model is not
        assert kept_subjects(work) == (OF_ADAPTER | OF_RECIPE) - {"manifest"}


def test_a_file_that_has_changed_since_the_run_began_is_not_kept(work: Path) -> None:
    kept = KeptResults(work.parent / "cache" / "results")
    for _ in range(2):
        file = work / "lora-out" / "README.md"
        file.write_bytes(file.read_bytes())
        with pytest.raises(kept_results._UnknownInputsError):
            kept._digest(work / "lora-out")
    assert kept_results._digest(work / "lora-out")


def test_a_model_that_finds_no_memory_may_find_some_the_next_time(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1))
    reason = reason_not_to_load(BaseFolder(work / "base"))
    assert reason
    assert not kept_results._can_be_kept(Result(not_checked=reason))
