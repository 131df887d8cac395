"""The fields of a recipe: each value is checked, and a bad one is named with file, line and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from tiny_runs import GOOD

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe import Recipe, load_recipe, parse_recipe


def test_a_good_recipe_has_paths_beside_its_file(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD)
    recipe = load_recipe(recipe_file)
    assert recipe.output == recipe_file.parent / "lora-out"
    assert recipe.data.train == (recipe_file.parent / "data/train.jsonl",)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.lora.target_modules == ("attention",)
    assert recipe.base.label == "mistralai/Mistral-7B-Instruct-v0.3"


def test_as_written_makes_the_same_recipe_again(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(GOOD)
    recipe = load_recipe(recipe_file)
    again = json.loads(json.dumps(recipe.as_written()))
    assert again["data"]["train"] == ["data/train.jsonl"]
    assert parse_recipe(again, folder=tmp_path) == recipe


def test_a_schema_of_a_check_is_beside_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    checks = "[{json_schema: answer.json}, eos, {max_tokens: 9}, {regex: a+}]"
    recipe_file.write_text(f"{GOOD}evaluation: {{generations: 1, checks: {checks}}}\n")
    recipe = load_recipe(recipe_file)
    assert recipe.as_written()["evaluation"]["checks"] == yaml.safe_load(checks)
    assert parse_recipe(json.loads(json.dumps(recipe.as_written())), folder=tmp_path) == recipe
    for text, said in [(None, "No such file"), ("{", "not valid JSON"), ('{"type": "objekt"}', "not a JSON Schema")]:
        if text is not None:
            (tmp_path / "answer.json").write_text(text)
        with pytest.raises(RecipeError, match=said):
            recipe.evaluation.format_checks()
    (tmp_path / "answer.json").write_text('{"type": "object"}')
    names = [check.name for check in recipe.evaluation.format_checks()]
    assert names == ["json_schema:answer.json", "eos", "max_tokens:9", "regex:a+"]


def test_recipes_are_frozen(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).training.seed = 3


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

ADDED_TO_TRAINING = [
    ("steps: 3", "training", "either steps or epochs"),
    ("micro_batch_tokens: 0", "training.micro_batch_tokens", "more than 0"),
    ("schedule: cosin", "training.schedule", "'cosin'"),
    ("optimizer: sgd", "training.optimizer", "'sgd': expected 'adamw'"),
    ("betas: [0.9]", "training.betas.1", "is missing"),
    ("betas: [0.9, 1]", "training.betas.1", "1: expected less than 1"),
    ("epsilon: 0", "training.epsilon", "0: expected more than 0"),
    ("warmup_ratio: 1", "training.warmup_ratio", "1: expected less than 1"),
    ("warmup_ratio: 0", "training.warmup_ratio", "0: expected more than 0"),
    ("warmup_ratio: 0.1\n  warmup_steps: 1", "training", "either warmup_steps or warmup_ratio"),
    ("min_learning_rate_ratio: 0.1\n  schedule: linear", "training", "of a cosine, and schedule is linear"),
    ("precision: fp8", "training.precision", "'fp8': expected 'fp32'"),
    ("max_skipped_steps: 0", "training.max_skipped_steps", "0: expected more"),
    ("kernels: triton", "training.kernels", "'triton': expected 'liger'"),
]
CHECKS = [
    ("jsno", "evaluation.checks.0", "'jsno': expected json, tool_call, eos"),
    ("3", "evaluation.checks.0", "3: expected json, tool_call, eos"),
    ("{regex: a, max_tokens: 1}", "evaluation.checks.0", "expected json, tool_call, eos"),
    ("{regex: (}", "evaluation.checks.0.regex.regex", "'(': not a regular expression"),
    ("{max_tokens: 0}", "evaluation.checks.0.max_tokens.max_tokens", "0: expected more than 0"),
    ("eos, eos", "evaluation", "given twice"),
]
LORA = [
    ("target_modules: [q_proj, q_proj]", "lora.target_modules", "twice"),
    ("dora: 1", "lora.dora", "1: expected true or false"),
    ("modules_to_save: lm_head", "lora.modules_to_save", "'lm_head'"),
    ("modules_to_save: [a, a]", "lora.modules_to_save", "twice"),
    ("target_modules: [q_proj], modules_to_save: [q_proj]", "lora", "q_proj is in target_modules"),
]


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        (_PIN, "revision: main", "base.revision", "'main': a branch or tag, which can move"),
        (_PIN, "revision: v0.3", "base.revision", "'v0.3': a branch or tag"),
        (_PIN, "revision: e0bc86c", "base.revision", "'e0bc86c': a short hash"),
        (_PIN, "revision: E0BC86C23CE5AAE1DB576C8CCA6F06F1F73AF2DB", "base.revision", "40 lower-case hex digits"),
        (_PIN, "", "base", "needs its revision"),
        (_PIN, f"{_PIN}\n  path: here", "base", "or path and weights_sha256"),
        (_PIN, f"{_PIN}\n  quantization: int4", "base.quantization", "'int4': expected 'nf4'"),
        ("repo: mistralai/Mistral-7B-Instruct-v0.3", "repo: Mistral", "base.repo", "'Mistral'"),
        ("epochs: 2", "steps: '3'", "training.steps", "'3': expected a whole number"),
        ("epochs: 2", "steps: 0", "training.steps", "0: expected more than 0"),
        ("epochs: 2", "steps: true", "training.steps", "True: "),
        *(("epochs: 2", f"epochs: 2\n  {line}", place, said) for line, place, said in ADDED_TO_TRAINING),
        ("2e-4", "fast", "training.learning_rate", "'fast'"),
        ("2e-4", ".nan", "training.learning_rate", "nan"),
        ("2e-4", "yes", "training.learning_rate", "True: expected a number"),
        ("learning_rate", "learning_rat", "training.learning_rat", "no such key (did you mean 'learning_rate'?)"),
        ("output", "evaluation: {checks: [json]}\noutput", "evaluation", "checks without generations"),
        ("output", "evaluation: {generation_steps: 5}\noutput", "evaluation", "generation_steps without generations"),
        *(
            ("output", f"evaluation: {{generations: 1, checks: [{check}]}}\noutput", place, said)
            for check, place, said in CHECKS
        ),
        ("held_out: 0.1", "held_out: 1.0", "data.held_out", "less than 1"),
        ("held_out: 0.1", "held_out: 0.1\n  eval: [e.jsonl]", "data", "not both"),
        ("train: [data/train.jsonl]", "train: []", "data.train", "at least 1"),
        *(("output", f"lora: {{{keys}}}\noutput", place, said) for keys, place, said in LORA),
    ],
)
def test_a_bad_value_is_named_with_file_field_and_value(
    recipe_file: Path, old: str, new: str, place: str, said: str
) -> None:
    assert old in GOOD
    recipe_file.write_text(GOOD.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    source, _, field = str(caught.value.place).partition(", ")
    assert field == place
    # the line of the field itself, or of the section around it
    file, _, line = source.rpartition(":")
    written = recipe_file.read_text().splitlines()[int(line) - 1]
    assert file == str(recipe_file)
    assert any(f"{step}:" in written or written.startswith("base") for step in place.split("."))
    assert said in str(caught.value)


def test_all_bad_values_are_named_at_once(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD.replace("output:", "outptu:").replace("held_out: 0.1", "held_out: 3"))
    with pytest.raises(RecipeError, match=r"(?s)3 bad values.*data\.held_out.*output: is missing.*outptu"):
        load_recipe(recipe_file)


@pytest.mark.parametrize(
    ("old", "new", "field", "found"),
    [
        ("lora-out", "''", "output", "the recipe's folder is this folder"),
        ("lora-out", ".", "output", "the recipe's folder is this folder"),
        ("lora-out", "..", "output", "the recipe's folder is this folder"),
        ("lora-out", "a/..", "output", "the recipe's folder is this folder"),
        ("lora-out", "/", "output", "the recipe's folder is this folder"),
        ("lora-out", "x" * 201, "output", "a name of more than 200 bytes"),
        ("lora-out", "x" * 300, "output", "a path longer than a file system has"),
        ("lora-out", "x/" * 2000, "output", "a path longer than a file system has"),
        ("lora-out", "~nobody-of-this-name/out", "output", "Could not determine home directory"),
        ("data/train.jsonl", "x" * 300, "data.train.0", "a path longer than a file system has"),
        ("epochs: 2", f"steps: 1{'0' * 18}", "training.steps", "at most 1000000000"),
        ("epochs: 2", "epochs: 1e300", "training.epochs", "at most 1000000"),
        ("epochs: 2", f"epochs: 2\n  seed: {2**32}", "training.seed", "less than 4294967296"),
        ("epochs: 2", f"epochs: 2\n  order_seed: {2**40}", "training.order_seed", "less than 4294967296"),
        ("epochs: 2", f"epochs: 2\n  batch_size: {2**33}", "training.batch_size", "at most 2147483647"),
        ("2e-4", "1e999", "training.learning_rate", "inf: expected a finite number"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused(recipe_file: Path, old: str, new: str, field: str, found: str) -> None:
    assert old in GOOD
    recipe_file.write_text(GOOD.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert str(caught.value.place).partition(", ")[2] == field
    assert found in caught.value.found
    assert len(str(caught.value)) < 600


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
