"""The place of this process in a run of several, as the environment of a launcher gives it; torch is not imported."""

from __future__ import annotations

import os
from typing import Literal


def device_count() -> int:
    """Return the number of processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Report whether this is the process of the run that writes files and messages."""
    return int(os.environ.get("RANK", "0")) == 0


def engine() -> Literal["none", "ddp", "fsdp", "deepspeed"]:
    """Return the engine that a launcher distributes this run with."""
    # from the environment: before the Trainer is made, accelerate does not know it
    if _asked_for("FSDP"):
        return "fsdp"
    if _asked_for("DEEPSPEED"):
        return "deepspeed"
    return "ddp" if device_count() > 1 else "none"


def _asked_for(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
