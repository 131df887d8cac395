"""The suite runs beside the programs that it judges: an install changes none of the versions that they pin."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PINS = sorted((ROOT / "tests" / "pins").glob("*.txt"))


def pins_of(file: Path) -> list[Requirement]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def of_file(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", PINS, ids=of_file)
def test_our_bounds_allow_the_pins(file: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["train"]])
    bounds = {one.name: one.specifier for one in ours}
    for pin in pins_of(file):
        [version] = [part.version for part in pin.specifier]
        assert pin.name == "tokenizers" or version in bounds[pin.name], f"{pin} is not in {bounds[pin.name]}"


@pytest.mark.slow
@pytest.mark.parametrize("file", PINS, ids=of_file)
def test_an_install_changes_no_version_and_the_suite_is_green_or_names_the_fault(file: Path, tmp_path: Path) -> None:
    python = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS", "CI")}
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "400"}

    def run(*words: str | Path) -> str:
        ended = subprocess.run(
            list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return ended.stdout

    run(sys.executable, "-m", "venv", tmp_path / "environment")
    # the oracle has bounds of its own: beside LLaMA-Factory, which does not install it, it lowers numpy
    run(python, "-m", "pip", "install", "--quiet", "--requirement", file, "mistral-common")
    before = set(run(python, "-m", "pip", "freeze").split())
    run(python, "-m", "pip", "install", "--quiet", ROOT)
    assert before <= set(run(python, "-m", "pip", "freeze").split())
    command = [python, "-m", "pytest", "--mistral-golden", "-W", "default", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1), ended.stdout[-2000:] + ended.stderr[-2000:]
    if ended.returncode:
        assert "\nknown of " in ended.stdout, ended.stdout[-4000:]
    assert "no target of that kind" in ended.stdout


@pytest.mark.slow
def test_every_dependency_has_a_binary_for_the_newest_python(tmp_path: Path) -> None:
    """The tests do not run on it everywhere: pip resolves for it, and builds nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = max(name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name)
    extras = ("train", "parquet", "near", "guidance", "serving", "gguf")
    needed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--python-version", newest, "--only-binary", ":all:", "--target", str(tmp_path), *needed]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
