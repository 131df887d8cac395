"""Train a recipe in processes that are killed at their k-th write; each is forked from this one, which never trains.

    python dying_runs.py RECIPE LIFE ...

A life is `20,35,8`: the run is killed at its 20th operation on the files beside the recipe, resumed and killed at the
35th, and so on, and resumed to its end; its folder becomes `done-LIFE`. The life `0` is never killed: the number of its
operations is printed. After it, a life of `-3` is killed at the third operation before the last.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch

OPERATIONS = "operations"
"""File with the number of operations of the life `0`."""

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Death:
    """SIGKILL at the k-th operation on the files of a folder."""

    watches: ClassVar[list[Death]] = []

    def __init__(self, folder: Path, point: int) -> None:
        self._folder, self._point = str(folder), point
        self.passed = 0
        sys.addaudithook(self._audit)
        self.watches.append(self)

    def count(self, path: Any, half: bool = False) -> None:
        if not str(path).startswith(self._folder):
            return
        self.passed += 1
        if self.passed == self._point:
            if half:
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: Any) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if opens or event in _CHANGES:
            self.count(arguments[0])


def half_written(save: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose file, which Python does not write itself, may be cut in the middle."""

    def saving(data: Any, file: Any, *given: Any, **named: Any) -> Any:
        done = save(data, file, *given, **named)
        for death in Death.watches:
            death.count(file, half=True)
        return done

    return saving


for module, name in ((torch, "save"), (safetensors.torch, "save_file")):
    setattr(module, name, half_written(getattr(module, name)))

from pytest_mistral_lora.training.recipe import load_recipe  # noqa: E402  # its libraries take the functions' names
from pytest_mistral_lora.training.run import train  # noqa: E402


def forked(body: Callable[[], None]) -> None:
    """Run in a process of its own, which ends well or is killed."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), "the run failed"
        return
    try:
        body()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start(recipe: Path, point: int, *, resume: bool) -> None:
    death = Death(recipe.parent, point)
    train(load_recipe(recipe), resume=resume)
    if not (point or resume):
        (recipe.parent / OPERATIONS).write_text(str(death.passed))
        sys.stdout.write(f"{death.passed}\n")
        sys.stdout.flush()


def live(recipe: Path, life: str) -> None:
    output = recipe.parent / "out"
    for number, point in enumerate([*map(int, life.split(",")), 0]):
        if point < 0:
            point += int((recipe.parent / OPERATIONS).read_text())
        if not output.exists():
            forked(lambda point=point, number=number: start(recipe, point, resume=number > 0))
    # a kill after the last rename leaves the lock's file: it is empty, and nobody holds it
    assert {path.name for path in output.parent.glob(".out.*")} <= {".out.lock"}, "a temporary folder is left"
    output.with_name(".out.lock").unlink(missing_ok=True)
    output.rename(output.with_name(f"done-{life}"))
    shutil.rmtree(output.with_name("out.work"), ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for life in sys.argv[2:]:
        live(Path(sys.argv[1]), life)
