"""Checks that passed are not run again if nothing that they read has changed, and are run again if anything has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked

from pytest_mistral_lora.conformance import kept_results
from pytest_mistral_lora.conformance.collection import SUBJECT_CHECKS
from pytest_mistral_lora.conformance.kept_results import INPUTS
from pytest_mistral_lora.records import files
from pytest_mistral_lora.starter import write_plan
from pytest_mistral_lora.starter.plan import plan_start

RunVerb = Callable[..., subprocess.CompletedProcess[str]]

DEFAULT_FOLDER = kept_results.default_folder
"""The real one: the tests have another, so that none of them finds the results of an earlier one."""

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SOUND = json.dumps({"messages": TALK}) + "\n"
BROKEN = '{"messages": [{"role": "bot", "content": "Hi"}]}\n'


@pytest.fixture
def rows(tmp_path: Path, tiny_base: Path) -> Path:
    """A file of rows beside a copy of a base, whose files a test may change."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "rows.jsonl"
    file.write_text(SOUND)
    return file


@pytest.fixture
def check_rows(rows: Path, mistral_lora: RunVerb) -> Callable[..., tuple[int, int]]:
    """Check the rows, and return the exit code and the number of checks from the cache."""

    def check(*words: str) -> tuple[int, int]:
        options = words or ("--cache", "kept")
        done = mistral_lora("check", "rows.jsonl", "--tokenizer", "base", *options, folder=rows.parent)
        return done.returncode, from_cache(done.stdout)

    return check


def from_cache(output: str) -> int:
    found = re.search(r"^(\d+) checks? from the cache", output, flags=re.MULTILINE)
    return int(found[1]) if found else 0


