"""Questions to Git about a folder; no command from the repository's configuration runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

_LONGEST_S = 30
_OPTIONS = (
    "--no-pager",
    "--no-optional-locks",
    "--literal-pathspecs",
    "--no-replace-objects",
    # a repository can name both commands; nothing is fetched either, since a fetch could run one
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "protocol.allow=never",
)
_OF_THE_USER = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_CEILING_DIRECTORIES")
"""Variables of Git that are kept: the others, such as `GIT_DIR` within a hook, would name another repository."""


def ask_git(folder: Path, *question: str) -> bytes:
    """Return what Git prints for a question about the repository that a folder is in.

    Raises:
        OSError: If Git is not installed.
        subprocess.SubprocessError: If Git refuses, such as outside of a repository, or takes too long.
    """
    environment = {key: value for key, value in os.environ.items() if key[:4] != "GIT_" or key in _OF_THE_USER}
    # a clone that lacks objects would fetch them, by a program that its configuration names
    environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    command = ("git", *_OPTIONS, "-C", str(folder), *question)
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST_S, check=True
    )
    return done.stdout


def is_in_repository(folder: Path) -> bool:
    """Return whether a folder is in the work tree of a Git repository, whose history may have its manifest."""
    here = folder.resolve()
    return any((above / ".git").exists() for above in (here, *here.parents))


def code_of(folder: Path) -> dict[str, Any] | None:
    """Return `commit` and `dirty` of the repository that a folder is in: the manifest's `environment.code`.

    Files that Git does not track do not count as changes. The result is None outside of a repository, in one
    without a commit, and without Git.
    """
    try:
        commit = ask_git(folder, "rev-parse", "--verify", "HEAD").decode().strip()
        return {"commit": commit, "dirty": bool(ask_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
