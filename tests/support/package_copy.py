"""A copy of the package without some of its files, and Python that imports the copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from forked import run_forked

import pytest_mistral_lora

PACKAGE = Path(pytest_mistral_lora.__file__).parent
ROOT = Path(__file__).parents[2]


def copied_without(folder: Path, *left_out: str) -> Path:
    """Copy the package into a folder, beside its goldens, and return the copy; no module of the rest is edited.

    What Python has compiled of it is copied, too: to compile it anew takes seconds.

    Args:
        folder: The folder.
        left_out: Files and folders of the package, as their paths in it.
    """
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("goldens"))
    (folder / "goldens").symlink_to(ROOT / "goldens")
    for name in left_out:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the package in it; the libraries are imported before."""
    return run_forked([sys.executable, *words], cwd=folder)


def run_tests_in(folder: Path, tests: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the clone on the package in a folder; a test more holds that it is that package.

    Args:
        folder: The folder.
        tests: The paths of the tests.
        options: Options of pytest.
    """
    (folder / "test_copy.py").write_text(
        "import pytest_mistral_lora\n\n\n"
        "def test_the_copy_is_tested():\n"
        f"    assert pytest_mistral_lora.__file__ == {str(folder / PACKAGE.name / '__init__.py')!r}\n"
    )
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q")
    command = [sys.executable, "-m", "pytest", *settings, *options, str(folder / "test_copy.py"), *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
