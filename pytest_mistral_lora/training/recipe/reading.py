"""Read a recipe; every value is checked, and every bad one is named, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe.recipe import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; its relative paths are relative to the file.

    Raises:
        RecipeError: If the file cannot be read, is not YAML, names a key twice, or a value is wrong; all are named.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {error}", place=str(path)) from error
    return parse_recipe(data, folder=path.parent, place=str(path))


def parse_recipe(data: Any, *, folder: Path | None = None, place: str = "recipe") -> Recipe:
    """Check plain data and return it as a recipe.

    Args:
        data: What a YAML file holds.
        folder: What relative paths are relative to; None for the working directory.
        place: Where the data came from, for messages.

    Raises:
        RecipeError: If a value is wrong; all are named.
    """
    if not isinstance(data, dict):
        raise RecipeError(
            f"is a {type(data).__name__}", place=place, expected="a mapping with base, data, training, output"
        )
    try:
        recipe = Recipe.model_validate(data, context={"folder": folder or Path()})
    except ValidationError as error:
        raise _refusal(error, place) from error
    recipe._folder = folder or Path()
    return recipe


def _refusal(error: ValidationError, place: str) -> RecipeError:
    lines = []
    for one in error.errors(include_url=False):
        field = ".".join(str(step) for step in one["loc"])
        message = one["msg"].removeprefix("Value error, ")
        missing = one["type"] in ("missing", "value_error") and isinstance(one["input"], dict)
        lines.append(f"{field}: {message}" if missing else f"{field}: {one['input']!r}: {message}")
    if len(lines) == 1:
        field, _, found = lines[0].partition(": ")
        return RecipeError(found, place=f"{place}, {field}")
    return RecipeError("\n".join([f"{len(lines)} bad values", *(f"  {line}" for line in lines)]), place=place)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
