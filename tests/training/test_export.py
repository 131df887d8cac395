"""Exported runs: nothing of a recipe is lost in silence, and the rows are the trainer's own."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from cut_sentencepiece import cut_v3
from datasets import load_dataset, load_from_disk
from derived_tekken import write_derived
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora import cli
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.errors import InputError, RecipeError, TokenizerError
from pytest_mistral_lora.formats.sources import rows_of
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.export.bridge import plan_export
from pytest_mistral_lora.training.export.run import ExportedFolder, why_not_messages
from pytest_mistral_lora.training.export.run import export as write_export
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe


def export(recipe: Recipe, to: str, output: Path, **options: Any) -> ExportedFolder:
    return write_export(recipe, TRAINERS[to].load_exporter(), output, **options)


EXPORTERS = [trainer.name for trainer in TRAINERS.of_this_package() if trainer.exporter]


@pytest.fixture(params=EXPORTERS)
def to(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings_of(folder: Path) -> Any:
    (file,) = folder.glob("*.yaml")
    return yaml.safe_load(file.read_text())


def test_an_exported_folder_is_imported_as_the_same_rows(tmp_path: Path, make_full: MakeRecipe, to: str) -> None:
    recipe = make_full(training={"eval_steps": 1}, data={"eval": ["held_out.jsonl"]})
    done = export(recipe, to, tmp_path / to)
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert list(rows_of(done.folder / "chat.jsonl")) == rows
    if done.form == "messages":
        assert list(rows_of(done.config)) == rows
    else:
        # ids and labels are no rows, and are named with the verb that judges them
        with pytest.raises(InputError, match="encoded rows"):
            list(rows_of(done.config))


@pytest.fixture(scope="module", params=EXPORTERS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, full_base: Path
) -> tuple[str, ExportedFolder]:
    """A trainer, and an exported folder of ids in which several tests look: its rows are those of `tiny_runs`."""
    folder = tmp_path_factory.mktemp("exported")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "held_out.jsonl", CONVERSATIONS[:1])
    training = {"batch_size": 4, "schedule": "cosine", "precision": "fp32", "on_oom": "shrink"}
    training |= {"activation_checkpointing": True, "report_to": ["tensorboard"]}
    sections = {"data": {"eval": ["held_out.jsonl"]}, "training": training, "evaluation": {"generations": 2}}
    recipe = parse_recipe(recipe_data(full_base, **sections), folder=folder)
    return request.param, export(recipe, request.param, folder / "a run", form="tokens")


def test_the_configuration_is_the_recipes(exported: tuple[str, ExportedFolder], full_base: Path) -> None:
    settings = settings_of(exported[1].folder)
    same = {"max_steps": 40, "gradient_accumulation_steps": 1, "learning_rate": 0.01, "seed": 0, "lora_alpha": 16}
    assert {key: settings[key] for key in same} == same
    assert str(full_base) in settings.values()
    assert settings.get("micro_batch_size", settings.get("per_device_train_batch_size")) == 4
    modules = settings.get("lora_target_modules", settings.get("lora_target"))
    assert (modules.split(",") if isinstance(modules, str) else modules) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert not settings["bf16"]
    assert not settings["fp16"]


def test_a_hub_base_keeps_its_revision(make_full: MakeRecipe, to: str) -> None:
    run = plan_export(make_full())
    base = run.recipe.base.model_copy(update={"repo": "owner/name", "revision": "ab" * 20, "path": None})
    settings = TRAINERS[to].load_exporter().settings(replace(run, recipe=run.recipe.model_copy(update={"base": base})))
    assert {"owner/name", "ab" * 20} <= {value for value in settings.values() if isinstance(value, str)}


def test_micro_batches_divide_a_step_and_stay_within_their_tokens(make_full: MakeRecipe) -> None:
    run = plan_export(make_full(training={"batch_size": 12, "micro_batch_tokens": 150}))
    longest = int(run.data.train.lengths.max())
    assert 12 % run.rows_at_once == 0
    assert run.rows_at_once * longest <= 150
    assert run.rows_at_once * run.accumulation == 12
    assert plan_export(make_full(training={"micro_batch_tokens": 1})).rows_at_once == 1


def test_epochs_become_steps_as_in_training(make_full: MakeRecipe) -> None:
    run = plan_export(make_full(training={"steps": None, "epochs": 2.5, "batch_size": 2, "warmup_ratio": 0.25}))
    assert (run.steps, run.warmup_steps) == (8, 2)  # three steps an epoch


def encoded_of(done: Any, name: str) -> list[dict[str, Any]]:
    if (done.folder / "rows" / "dataset_dict.json").is_file():
        return list(load_from_disk(str(done.folder / "rows"))[{"test": "validation"}.get(name, name)])
    rows = load_dataset(str(done.folder / "rows"), cache_dir=str(done.folder / "cache"))
    return list(rows[name])


def test_rows_are_the_ids_and_labels_of_the_trainer(exported: tuple[str, ExportedFolder]) -> None:
    done = exported[1]
    oracle = Oracle(cut_v3())
    for name, file in (("train", "rows.jsonl"), ("test", "held_out.jsonl")):
        expected = [oracle.encode(row) for row in read_rows(done.folder.parent / file)]
        found = encoded_of(done, name)
        assert [tuple(row["input_ids"]) for row in found] == [row.input_ids for row in expected]
        assert [tuple(row["labels"]) for row in found] == [row.labels for row in expected]
        assert all(set(row) == {"input_ids", "attention_mask", "labels"} for row in found)


@pytest.mark.of_field
def test_trl_gets_messages_where_the_template_is_exact(make_full: MakeRecipe, tmp_path: Path) -> None:
    done = export(make_full(), "trl", tmp_path / "to")
    settings = settings_of(done.folder)
    assert done.form == "messages"
    assert all(remark in (done.folder / "README.md").read_text() for remark in done.remarks)
    assert (settings["assistant_only_loss"], settings["chat_template_path"]) == (True, "training.jinja")
    assert "{% generation %}" in (done.folder / "training.jinja").read_text()
    assert json.loads((done.folder / "rows" / "train.jsonl").read_text().splitlines()[0])["messages"]


def answer(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*answer()["messages"], *answer(weight=0)["messages"]]}, "other labels, as it does for a weight"),
        pytest.param(answer(content="b "), "other ids", marks=pytest.mark.slow),
        pytest.param(
            {"messages": [{"role": "user", "content": "</s>"}, *answer()["messages"][1:]]},
            "other ids",
            marks=pytest.mark.slow,
        ),
        ({"messages": [answer()["messages"][0], {"role": "assistant", "tool_calls": [CALL]}]}, "more than roles"),
        ({"messages": [{"role": "system", "content": "s"}, *answer()["messages"][1:]]}, "refuses it"),
    ],
    ids=["weight", "trailing space", "control token", "tool call", "no user"],
)
def test_trl_gets_ids_where_the_template_is_not_exact(
    row: dict[str, Any], reason: str, make_full: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_full()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    done = export(recipe, "trl", tmp_path / "to")
    assert done.form == "tokens"
    assert any(reason in remark and "rows.jsonl:6" in remark for remark in done.remarks)
    with pytest.raises(InputError, match=reason):
        export(recipe, "trl", tmp_path / "again", form="messages")


def test_a_base_with_mistrals_own_tokenizer_alone_gets_ids(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "tiny", write_derived("derived-v11", tmp_path, words=2000))
    write_rows(tmp_path / "rows.jsonl")
    run = plan_export(parse_recipe(recipe_data(base), folder=tmp_path))
    assert "takes no chat template" in why_not_messages(run)


@pytest.mark.of_field
def test_only_trl_takes_messages(make_full: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="templates of Axolotl do not give Mistral's ids"):
        export(make_full(), "axolotl", tmp_path / "to", form="messages")
    assert not (tmp_path / "to").exists()


def test_what_the_runner_is_not_told_is_on_the_page(exported: tuple[str, ExportedFolder]) -> None:
    to, done = exported
    assert done.command.startswith(f"cd '{done.folder}' && ")
    page = (done.folder / "README.md").read_text()
    assert {"training.on_oom", "evaluation.generations", "output"} <= done.not_told.keys()
    assert not {"card", "training.dry_run", "evaluation.checks"} & done.not_told.keys()
    assert all(f"`{key}`" in page for key in done.not_told)
    assert all(remark in page for remark in done.remarks)
    assert TRAINERS[to].load_exporter().command in page


@pytest.mark.of_field
def test_axolotls_mean_over_micro_batches_is_said_where_there_are_several(
    make_full: MakeRecipe, tmp_path: Path
) -> None:
    several = export(make_full(training={"micro_batch_tokens": 1}), "axolotl", tmp_path / "several")
    one = export(make_full(), "axolotl", tmp_path / "one")
    assert any("mean of each of the 5 micro-batches" in remark for remark in several.remarks)
    assert not any("micro-batches of a step" in remark for remark in one.remarks)
    assert settings_of(one.folder)["gradient_accumulation_steps"] == 1


def test_the_chat_rows_for_the_audit_are_those_that_are_trained_on(
    make_full: MakeRecipe, to: str, tmp_path: Path
) -> None:
    with (tmp_path / "more.jsonl").open("w") as file:
        file.write(json.dumps(answer(weight=0)) + "\n" + json.dumps(answer()) + "\n")
    done = export(make_full(data={"train": ["more.jsonl"]}, training={"unsupervised": "drop"}), to, tmp_path / "to")
    assert [row.messages[-1].get("weight") for row in read_rows(done.folder / "chat.jsonl")] == [None]
    assert "--own-data --dataset chat.jsonl" in (done.folder / "README.md").read_text()


def test_an_exported_configuration_is_audited_without_code(exported: tuple[str, ExportedFolder]) -> None:
    """Its keys of training are known, and its data are kept: no other rows would be judged."""
    to, done = exported
    made = TRAINERS[to].safe_configuration(done.config, own_data=True)
    # a logger is a network, and Axolotl's plugins are code
    assert set(made.left_out) <= {"report_to", "use_tensorboard", "plugins"}
    written = settings_of(done.folder)
    data = {"trl": "dataset_name", "axolotl": "datasets", "llamafactory": "tokenized_path"}[to]
    assert made.data[data] == written[data]


def test_an_alpha_that_no_runner_takes_is_refused(make_full: MakeRecipe, to: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"lora\.alpha: 2\.5: "):
        export(make_full(lora={"alpha": 2.5}), to, tmp_path / "to")
    assert list(tmp_path.glob("*to*")) == []


@pytest.mark.skipif(version("transformers") < "5", reason="transformers 4 loads a bare tokenizer.model.v3, too")
def test_a_base_whose_tokenizer_no_runner_loads_is_refused(tmp_path: Path, base: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(TokenizerError, match=r"no tokenizer.*save_pretrained"):
        plan_export(parse_recipe(recipe_data(base), folder=tmp_path))


@pytest.mark.of_field
def test_a_folder_is_never_written_over(make_full: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(make_full(), "trl", tmp_path / "to")


@pytest.mark.of_field
def test_the_command_says_what_is_different(
    make_full: MakeRecipe, tmp_path: Path, full_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_full()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(full_base, training={"dry_run": False})))
    call = ["export", str(tmp_path / "recipe.yaml"), "--to", "axolotl", "--output", str(tmp_path / "to")]
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    assert "left out: training.dry_run: " in out
    assert "different: The order of the rows" in out
    assert out.endswith("&& axolotl train axolotl.yaml\n")
    assert cli.main(call) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*call[:-1], str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "tokens"
