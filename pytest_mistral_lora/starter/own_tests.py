"""Find the test files of a repository, by name alone: nothing is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

PATTERNS = ("test_*.py", "*_test.py")
"""The names of test files, by pytest's default of `python_files`."""
LEFT_OUT = ("*.egg", ".*", "_darcs", "build", "CVS", "dist", "node_modules", "venv", "{arch}")
"""The folders that pytest does not enter, by its default of `norecursedirs`."""
MOST_FOLDERS = 2_000
"""The folders that are looked into: enough for a large repository, and a fraction of a second on a slow disk."""


def find_test_files(folder: Path, patterns: Sequence[str] = PATTERNS, left_out: Sequence[str] = LEFT_OUT) -> list[Path]:
    """Return the test files below a folder, sorted; of a huge tree, those of the first `MOST_FOLDERS` folders.

    Args:
        folder: The folder.
        patterns: Names of test files, or of paths if they have a `/`, as in pytest's `python_files`.
        left_out: Names of folders that are not entered. Virtual environments never are.
    """
    found = []
    for name, below, files in islice(os.walk(folder), MOST_FOLDERS):
        if "pyvenv.cfg" in files:
            below.clear()
            continue
        below[:] = sorted(entry for entry in below if not any(fnmatch(entry, pattern) for pattern in left_out))
        for file in files:
            path = Path(name, file)
            if file.endswith(".py") and any(fnmatch(path if "/" in pattern else file, pattern) for pattern in patterns):
                found.append(path)
    return sorted(found)


def folders_with_tests(folder: Path) -> list[str]:
    """Return the folders that pytest's `testpaths` should name: those at the top that have tests, or "." itself."""
    tops = {path.relative_to(folder).parts for path in find_test_files(folder)}
    if any(len(parts) == 1 for parts in tops):
        return ["."]
    return sorted({parts[0] for parts in tops})
