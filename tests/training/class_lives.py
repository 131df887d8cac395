"""Train a recipe in one process, in two, and in one that is killed; each is forked from this one, which never trains.

    python class_lives.py RECIPE

Beside the recipe, the runs become `done-0` (one process), `two` (two of them, which average by gloo) and `killed`,
which was killed by SIGKILL in the middle and went on.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from dying_runs import OPERATIONS, forked, live

from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.run import train


def in_two(recipe: Path) -> None:
    """Run as the two processes of a group, as a launcher would start them."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    second = os.fork()
    rank = "0" if second else "1"
    os.environ.update(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    train(load_recipe(recipe))
    if not second:
        os._exit(0)
    _, status = os.waitpid(second, 0)
    assert status == 0, "the second process failed"


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    live(file, "0")
    half = str(int((file.parent / OPERATIONS).read_text()) // 2)
    live(file, half)
    file.with_name(f"done-{half}").rename(file.with_name("killed"))
    forked(lambda: in_two(file))
    file.with_name("out").rename(file.with_name("two"))
