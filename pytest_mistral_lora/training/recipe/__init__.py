"""The recipe of a run, read from YAML: base, rows, adapter, optimisation, measurements and output; and its pin."""

from pytest_mistral_lora.training.recipe.data import Data, DataSource
from pytest_mistral_lora.training.recipe.model import (
    PinnedBase,
    Recipe,
    load_recipe,
    parse_recipe,
    pin_recipe,
    resolve_base,
)
from pytest_mistral_lora.training.recipe.sections import Base, Lora
from pytest_mistral_lora.training.recipe.settings import Evaluation, Training

__all__ = [
    "Base",
    "Data",
    "DataSource",
    "Evaluation",
    "Lora",
    "PinnedBase",
    "Recipe",
    "Training",
    "load_recipe",
    "parse_recipe",
    "pin_recipe",
    "resolve_base",
]
