"""The types of a recipe's values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationInfo


def _yaml_number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as a string, and `yes` as a boolean that would count as 1."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_yaml_number)]
Positive = Annotated[StrictInt, Field(gt=0)]
NonNegative = Annotated[StrictInt, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def from_recipe(path: Path, info: ValidationInfo) -> Path:
    """Return a path, relative to the recipe's folder unless it is absolute."""
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / path.expanduser()
