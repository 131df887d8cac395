"""CPU seconds of `pytest --mistral-golden` beside those of importing the libraries that it uses, in pairs.

Each run is a first run: in an empty folder, with empty caches, of a package that is compiled and lies in a folder
`site-packages`, as pip leaves it. In a checkout, Hypothesis also reads the constants of each module, for half a second.
The two sides take turns, so that a busy machine slows both. Run it from a checkout: python benchmarks/golden.py --help
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

import pytest_mistral_lora
from pytest_mistral_lora.records.goldens import goldens_folder

IMPORTS = (sys.executable, "-c", "import torch, transformers, peft")
SUITE = (sys.executable, "-m", "pytest", "--mistral-golden")
_CACHES = ("HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME")


class Cost(NamedTuple):
    """What a run costs.

    Attributes:
        cpu: CPU seconds of all its processes.
        wall: Seconds by the clock.
    """

    cpu: float
    wall: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure pairs of the imports and of the suite, and print the costs and their ratio."""
    given = _options(arguments)
    select = ["-k", given.select] if given.select else []
    imports: list[Cost] = []
    suites: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder, "site-packages")
        install(packages)
        for pair in range(given.pairs):
            sys.stderr.write(f"pair {pair + 1} of {given.pairs}\n")
            imports.append(cost_of(IMPORTS, packages))
            suites.append(cost_of([*SUITE, *select], packages))
    ratios = [suite.cpu / one.cpu for suite, one in zip(suites, imports, strict=True)]
    table = Table("run", "CPU seconds", "seconds", "times the imports, by CPU time", box=box.MARKDOWN)
    table.add_row("import torch, transformers, peft", *_medians(imports), "1.0")
    table.add_row(" ".join(["pytest --mistral-golden", *select]), *_medians(suites), f"{statistics.median(ratios):.1f}")
    Console(width=120).print(table)
    if given.json:
        given.json.write_text(json.dumps({"imports": imports, "suite": suites, "ratios": ratios}, indent=2) + "\n")


def install(folder: Path) -> None:
    """Copy the package into a folder as a wheel has it, with its goldens, and compile it."""
    package = folder / pytest_mistral_lora.__name__
    shutil.copytree(*pytest_mistral_lora.__path__, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(goldens_folder(), package / "goldens", dirs_exist_ok=True)
    compileall.compile_dir(folder, quiet=1)


def cost_of(command: Sequence[str], packages: Path) -> Cost:
    """Run a command in an empty folder with empty caches; return its cost.

    Args:
        command: The command.
        packages: The folder that Python looks for packages in first.

    Raises:
        SystemExit: If it fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        changed = {name: str(Path(folder, name.lower())) for name in _CACHES} | {"PYTHONPATH": str(packages)}
        before, start = _cpu_of_children(), time.perf_counter()
        done = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, **changed},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        cost = Cost(_cpu_of_children() - before, time.perf_counter() - start)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return cost


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _medians(costs: Sequence[Cost]) -> list[str]:
    return [f"{statistics.median(getattr(cost, name) for cost in costs):.1f}" for name in Cost._fields]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--pairs", type=int, default=3, help="pairs of runs; default: 3")
    add("--select", metavar="EXPRESSION", help="checks to run, as pytest's -k takes them; default: all")
    add("--json", type=Path, metavar="FILE", help="write the costs to a file, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
