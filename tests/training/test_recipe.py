from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe import Recipe, load_recipe, parse_recipe

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


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_a_good_recipe_has_paths_beside_its_file(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD)
    recipe = load_recipe(recipe_file)
    assert recipe.output == recipe_file.parent / "lora-out"
    assert recipe.data.train == (recipe_file.parent / "data/train.jsonl",)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert recipe.base.label == "mistralai/Mistral-7B-Instruct-v0.3"


def test_as_written_makes_the_same_recipe_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(GOOD)
    recipe = load_recipe(recipe_file)
    again = json.loads(json.dumps(recipe.as_written()))
    assert again["data"]["train"] == ["data/train.jsonl"]
    assert parse_recipe(again, folder=tmp_path) == recipe


def test_recipes_are_frozen(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).training.seed = 3  # type: ignore[misc]


def test_json_schema_is_valid_and_accepts_a_good_recipe() -> None:
    Draft202012Validator.check_schema(Recipe.json_schema)
    data = {**yaml.safe_load(GOOD), "training": {"epochs": 2, "learning_rate": 2e-4}}
    Draft202012Validator(Recipe.json_schema).validate(data)
    assert not Draft202012Validator(Recipe.json_schema).is_valid({**data, "extra": 1})


def undescribed(schema: dict[str, Any]) -> list[str]:
    sections = [schema, *schema["$defs"].values()]
    fields = [(name, field) for one in sections for name, field in one["properties"].items()]
    return [name for name, field in fields if not (field.get("description") or "$ref" in field)] + [
        name for name, one in schema["$defs"].items() if not one.get("description")
    ]


def test_every_field_is_described() -> None:
    assert undescribed(Recipe.json_schema) == []


_PIN = "revision: e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        (_PIN, "revision: main", "base.revision", "'main': a branch or tag, which can move"),
        (_PIN, "revision: v0.3", "base.revision", "'v0.3': a branch or tag"),
        (_PIN, "revision: e0bc86c", "base.revision", "'e0bc86c': a short hash"),
        (_PIN, "revision: E0BC86C23CE5AAE1DB576C8CCA6F06F1F73AF2DB", "base.revision", "40 lower-case hex digits"),
        (_PIN, "", "base", "needs its revision"),
        (_PIN, f"{_PIN}\n  path: here", "base", "either repo and revision, or path and weights_sha256"),
        ("repo: mistralai/Mistral-7B-Instruct-v0.3", "repo: Mistral", "base.repo", "'Mistral'"),
        ("epochs: 2", "epochs: 2\n  steps: 3", "training", "either steps or epochs"),
        ("epochs: 2", "steps: '3'", "training.steps", "'3': Input should be a valid integer"),
        ("epochs: 2", "steps: 0", "training.steps", "0: Input should be greater than 0"),
        ("epochs: 2", "steps: true", "training.steps", "True: "),
        ("2e-4", "fast", "training.learning_rate", "'fast'"),
        ("2e-4", ".nan", "training.learning_rate", "nan"),
        ("2e-4", "yes", "training.learning_rate", "True: expected a number"),
        ("learning_rate", "learning_rat", "training.learning_rat", "Extra inputs are not permitted"),
        ("epochs: 2", "epochs: 2\n  micro_batch_tokens: 0", "training.micro_batch_tokens", "greater than 0"),
        ("epochs: 2", "epochs: 2\n  schedule: cosin", "training.schedule", "'cosin'"),
        ("held_out: 0.1", "held_out: 1.0", "data.held_out", "less than 1"),
        ("held_out: 0.1", "held_out: 0.1\n  eval: [e.jsonl]", "data", "not both"),
        ("train: [data/train.jsonl]", "train: []", "data.train", "at least 1"),
        (
            "output: lora-out",
            "output: lora-out\nlora: {target_modules: [q_proj, q_proj]}",
            "lora.target_modules",
            "twice",
        ),
    ],
)
def test_a_bad_value_is_named_with_file_field_and_value(
    recipe_file: Path, old: str, new: str, place: str, said: str
) -> None:
    assert old in GOOD
    recipe_file.write_text(GOOD.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert caught.value.place == f"{recipe_file}, {place}"
    assert said in str(caught.value)


def test_all_bad_values_are_named_at_once(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD.replace("output:", "outptu:").replace("held_out: 0.1", "held_out: 3"))
    with pytest.raises(RecipeError, match=r"(?s)3 bad values.*data\.held_out.*output: Field required.*outptu"):
        load_recipe(recipe_file)


def test_a_key_that_appears_twice_is_an_error(recipe_file: Path) -> None:
    recipe_file.write_text(f"{GOOD}output: elsewhere\n")
    with pytest.raises(RecipeError, match="'output' appears twice"):
        load_recipe(recipe_file)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "!!python/object/apply:os.getcwd []", "\x00"])
def test_what_is_not_a_mapping_is_an_error(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(recipe_file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_local_base_without_hash_says_how_to_compute_it(base: Path, tmp_path: Path) -> None:
    data = {**yaml.safe_load(GOOD), "base": {"path": str(base)}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, folder=tmp_path)
    command = str(caught.value).partition("Compute it: ")[2]
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[0]
    recipe = parse_recipe({**data, "base": {"path": str(base), "weights_sha256": printed}}, folder=tmp_path)
    assert recipe.base.weights_sha256 == printed


def test_reading_a_recipe_loads_neither_torch_nor_pytest(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD)
    code = (
        "import sys; from pytest_mistral_lora.training import load_recipe; "
        f"load_recipe({str(recipe_file)!r}); "
        "print(*[name for name in ('torch', 'transformers', 'peft', 'pytest', 'hypothesis') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
