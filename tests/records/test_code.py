from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pytest_mistral_lora.records.git import code_of


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
    done = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_changes_of_a_repository_are_found(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert code_of(tmp_path) is None
    (tmp_path / "recipe.yaml").write_text("one")
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "untracked").write_text("later")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_of(tmp_path / "recipes") == {"commit": commit, "dirty": False}
    (tmp_path / "recipe.yaml").write_text("two")
    assert code_of(tmp_path) == {"commit": commit, "dirty": True}


def test_no_repository_and_no_git_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    assert code_of(tmp_path) is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_of(tmp_path) is None
