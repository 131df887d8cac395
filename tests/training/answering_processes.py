"""Train a recipe in two processes under DDP, and note the rows that each answers.

    python answering_processes.py RECIPE

Beside the recipe, `generated-0` and `recorded-0` have a line for each row of the first process, and `generated-1` and
`recorded-1` for those of the second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from class_lives import in_two

from pytest_mistral_lora.training.generate import record


def noted(work: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Return a function of a model, an encoder and rows that notes the last message of each row."""

    def noting(model: Any, encoder: Any, rows: Any, *given: Any, **named: Any) -> Any:
        with file.with_name(f"{file.name}-{os.environ['RANK']}").open("a") as lines:
            lines.writelines(f"{row.messages[-1]['content']}\n" for row in rows)
        return work(model, encoder, rows, *given, **named)

    return noting


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = Path(sys.argv[1])
    record.generate = noted(record.generate, recipe.with_name("generated"))
    record.record = noted(record.record, recipe.with_name("recorded"))
    in_two(recipe)
