"""Merge in processes that are killed at their k-th write; each is forked from this one, which never merges.

    python dying_merges.py ADAPTER BASE GOLDEN FOLDER K ...

Of each K, a merge into FOLDER is killed at its K-th operation on the files there. What it leaves is either no output or
one that keeps its manifest; then it is merged again, to the end. K = 0 is never killed: its operations are counted, and
their number is printed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from dying_runs import Death, forked

from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.merge.merging import merge

ADAPTER, BASE, GOLDEN, FOLDER = map(Path, sys.argv[1:5])
OUTPUT = FOLDER / "out"


def die(point: int) -> None:
    death = Death(FOLDER, point)
    merge(ADAPTER, OUTPUT, BASE, golden=GOLDEN)
    if not point:
        sys.stdout.write(f"{death.passed}\n")
        sys.stdout.flush()


def require_whole() -> None:
    wrong = [fact for fact in verify(OUTPUT, base=BASE, parent=ADAPTER) if fact.state == "mismatch"]
    assert not wrong, wrong


def live(point: int) -> None:
    forked(lambda: die(point))
    if not OUTPUT.exists():
        forked(lambda: merge(ADAPTER, OUTPUT, BASE, golden=GOLDEN) and None)
    require_whole()
    assert [path.name for path in FOLDER.iterdir()] == ["out"], "something is left"
    shutil.rmtree(OUTPUT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in sys.argv[5:]:
        live(int(number))
