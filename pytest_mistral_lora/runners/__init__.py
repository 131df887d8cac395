"""The ids and labels that other trainers would feed a model, made by their own code in their own environments."""

from pytest_mistral_lora.runners.environment import Environment, interpreter
from pytest_mistral_lora.runners.trainer import (
    HARNESS,
    NOTHING,
    TIME_LIMIT,
    TRAINERS,
    Trainer,
    find_runner,
    trainer_of,
)

__all__ = [
    "HARNESS",
    "NOTHING",
    "TIME_LIMIT",
    "TRAINERS",
    "Environment",
    "Trainer",
    "find_runner",
    "interpreter",
    "trainer_of",
]
