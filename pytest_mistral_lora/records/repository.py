"""The commit of the user's repository, for records and reports."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

_LONGEST_S = 30


def code_of(folder: Path) -> dict[str, Any] | None:
    """Return `commit` and `dirty` of the repository that a folder is in: the manifest's `environment.code`.

    Files that Git does not track do not count as changes. The result is None outside of a repository, in one without a
    commit, and without Git.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # fsmonitor is a command of the repository's own configuration: it must not run because a model is trained there
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
