"""A folder in a repository of Git, with everything in it committed."""

from __future__ import annotations

import subprocess
from pathlib import Path

_WHO = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false")


def git(folder: Path, *words: str) -> str:
    """Run a command of Git in a folder, and return its output."""
    command = ["git", "-C", str(folder), *_WHO, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_all(folder: Path, *names: str) -> str:
    """Commit files of a folder, by default those in JSON and Markdown, and return the commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--force", *(names or ("*.json", "*.md")))
    git(folder, "commit", "--quiet", "--message", "a run")
    return git(folder, "rev-parse", "HEAD")
