"""The recipe of a run: what is trained, on what, how. One module a section."""

from pytest_mistral_lora.training.recipe.base import Base
from pytest_mistral_lora.training.recipe.data import Data
from pytest_mistral_lora.training.recipe.evaluation import Evaluation
from pytest_mistral_lora.training.recipe.lora import PROJECTIONS, Lora
from pytest_mistral_lora.training.recipe.reading import load_recipe, parse_recipe
from pytest_mistral_lora.training.recipe.recipe import Recipe
from pytest_mistral_lora.training.recipe.training import Training

__all__ = [
    "PROJECTIONS",
    "Base",
    "Data",
    "Evaluation",
    "Lora",
    "Recipe",
    "Training",
    "load_recipe",
    "parse_recipe",
]
