"""Recipes with rows for the tests of the subject `dataset`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from converted import converted_tokenizer

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import RecipeTarget


@cache
def v3() -> CheckpointTokenizer:
    return converted_tokenizer("spm-v3")


class Target(RecipeTarget):
    """A recipe whose base is nothing but its tokenizer."""

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        return v3()


def said(*texts: str, system: str = "", **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text, **keys} for index, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


SOUND = [
    said("What is the capital of France?", "Paris."),
    said("Say hello.", "Guten Tag!", system="You are terse."),
    said("How many legs has a spider?", "Eight.", "And an ant?", "Six."),
]


def facts(results: dict[str, Result], case: str = "statistics") -> dict[str, Any]:
    return dict(results[case].facts)


def found(results: dict[str, Result], *rules: str) -> list[Finding]:
    return [one for result in results.values() for one in result.findings if not rules or one.rule in rules]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_target(
    folder: Path, rows: Sequence[Any], held_out: Sequence[Any] = (), *, max_length: int = 4096, **keys: Any
) -> Target:
    """Write rows and a recipe for them."""
    data: dict[str, Any] = {"train": [write_rows(folder / "rows.jsonl", rows).name]}
    if held_out:
        data["eval"] = [write_rows(folder / "held-out.jsonl", held_out).name]
    recipe = {
        "base": {"repo": "a/b", "revision": "0" * 40},
        "data": data | keys.pop("data", {}),
        "training": {"steps": 1, "max_length": max_length},
        "output": "out",
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Target("recipe", folder / "recipe.yaml")