def test_a_second_run_says_what_the_first_one_said(rows: Path, mistral_lora: RunVerb) -> None:
    command = ("check", "rows.jsonl", "--tokenizer", "base", "--cache", "kept")
    first, second = (mistral_lora(*command, folder=rows.parent) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert from_cache(first.stdout) == 0
    assert from_cache(second.stdout) > 10
    lines = [line for line in second.stdout.splitlines() if "from the cache" not in line]
    assert lines == first.stdout.splitlines()


def append_row(rows: Path) -> None:
    with rows.open("a") as file:
        file.write(SOUND.replace("Hello", "Good day"))


def replace_text(rows: Path) -> None:
    """Change a file and keep its size and its time."""
    before = rows.stat()
    rows.write_text(rows.read_text().replace("Hello", "Hullo"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_base(rows: Path) -> None:
    file = rows.parent / "base" / "config.json"
    file.write_text(file.read_text() + " ")


def add_file(rows: Path) -> None:
    (rows.parent / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize("change", [append_row, replace_text, change_base, add_file])
def test_a_changed_file_is_judged_again(
    change: Callable[[Path], None], rows: Path, check_rows: Callable[..., tuple[int, int]]
) -> None:
    check_rows()
    assert check_rows()[1] > 10
    change(rows)
    assert check_rows()[1] == 0


def test_a_large_file_is_judged_again_even_if_its_size_and_its_time_are_the_same(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_results, "_LARGE", 10)
    # a file that has just changed may change again without another state
    check_rows()
    assert check_rows()[1] == 0
    monkeypatch.setattr(kept_results, "_UNSETTLED", 0)
    check_rows()
    assert check_rows()[1] > 10
    replace_text(rows)
    assert check_rows()[1] == 0


def test_another_version_option_or_variable_is_judged_again(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows()
    assert check_rows()[1] > 10
    assert check_rows("--cache", "kept", "--examples", "3")[1] == 0
    check_rows()
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    # a token opens the Hub, and changes no verdict; it is not among what an entry is made of
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert check_rows()[1] > 10
    (rows.parent / "site" / "other-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(rows.parent / "site")
    assert check_rows()[1] == 0
    assert check_rows()[1] > 10
    (rows.parent / "site" / "other-1.0.dist-info").rename(rows.parent / "site" / "other-1.1.dist-info")
    assert check_rows()[1] == 0


def test_a_red_check_is_judged_in_each_run(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    check_rows()
    rows.write_text(SOUND + BROKEN)
    assert [check_rows(), check_rows()] == [(1, 0), (1, 0)]
    rows.write_text(SOUND)
    # the entry of the first run still fits
    assert check_rows()[0] == 0
    assert check_rows()[1] > 10


def test_a_damaged_entry_is_written_again(rows: Path, check_rows: Callable[..., tuple[int, int]]) -> None:
    check_rows()
    [entry] = (rows.parent / "kept").iterdir()
    text = entry.read_text()
    for damaged in ("", text[:100], "[]", "{}", text.replace('"findings": []', '"findings": [1]', 1)):
        entry.write_text(damaged)
        assert check_rows() == (0, 0)
        assert check_rows()[1] > 10


def test_a_run_that_is_killed_while_it_writes_leaves_nothing(
    rows: Path, check_rows: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    def write_and_die(path: Path, text: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", killed)
            files.write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(kept_results, "write_text", write_and_die)
        assert check_rows()[0] == 130
    assert list((rows.parent / "kept").iterdir()) == []
    assert check_rows() == (0, 0)


def test_ci_and_no_cache_keep_nothing(
    rows: Path, mistral_lora: RunVerb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("check", "rows.jsonl", "--tokenizer", "base")
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_results, "default_folder", DEFAULT_FOLDER)
    mistral_lora(*command, "--no-cache", folder=rows.parent)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("CI", "true")
    assert DEFAULT_FOLDER() is None
    monkeypatch.delenv("CI")
    mistral_lora(*command, folder=rows.parent)
    assert len(list((tmp_path / "cache" / "results").iterdir())) == 1
    assert from_cache(mistral_lora(*command, folder=rows.parent).stdout) > 10
    assert from_cache(mistral_lora(*command, "--no-cache", folder=rows.parent).stdout) == 0


def test_a_file_in_place_of_the_folder_is_refused(rows: Path, mistral_lora: RunVerb) -> None:
    (rows.parent / "kept").write_text("mine")
    done = mistral_lora("check", "rows.jsonl", "--tokenizer", "base", "--cache", "kept", folder=rows.parent)
    assert (done.returncode, "kept: is not a folder" in done.stderr) == (2, True)
    assert (rows.parent / "kept").read_text() == "mine"


@pytest.fixture
def recipe(rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(rows.parent)
    write_plan(plan_start(Path(), [Path("rows.jsonl")], "base", ()))
    return rows.parent / "recipe.yaml"


def test_a_change_of_rows_runs_the_checks_of_rows_alone(
    recipe: Path, rows: Path, mistral_lora: RunVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "kept"))
    hook = ("check", "recipe.yaml", "--examples", "1")
    command = (*hook, "--cache", "kept/results")
    first = mistral_lora(*command, "--json", folder=folder)
    assert first.returncode == 0, first.stdout
    checks = [check["subject"] for check in json.loads(first.stdout)["checks"]]
    assert from_cache(mistral_lora(*command, folder=folder).stdout) == len(checks)
    # a hook waits for what the command imports
    script = f"{_IMPORTED}\nmain({[*hook]})\nprint(json.dumps([name for name in HEAVY if name in sys.modules]))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    assert (from_cache(done.stdout), done.stdout.splitlines()[-1]) == (len(checks), "[]")
    rows.write_text(SOUND + BROKEN)
    done = mistral_lora(*command, folder=folder)
    # the recipe itself is judged by a check of this subject
    assert (done.returncode, from_cache(done.stdout)) == (1, len(checks) - checks.count("dataset") + 1)
    rows.write_text(SOUND)
    recipe.write_text(recipe.read_text().replace("learning_rate: 2e-4", "learning_rate: 1e-4"))
    assert from_cache(mistral_lora(*command, folder=folder).stdout) == 0
    (folder / "lora-out").write_text("in the way")
    done = mistral_lora(*command, folder=folder)
    assert (done.returncode, "ML641" in done.stdout) == (1, True)


def test_rows_that_a_declaration_names_are_not_kept(recipe: Path, rows: Path, mistral_lora: RunVerb) -> None:
    declaration = rows.parent / "axolotl.yaml"
    declaration.write_text(
        "base_model: base\nchat_template: tokenizer_default\n"
        "datasets:\n  - path: rows.jsonl\n    type: chat_template\n    field_messages: messages\n"
    )
    recipe.write_text(recipe.read_text().replace("- rows.jsonl", "- path: axolotl.yaml"))
    command = ("check", "recipe.yaml", "--examples", "1", "--cache", "kept")
    first = mistral_lora(*command, "--json", folder=recipe.parent)
    checks = [check["subject"] for check in json.loads(first.stdout)["checks"]]
    again = mistral_lora(*command, folder=recipe.parent)
    assert from_cache(again.stdout) == len(checks) - checks.count("dataset") + 1


_IMPORTED = """
import json, sys
from pytest_mistral_lora.cli import main
HEAVY = ("torch", "transformers", "mistral_common", "hypothesis", "numpy", "pydantic", "asyncio", "filelock", "jinja2")
"""
_OPENED = """
import json, os, sys
opened = set()
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(os.getcwd() + os.sep) and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            opened.add(os.path.relpath(path))
sys.addaudithook(note)
from pytest_mistral_lora.cli import main
code = main(["check", "recipe.yaml", "--examples", "1", "--no-cache"])
print(json.dumps([code, sorted(opened)]))
"""


def test_each_file_that_a_check_opens_is_declared(recipe: Path, mistral_lora: RunVerb) -> None:
    folder = recipe.parent
    done = run_forked([sys.executable, "-c", _OPENED], cwd=folder)
    code, opened = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stdout + done.stderr
    assert {"recipe.yaml", "rows.jsonl", "base/config.json"} <= set(opened)
    mistral_lora("check", "recipe.yaml", "--examples", "1", "--cache", "kept", folder=folder)
    declared: set[Any] = set()
    for entry in (folder / "kept").iterdir():
        declared |= {(folder / path).resolve() for path in json.loads(entry.read_text())["content"]["content"]}
    # Hypothesis keeps the constants of modules in its folder, and Python looks for the source of a template
    files_read = [folder / name for name in opened if not name.startswith((".hypothesis/", "<"))]
    assert [file for file in files_read if not declared & {file.resolve(), *file.resolve().parents}] == []


def test_inputs_are_declared_for_subjects_that_exist() -> None:
    assert set(INPUTS) <= set(SUBJECT_CHECKS)
