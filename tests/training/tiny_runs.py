"""Tiny runs for the tests: five conversations, a recipe for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.hashing import base_weights_sha256
from pytest_mistral_lora.training.recipe import Recipe

CONVERSATIONS = [
    [("user", "What is the capital of France?"), ("assistant", "Paris is the capital of France.")],
    [("system", "You are terse."), ("user", "Say hello in German."), ("assistant", "Guten Tag!")],
    [
        ("user", "How many legs does a spider have?"),
        ("assistant", "A spider has eight legs."),
        ("user", "And an ant?"),
        ("assistant", "An ant has six."),
    ],
    [("user", "Name a prime number."), ("assistant", "Seven is prime.")],
    [("user", "Which colour is the sky?"), ("assistant", "The sky is blue on a clear day.")],
]

MakeRecipe = Callable[..., Recipe]


def write_rows(file: Path, conversations: list[list[tuple[str, str]]] = CONVERSATIONS) -> Path:
    rows = [{"messages": [{"role": role, "content": content} for role, content in one]} for one in conversations]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_data(base: Path, *, weights_sha256: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    training = {
        "steps": 40,
        "learning_rate": 0.01,
        "schedule": "constant",
        "batch_size": 5,
        "device": "cpu",
        **sections.get("training", {}),
    }
    return {
        "base": {"path": str(base), "weights_sha256": weights_sha256 or base_weights_sha256(base), "name": "tiny"},
        "data": {"train": ["rows.jsonl"], **sections.get("data", {})},
        "lora": {"r": 8, "alpha": 16, **sections.get("lora", {})},
        "training": {key: value for key, value in training.items() if value is not None},
        "evaluation": sections.get("evaluation", {}),
        "output": "out",
    }
