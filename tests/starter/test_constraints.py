"""The constraints file: `init` writes it, `pin --upgrade` moves it, and pip reads it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from pytest_mistral_lora.records.goldens import ID_LIBRARIES
from pytest_mistral_lora.starter import constraints
from pytest_mistral_lora.starter.constraints import CONSTRAINTS, VERDICT_LIBRARIES, constraints_text, installed_release

RunVerb = Callable[..., subprocess.CompletedProcess[str]]

VERSIONS = {"mistral-common": "1.13.1", "transformers": "5.24.0", "tokenizers": "0.23.3", "torch": "2.6.0"}


def moved(before: str) -> str:
    return constraints_text(before, lambda name: VERSIONS.get(name, ""))


def test_a_new_file_names_the_installed_versions_of_libraries_that_decide_ids() -> None:
    lines = constraints_text().splitlines()
    assert [f"{name}=={Version(version(name)).public}" for name in ID_LIBRARIES] == [
        line for line in lines if line.split("==")[0] in ID_LIBRARIES
    ]
    assert all(line.startswith("#") or line.split("==")[0] in VERDICT_LIBRARIES for line in lines)


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("transformers==4.57.1", "transformers==5.24.0"),
        ("Mistral_Common == 1.13.0  # as in production", "Mistral_Common == 1.13.1  # as in production"),
        ("torch==2.5.0; sys_platform == 'linux'", "torch==2.6.0; sys_platform == 'linux'"),
        ("transformers>=4.57,<5", "transformers>=4.57,<5"),
        ("# transformers==4.57.1", "# transformers==4.57.1"),
        ("peft==0.18.0", "peft==0.18.0"),
        ("django==5.0", "django==5.0"),
    ],
)
def test_a_move_changes_versions_and_nothing_else(line: str, after: str) -> None:
    first = moved(f"{line}\n").splitlines()
    assert first[0] == after
    # what the file lacks is added once
    names = [text.split("==")[0] for text in first[1:]]
    named = line.partition("=")[0].partition(">")[0].strip().lower().replace("_", "-")
    assert names == [name for name in VERSIONS if name != named]
    assert moved("\n".join(first) + "\n") == "\n".join(first) + "\n"


def test_a_last_line_without_an_end_stays_a_line() -> None:
    assert moved("django==5.0").startswith("django==5.0\nmistral-common==1.13.1\n")


def test_a_version_that_no_index_has_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.6.0+cpu", "transformers": "5.25.0.dev0"}
    monkeypatch.setattr(constraints, "version", installed.__getitem__)
    assert {name: installed_release(name) for name in installed} == {"torch": "2.6.0", "transformers": ""}


def test_pip_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    (tmp_path / "constraints.txt").write_text(constraints_text())
    words = ["-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "-c", "constraints.txt"]
    for requirement, code in (("mistral-common", 0), ("mistral-common<1", 1)):
        done = subprocess.run(
            [sys.executable, *words, requirement], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr


def test_pin_upgrade_moves_the_file_and_shows_the_difference(tmp_path: Path, mistral_lora: RunVerb) -> None:
    file = tmp_path / CONSTRAINTS
    file.parent.mkdir()
    sound = constraints_text()
    file.write_text(sound.replace(f"transformers=={version('transformers')}", "transformers==4.57.1"))
    done = mistral_lora("pin", "--upgrade", folder=tmp_path)
    assert done.returncode == 0
    changed = [line for line in done.stdout.splitlines() if line[0] in "+-" and line[1] not in "+-"]
    assert changed == ["-transformers==4.57.1", f"+transformers=={version('transformers')}"]
    assert file.read_text() == sound
    again = mistral_lora("pin", "--upgrade", CONSTRAINTS, folder=tmp_path)
    assert (again.returncode, "already" in again.stdout) == (0, True)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--upgrade"], "no constraints file"),
        (["--upgrade", "recipe.yaml"], "not a constraints file"),
        (["--upgrade", "--branch", "main"], "--branch is for a base"),
        ([], "no BASE is named"),
    ],
)
def test_what_pin_cannot_move_is_refused(words: list[str], found: str, tmp_path: Path, mistral_lora: RunVerb) -> None:
    done = mistral_lora("pin", *words, folder=tmp_path)
    assert done.returncode == 2
    assert found in done.stderr
    assert list(tmp_path.iterdir()) == []
