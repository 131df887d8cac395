"""The recipe of a run: what is trained, on what, how. One module a section."""

from pytest_mistral_lora.training.recipe.recipe import Recipe, load_recipe, parse_recipe
from pytest_mistral_lora.training.recipe.sections import PROJECTIONS, Base, Data, Lora
from pytest_mistral_lora.training.recipe.settings import Evaluation, Training

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
