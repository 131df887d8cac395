"""No key of a recipe is lost in silence where a run is exported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.export.bridge import APPLIED, ExportedRun, plan_export
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.recipe.declared import Deployment

PLAIN: dict[str, dict[str, Any]] = {"training": {"eval_steps": 1}, "data": {"eval": ["held_out.jsonl"]}}
OTHER: dict[str, Any] = {
    "lora.r": 4,
    "lora.alpha": 8,
    "lora.dropout": 0.5,
    "lora.target_modules": ["q_proj"],
    "lora.rslora": True,
    "lora.dora": True,
    "lora.modules_to_save": ["lm_head"],
    "lora.start": "adapter",
    "base.quantization": "nf4",
    "training.steps": 3,
    "training.epochs": 3,
    "training.optimizer": "adamw_8bit",
    "training.betas": [0.8, 0.9],
    "training.epsilon": 1e-6,
    "training.learning_rate": 0.5,
    "training.schedule": "linear",
    "training.min_learning_rate_ratio": 0.5,
    "training.warmup_steps": 3,
    "training.warmup_ratio": 0.5,
    "training.batch_size": 2,
    "training.micro_batch_tokens": 50,
    "training.share_prefix": True,
    "training.max_length": 99,
    "training.weight_decay": 0.5,
    "training.max_grad_norm": 0.5,
    "training.seed": 3,
    "training.order_seed": 3,
    "training.precision": "bf16",
    "training.max_skipped_steps": 3,
    "training.device": "cuda",
    "training.dry_run": False,
    "training.on_oom": "shrink",
    "training.activation_checkpointing": True,
    "training.kernels": "liger",
    "training.logging_steps": 3,
    "training.eval_steps": 3,
    "training.checkpoint_steps": 3,
    "training.checkpoint_minutes": 3,
    "training.stop_at_grad_norm": 3.5,
    "training.report_to": ["tensorboard"],
    "evaluation.generations": 3,
    "evaluation.generation_steps": 3,
    "evaluation.max_new_tokens": 3,
    "evaluation.checks": ["eos"],
    "evaluation.gate": True,
    "evaluation.retention": {"rows": ["held_out.jsonl"]},
    "evaluation.commands": ["judge"],
    "card": {"license": "mit"},
    "deployment": Deployment.model_validate({"as": "adapter", "name": "support"}),
}
"""For each key of a recipe a value that is neither the default nor that of the tiny recipe."""
TOGETHER: dict[str, dict[str, Any]] = {
    "training.epochs": {"steps": None},
    "training.min_learning_rate_ratio": {"schedule": "cosine"},
    "evaluation.generation_steps": {"generations": 3},
    "evaluation.checks": {"generations": 3},
    "evaluation.retention": {"gate": True},
}
"""What a key needs beside it."""
OF_THE_BASE = {"base.repo", "base.revision", "base.path", "base.weights_sha256", "base.name", "base.oracle"}


def keys() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        fields = getattr(section, "model_fields", None)
        yield from (name,) if fields is None else (f"{name}.{key}" for key in fields)


def test_every_key_of_a_recipe_is_tried_or_in_the_rows_already() -> None:
    assert set(keys()) == {*OTHER, *APPLIED, *OF_THE_BASE, "output"}


def varied(make_full: MakeRecipe, key: str, value: Any) -> Recipe:
    section, _, name = key.partition(".")
    given = {one: dict(values) for one, values in PLAIN.items()}
    if not name:
        return make_full(**given).model_copy(update={section: value})
    if section != "base":
        given[section] = {**given.get(section, {}), **TOGETHER.get(key, {}), name: value}
        return make_full(**given)
    recipe = make_full(**given)
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={name: value})})


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, full_base: Path) -> ExportedRun:
    folder = tmp_path_factory.mktemp("planned")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "held_out.jsonl", CONVERSATIONS[:1])
    return plan_export(parse_recipe(recipe_data(full_base, **PLAIN), folder=folder))


@pytest.mark.parametrize("to", [trainer.name for trainer in TRAINERS.of_this_package() if trainer.exporter])
@pytest.mark.parametrize("key", OTHER)
def test_a_key_changes_the_configuration_or_is_said_not_to(
    key: str, to: str, make_full: MakeRecipe, planned: ExportedRun
) -> None:
    bridge = TRAINERS[to].load_exporter()
    run = replace(planned, recipe=varied(make_full, key, OTHER[key]))
    if key == "training.precision":
        run = replace(run, precision="bf16")
    if (key, to) == ("lora.start", "trl"):
        with pytest.raises(RecipeError, match="is_trainable=True"):
            bridge.settings(run)
        return
    changed = bridge.settings(run) != bridge.settings(planned)
    said = key in bridge.unsupported_keys(run.recipe)
    assert changed != said, "told and said not to be" if changed else "dropped in silence"


@pytest.mark.parametrize(("to", "key"), [("axolotl", "lora_model_dir"), ("llamafactory", "adapter_name_or_path")])
def test_the_adapter_to_start_from_has_the_trainers_own_key(
    to: str, key: str, make_full: MakeRecipe, planned: ExportedRun
) -> None:
    bridge, recipe = TRAINERS[to].load_exporter(), varied(make_full, "lora.start", "adapter")
    assert recipe.lora.start is not None
    assert bridge.settings(replace(planned, recipe=recipe))[key] == str(recipe.lora.start.resolve())
    assert key not in bridge.settings(planned)


@pytest.mark.of_field
def test_a_key_that_no_table_names_would_be_found(make_full: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_mistral_lora.training.export.bridge.LEFT_OUT", {})
    assert TRAINERS["trl"].load_exporter().unsupported_keys(make_full(training={"dry_run": False})) == {}
