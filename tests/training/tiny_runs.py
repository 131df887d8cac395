"""Tiny runs for the tests: five conversations, a recipe for them, and a trainer that is ready to run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.step import StepRow
from pytest_mistral_lora.training.step.forward import collate, step_rows

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

HELD_OUT = [
    [("user", "What is the capital of Spain?"), ("assistant", "Madrid is the capital of Spain.")],
    [("system", "You are terse."), ("user", "Say thank you in German."), ("assistant", "Vielen Dank!")],
    [
        ("user", "How many legs does a crab have?"),
        ("assistant", "A crab has ten legs."),
        ("user", "And a bee?"),
        ("assistant", "A bee has six."),
    ],
    [("user", "Name an odd number."), ("assistant", "Nine is odd.")],
    [("user", "Which colour is the grass?"), ("assistant", "The grass is green on a clear day.")],
]
"""Other conversations like them, for runs that hold some out."""

GOOD = """\
base:
  repo: mistralai/Mistral-7B-Instruct-v0.3
  revision: e0bc86c23ce5aae1db576c8cca6f06f1f73af2db
data:
  train: [data/train.jsonl]
  held_out: 0.1
training:
  epochs: 2
  learning_rate: 2e-4
output: lora-out
"""
"""The text of a sound recipe."""

MakeRecipe = Callable[..., Recipe]


def write_rows(file: Path, conversations: list[list[tuple[str, str]]] = CONVERSATIONS) -> Path:
    rows = [{"messages": [{"role": role, "content": content} for role, content in one]} for one in conversations]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def base_with(base: Path, folder: Path, **keys: Any) -> Path:
    """Return a copy of a base with other values in its configuration; a value of ... removes the key."""
    copied = Path(shutil.copytree(base, folder))
    config = {**json.loads((base / "config.json").read_text()), **keys}
    (copied / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not ...}))
    return copied


@cache
def _weights_sha256(base: Path, states: tuple[tuple[int, int], ...]) -> str:
    return BaseFolder(base).weights_sha256


def recipe_data(base: Path, *, weights_sha256: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    training = {
        "steps": 40,
        "learning_rate": 0.01,
        "schedule": "constant",
        "batch_size": 5,
        "device": "cpu",
        **sections.get("training", {}),
    }
    # the tests ask for hundreds of recipes on the same weights: these are hashed again if a file has changed
    files = [file.stat() for file in sorted(base.glob("*.safetensors"))]
    weights_sha256 = weights_sha256 or _weights_sha256(base, tuple((one.st_size, one.st_mtime_ns) for one in files))
    return {
        "base": {"path": str(base), "weights_sha256": weights_sha256, "name": "tiny"},
        "data": {"train": ["rows.jsonl"], **sections.get("data", {})},
        "lora": {"r": 8, "alpha": 16, **sections.get("lora", {})},
        "training": {key: value for key, value in training.items() if value is not None},
        "evaluation": sections.get("evaluation", {}),
        "output": "out",
    }


def trainer_of(recipe: Recipe, base: Path, tmp_path: Path, change: Callable[[Any], Any] = lambda loaded: loaded) -> Any:
    """Return a trainer whose adapter is away from its start, where lora_A has no gradient.

    Args:
        recipe: The recipe.
        base: Its base.
        tmp_path: The parent of its work folder.
        change: Takes the loaded base, and returns the one to train on.
    """
    data = load_data(recipe, make_encoder("mistral-common", CheckpointTokenizer(base)))
    layers = adapted_layers(BaseFolder(base), recipe.lora.target_modules)
    model = attach_adapter(
        change(load_base(BaseFolder(base), "fp32", recipe.training.device)), recipe.lora, layers, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return make_trainer(model, recipe.training, data.train.encoded, data.held_out.encoded, work=tmp_path / "work")


def rows_of(trainer: Any) -> list[StepRow]:
    return step_rows(collate(list(trainer.train_dataset)))


def zero_the_layers(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_TENSORS)
    for name in tensors:
        if ".lora_B." in name:
            tensors[name].zero_()
    save_file(tensors, adapter / ADAPTER_TENSORS)


def smoke(*arguments: str | Path) -> int:
    return main(["smoke", *map(str, arguments)])
