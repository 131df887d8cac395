"""Merge in processes that are killed at their k-th write; each is forked from this one, which never merges.

    python dying_merges.py ADAPTER BASE GOLDEN FOLDER K ...

Of each K, a merge into FOLDER/out is killed at its K-th operation on the files there, and leaves no output, or one that
keeps its manifest. The next one begins where that left the folder; the last one is not killed. With `every` for K, each
operation is the last of a merge, and their number is printed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from dying_runs import Death, forked

from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.merge import merge

ADAPTER, BASE, GOLDEN, FOLDER = map(Path, sys.argv[1:5])
OUTPUT = FOLDER / "out"


def start(point: int) -> None:
    if point:
        Death(FOLDER, point)
    merge(ADAPTER, OUTPUT, BASE, golden=GOLDEN)


def require_whole() -> None:
    wrong = [fact for fact in verify(OUTPUT, base=BASE, parent=ADAPTER) if fact.state == "mismatch"]
    assert not wrong, wrong


def points(words: list[str]) -> Iterator[int]:
    if words != ["every"]:
        yield from map(int, words)
        return
    for point in count(1):
        yield point
        if OUTPUT.exists():
            sys.stdout.write(f"{point - 1}\n")
            return


def live(words: list[str]) -> None:
    for point in points(words):
        if OUTPUT.exists():
            shutil.rmtree(OUTPUT)
        forked(lambda point=point: start(point))
        if OUTPUT.exists():
            require_whole()
    if not OUTPUT.exists():
        forked(lambda: start(0))
    require_whole()
    (FOLDER / ".out.lock").unlink(missing_ok=True)  # left by a kill after the last rename: empty, and held by nobody
    assert [path.name for path in FOLDER.iterdir()] == ["out"], "something is left"


if __name__ == "__main__":
    torch.set_num_threads(1)
    live(sys.argv[5:])
