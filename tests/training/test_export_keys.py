"""No key of a recipe is lost in silence where a run is exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.adapter import without_weights
from pytest_mistral_lora.training.export.bridge import APPLIED, ExportedRun, plan_export
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.recipe.declared import Deployment

PLAIN: dict[str, dict[str, Any]] = {"training": {"eval_steps": 1}, "data": {"eval": ["held_out.jsonl"]}}
OTHER: dict[str, Any] = {
    "lora.r": 4,
    "lora.alpha": 8,
    "lora.dropout": 0.5,
    "lora.target_modules": ["q_proj"],
    "lora.layers_to_transform": [1],
    "lora.rank_pattern": {"v_proj": 2},
    "lora.alpha_pattern": {"v_proj": 2},
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
REFUSED = {("lora.start", "trl"): "is_trainable=True"} | {
    (f"lora.{key}", to): '"v_proj": 2.*: .* has no setting for it'
    for key in ("rank_pattern", "alpha_pattern")
    for to in ("trl", "llamafactory")
}
"""The keys without which a run would be another one, and that a trainer cannot be told; with the words of the error."""
OF_THE_BASE = {"base.repo", "base.revision", "base.path", "base.weights_sha256", "base.name", "base.oracle"}


def keys() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        fields = getattr(section, "model_fields", None)
        yield from (name,) if fields is None else (f"{name}.{key}" for key in fields)


def test_every_key_of_a_recipe_is_tried_or_in_the_rows_already() -> None:
    assert set(keys()) == {*OTHER, *APPLIED, *OF_THE_BASE, "output", "xfails"}


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
    if (key, to) in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[key, to]) as caught:
            bridge.settings(run)
        assert str(caught.value.place) == key
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


def test_one_name_is_a_pattern_for_trl(make_full: MakeRecipe, planned: ExportedRun) -> None:
    """TRL 1.16, ModelConfig.__post_init__: a list of one name becomes that text, which PEFT matches with full names."""
    recipe = varied(make_full, "lora.target_modules", ["v_proj"])
    run = replace(planned, recipe=recipe)
    [target] = TRAINERS["trl"].load_exporter().settings(run)["lora_target_modules"]
    model = without_weights(planned.base, LoraConfig(task_type="CAUSAL_LM", target_modules=target))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in adapted] == planned_layers(planned.base, recipe.lora)


@pytest.mark.parametrize("to", ["axolotl", "llamafactory", "trl"])
def test_layers_are_chosen_by_their_full_names(to: str, make_full: MakeRecipe, planned: ExportedRun) -> None:
    recipe = varied(make_full, "lora.layers_to_transform", [1])
    settings = TRAINERS[to].load_exporter().settings(replace(planned, recipe=recipe))
    targets = settings["lora_target" if to == "llamafactory" else "lora_target_modules"]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [f"model.layers.1.self_attn.{kind}" for kind in kinds]
    assert targets == (",".join(names) if to == "llamafactory" else names)


def test_axolotl_has_keys_for_patterns(make_full: MakeRecipe, planned: ExportedRun) -> None:
    bridge, found = TRAINERS["axolotl"].load_exporter(), {}
    for key in ("rank_pattern", "alpha_pattern"):
        recipe = varied(make_full, f"lora.{key}", {"v_proj": 2})
        found[key] = bridge.settings(replace(planned, recipe=recipe))[f"lora_{key}"]
    assert found == {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}}
    recipe = varied(make_full, "lora.alpha_pattern", {"v_proj": 2.5})
    with pytest.raises(RecipeError, match=r"2\.5: the runner takes whole numbers only"):
        bridge.settings(replace(planned, recipe=recipe))


@pytest.mark.of_field
def test_a_key_that_no_table_names_would_be_found(make_full: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_mistral_lora.training.export.bridge.LEFT_OUT", {})
    assert TRAINERS["trl"].load_exporter().unsupported_keys(make_full(training={"dry_run": False})) == {}


def test_a_setting_that_a_trainer_lacks_is_named_with_file_and_line(
    full_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "indented.yaml", tmp_path / "run"
    write_rows(tmp_path / "rows.jsonl")
    data = recipe_data(full_base, lora={"rank_pattern": {"v_proj": 2}})
    file.write_text(json.dumps(data, indent=1, default=str))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if "rank_pattern" in text)
    assert main(["export", str(file), "--to", "trl", "--output", str(output)]) == 2
    assert f"{file.name}:{line}, lora.rank_pattern" in capsys.readouterr().err
    assert not output.exists()
