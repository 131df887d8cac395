"""The ids and labels that other trainers would feed a model, made by their own code in their own environments."""

from pytest_mistral_lora.runners.runner import (
    NOTHING,
    RUNNERS,
    TIME_LIMIT,
    Environment,
    Runner,
    find_runner,
    interpreter,
    runner_fixes,
)

__all__ = ["NOTHING", "RUNNERS", "TIME_LIMIT", "Environment", "Runner", "find_runner", "interpreter", "runner_fixes"]
