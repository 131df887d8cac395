"""A run goes on from an adapter: all of it, and it begins with the loss that the adapter ended with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import declare
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_runs import HELD_OUT, base_with, recipe_data, write_rows
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.kept_results import _paths
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import InputError, MistralLoraError, RecipeError, StoppedError, TrainingError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import adapted_layers, peft_quiet
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.prepare import plan_run, prepare
from pytest_mistral_lora.training.progress import header
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.rerun import rerun
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import check_output, checkpoints, refuse_missing_inputs, work_folder
from pytest_mistral_lora.training.save import Adapter, check_adapter
from pytest_mistral_lora.training.start import load_start, plan_start
from pytest_mistral_lora.training.start_loss import AFTER, parent_loss

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
Change = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Line:
    """A folder with rows and an adapter `a`, and the recipes of runs that go on from it."""

    folder: Path
    base: Path

    def recipe(self, output: str, start: str | None = "a", **sections: dict[str, Any]) -> Recipe:
        training = {"steps": 3, **sections.pop("training", {})}
        lora = {**sections.pop("lora", {}), **({"start": start} if start else {})}
        data = {"eval": ["eval.jsonl"], **sections.pop("data", {})}
        written = recipe_data(self.base, training=training, lora=lora, data=data, **sections)
        return parse_recipe({**written, "output": output}, folder=self.folder)

    def copy(self, name: str = "copy", *, manifest: bool = False) -> Path:
        """Return a copy of the adapter `a`, by default as another trainer would have left it."""
        folder = Path(shutil.copytree(self.folder / "a", self.folder / name))
        if not manifest:
            (folder / "manifest.json").unlink()
        return folder


def line_in(folder: Path, base: Path) -> Line:
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "eval.jsonl", HELD_OUT[:2])
    return Line(folder, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Line, RunResult, RunResult]:
    """An adapter `a`, and `b` that went on from it."""
    line = line_in(tmp_path_factory.mktemp("line"), base)
    return line, train(line.recipe("a", None)), train(line.recipe("b"))


@pytest.fixture
def line(trained: tuple[Line, RunResult, RunResult], tmp_path: Path, base: Path) -> Line:
    """The same with nothing but `a`, to be changed."""
    shutil.copytree(trained[1].output, tmp_path / "a")
    return line_in(tmp_path, base)


def plan(recipe: Recipe) -> Any:
    base = BaseFolder(recipe.base.path or Path())
    return plan_start(recipe, base, adapted_layers(base, recipe.lora.target_modules))


def change_tensors(folder: Path, change: Change) -> None:
    tensors = load_file(folder / ADAPTER_TENSORS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_TENSORS)


def change_config(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def losses(run: RunResult) -> list[float]:
    return [entry["eval_loss"] for entry in run.log if "eval_loss" in entry]


def test_a_run_begins_where_the_adapter_ended(trained: tuple[Line, RunResult, RunResult]) -> None:
    _, a, b = trained
    assert losses(b)[0] == losses(a)[-1] != losses(a)[0]
    assert losses(b)[-1] < losses(b)[0]
    folder = AdapterFolder(a.output)
    assert b.manifest["lora"]["start"] == {
        "path": "a",
        "manifest_sha256": folder.manifest_sha256,
        "config_sha256": folder.sha256("adapter_config.json"),
        "tensors_sha256": folder.tensors_sha256,
        "dataset": ["rows.jsonl"],
        "dataset_sha256": a.manifest["dataset_sha256"],
        "steps": 3,
        "held_out_loss": losses(a)[-1],
        "parent_held_out_loss": losses(a)[-1],
        "parents": [],
    }
    assert all(torch.equal(b.adapter.initial[name], tensor) for name, tensor in a.adapter.tensors.items())
    assert "start" not in a.manifest["lora"]


def test_the_loss_is_that_of_pefts_own_model(trained: tuple[Line, RunResult, RunResult]) -> None:
    """In a test only: at run time the values are read back, and a second copy of the base could be too much."""
    _, a, b = trained
    model = AutoModelForCausalLM.from_pretrained(b.base_folder, dtype=torch.float32)
    with peft_quiet():
        model = PeftModel.from_pretrained(model, a.output)
    total = count = 0.0
    for row in b.data.held_out.encoded:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert total / count == pytest.approx(losses(b)[0], abs=1e-5)


def test_three_generations_are_in_the_last_note(trained: tuple[Line, RunResult, RunResult]) -> None:
    line, a, b = trained
    start = train(line.recipe("c", "b", training={"steps": 1})).manifest["lora"]["start"]
    assert [start["path"], *(parent["path"] for parent in start["parents"])] == ["b", "a"]
    assert start["parents"][0]["tensors_sha256"] == AdapterFolder(a.output).tensors_sha256
    note = (line.folder / "c" / "DECISION.md").read_text()
    assert all(AdapterFolder(run.output).manifest_sha256 in note for run in (a, b))
    changed = {field.path for field in compare_runs(line.folder / "b", line.folder / "c").facts}
    assert {"$.lora.start.tensors_sha256", "$.lora.start.parents[0]"} <= changed


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_dora_adapter_with_a_module_in_full_goes_on(line: Line, precision: str) -> None:
    lora = {"dora": True, "rslora": True, "modules_to_save": ["lm_head"], "target_modules": ["attention+mlp"]}
    sections: dict[str, Any] = {"lora": lora, "training": {"steps": 2, "precision": precision}}
    first = train(line.recipe("first", None, **sections))
    ended, tensors = losses(first)[-1], first.adapter.tensors
    del first  # its model is large: the head twice
    second = train(line.recipe("second", "first", **sections))
    assert second.manifest["lora"]["start"]["parent_held_out_loss"] == ended == losses(second)[0]
    assert all(torch.equal(second.adapter.initial[name], tensor) for name, tensor in tensors.items())


def test_another_trainers_adapter_in_bf16_goes_on(line: Line) -> None:
    folder = line.copy()
    change_tensors(folder, lambda tensors: tensors.update({name: one.bfloat16() for name, one in tensors.items()}))
    expected = load_file(folder / ADAPTER_TENSORS)
    run = train(line.recipe("out", "copy", training={"steps": 1}))
    assert all(torch.equal(run.adapter.initial[name], tensor.float()) for name, tensor in expected.items())
    start = run.manifest["lora"]["start"]
    assert (start["manifest_sha256"], start["dataset"], start["steps"]) == (None, None, None)
    assert start["not_compared"] == "the parent has no manifest"
    assert start["held_out_loss"] == losses(run)[0]
    assert "another trainer wrote it" in (run.output / "DECISION.md").read_text()
    assert of_start(run) == {f"lora.start.{name}": "match" for name in ("tensors_sha256", "config_sha256")}
    change_config(folder, lora_dropout=0.5)
    assert of_start(run)["lora.start.config_sha256"] == "mismatch"


def of_start(run: RunResult) -> dict[str, str]:
    fields = (field for field in verify(run.output) if not field.again)
    return {field.name: field.state for field in fields if field.name.startswith("lora.start")}


def rename(tensors: dict[str, Any]) -> None:
    tensors[B.replace(".weight", ".default.weight")] = tensors.pop(B)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, [B.replace(".weight", ".default.weight"), f"did you mean '{B}'"]),
        (lambda tensors: tensors.pop(B), [B, "is missing"]),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)}), ["lm_head", "no place"]),
        (lambda tensors: tensors.update({A: tensors[A][:4].clone()}), [A, "(4, ", "(8, "]),
        (lambda tensors: tensors.update({A: tensors[A].T.contiguous()}), [A, "has shape"]),
        (lambda tensors: tensors.update({A: tensors[A].int()}), [A, "int32", "float32"]),
        (lambda tensors: tensors[B].view(-1)[3:4].fill_(torch.nan), [B, "not finite"]),
        (lambda tensors: tensors[B].view(-1)[3:4].fill_(torch.inf), [B, "not finite"]),
    ],
    ids=["renamed", "missing", "extra", "rank", "transposed", "integers", "nan", "inf"],
)
def test_a_tensor_that_does_not_fit_is_named(line: Line, change: Change, words: list[str]) -> None:
    change_tensors(line.copy(), change)
    with pytest.raises(RecipeError) as caught:
        plan(line.recipe("out", "copy"))
    assert str(caught.value.place) == "lora.start"
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("keys", "lora", "place", "words"),
    [
        ({}, {"r": 4}, "lora.r", ["r is 8", "lora.r 4", "Set lora.r: 8"]),
        ({}, {"alpha": 8}, "lora.alpha", ["lora_alpha is 16", "Set lora.alpha: 16"]),
        ({}, {"rslora": True}, "lora.rslora", ["use_rslora is false", "Set lora.rslora: false"]),
        ({}, {"dora": True}, "lora.dora", ["use_dora is false", "Set lora.dora: false"]),
        ({}, {"target_modules": ["q_proj"]}, "lora.target_modules", ["k_proj", "[k_proj, o_proj, q_proj, v_proj]"]),
        ({}, {"target_modules": ["attention+mlp"]}, "lora.target_modules", ["does not adapt", "down_proj"]),
        ({}, {"modules_to_save": ["lm_head"]}, "lora.modules_to_save", ["lm_head", "Set lora.modules_to_save: []"]),
        ({}, {"r": 4, "alpha": 8}, "lora.r", ["Set lora.r: 8. Set lora.alpha: 16."]),
        ({"alpha_pattern": {"0.self_attn.q_proj": 99}}, {}, "lora.alpha", ["99 in model.layers.0", "alpha_pattern"]),
        ({"rank_pattern": {"1.self_attn.v_proj": 2}}, {}, "lora.r", ["r is 2 in model.layers.1", "rank_pattern"]),
        ({"layers_to_transform": [0]}, {}, "lora.target_modules", ["does not adapt model.layers.1"]),
        ({"lora_bias": True}, {}, "lora.start", ["lora_B.bias"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_configuration_that_differs_is_named(
    line: Line, keys: dict[str, Any], lora: dict[str, Any], place: str, words: list[str]
) -> None:
    change_config(line.copy(), **keys)
    with pytest.raises(RecipeError) as caught:
        plan(line.recipe("out", "copy", lora=lora))
    assert str(caught.value.place) == place
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_initialisation_that_changed_the_base_is_refused(line: Line) -> None:
    change_config(line.copy(), init_lora_weights="pissa")
    with pytest.raises(InputError, match="pissa"):
        plan(line.recipe("out", "copy"))


def test_an_adapter_of_other_weights_is_refused(line: Line, tmp_path: Path) -> None:
    other = Path(shutil.copytree(line.base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: one * 1.5 for name, one in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="whose weights have SHA-256") as caught:
        plan(replace(line, base=other).recipe("out"))
    assert str(caught.value.place) == "base"
    # without a manifest, the folder that the configuration names tells
    change_config(line.copy(), base_model_name_or_path=str(line.base))
    with pytest.raises(RecipeError, match="whose weights have SHA-256"):
        plan(replace(line, base=other).recipe("out", "copy"))
    assert plan(line.recipe("out", "copy")).manifest is None


def test_the_same_weights_with_another_configuration_are_refused(line: Line, tmp_path: Path) -> None:
    other = base_with(line.base, tmp_path / "other", rms_norm_eps=0.1)
    with pytest.raises(RecipeError, match=r"rms_norm_eps is 0\.1") as caught:
        plan(replace(line, base=other).recipe("out"))
    assert str(caught.value.place) == "base"


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}, "base.repo"),
        ({"base_model_name_or_path": "owner/name", "revision": "cd" * 20}, "base.revision"),
        ({"base_model_name_or_path": "owner/name", "revision": "main"}, None),
        ({"base_model_name_or_path": "owner/name", "revision": "ab" * 20}, None),
        ({"base_model_name_or_path": "/data/of/another/machine"}, None),
    ],
)
def test_names_of_the_hub_are_compared(line: Line, keys: dict[str, Any], place: str | None) -> None:
    change_config(line.copy(), **keys)
    recipe = line.recipe("out", "copy")
    hub = {"repo": "owner/name", "revision": "ab" * 20, "path": None, "weights_sha256": None, "name": None}
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update=hub)})
    base = BaseFolder(line.base)
    if place is None:
        assert plan_start(recipe, base, adapted_layers(base, recipe.lora.target_modules)) is not None
        return
    with pytest.raises(RecipeError, match="was trained on") as caught:
        plan_start(recipe, base, adapted_layers(base, recipe.lora.target_modules))
    assert str(caught.value.place) == place


def test_what_is_no_adapter_is_refused_as_what_it_is(line: Line) -> None:
    merged = merge(line.folder / "a", line.folder / "merged", line.base).output
    pickled = line.copy("pickled")
    (pickled / ADAPTER_TENSORS).rename(pickled / "adapter_model.bin")
    below = line.folder / "run" / "checkpoint-3"
    shutil.copytree(line.copy("peft"), below)
    cases = {
        "nowhere": "no such folder",
        "rows.jsonl": "is a file",
        str(merged): "is a merged model",
        str(line.base): "is a model and not an adapter",
        "pickled": "adapter_model.bin is a pickle",
        "run": "There is one in checkpoint-3",
    }
    for start, words in cases.items():
        with pytest.raises(RecipeError, match=words) as caught:
            plan(line.recipe("out", start))
        assert str(caught.value.place) == "lora.start"
    with pytest.raises(RecipeError, match="no such folder"):
        refuse_missing_inputs(line.recipe("out", "nowhere"))


@pytest.mark.parametrize(
    ("output", "start", "place", "words"),
    [
        ("out", "out", "lora.start", "is the output of this recipe"),
        ("out", "out/checkpoint-1", "lora.start", "the output of this recipe"),
        ("out", "out.work/checkpoint-1", "lora.start", "which a finished run removes"),
        ("a/again", "a", "output", "the adapter that the run starts from"),
    ],
)
def test_a_run_does_not_start_from_its_own_folders(line: Line, output: str, start: str, place: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        check_output(line.recipe(output, start))
    assert str(caught.value.place) == place


def test_an_adapter_that_is_not_as_recorded_is_refused(line: Line) -> None:
    def refused(name: str, change: Callable[[Path], None]) -> InputError:
        folder = line.copy(name, manifest=True)
        change(folder)
        with pytest.raises(InputError) as caught:
            plan(line.recipe("out", name))
        return caught.value

    def edit_manifest(folder: Path) -> None:
        file = folder / "manifest.json"
        file.write_text(file.read_text().replace('"seed": 0', '"seed": 1', 1))

    def scale(tensors: dict[str, Any]) -> None:
        tensors[B] *= 2

    assert str(refused("seal", edit_manifest).place).endswith("manifest.json, seal")
    assert str(refused("tensors", lambda folder: change_tensors(folder, scale)).place).endswith(ADAPTER_TENSORS)
    assert str(refused("config", lambda folder: change_config(folder, lora_alpha=32)).place).endswith("config.json")
    assert (
        "is missing"
        in refused("schema", lambda folder: (folder / "manifest.json").write_text('{"kind": "adapter"}') and None).found
    )


@pytest.mark.usefixtures("data_alone")
def test_check_of_a_recipe_finds_it(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensors(line.copy(), rename)
    written = {**recipe_data(line.base, lora={"start": "copy"}), "output": "out"}
    (line.folder / "recipe.yaml").write_text(json.dumps(written))
    assert main(["check", str(line.folder / "recipe.yaml")]) == 1
    out = capsys.readouterr().out
    assert "ML641" in out
    assert B.replace(".weight", ".default.weight") in out


def redeclared(line: Line, **sections: Callable[[Any], None]) -> None:
    """Change parts of the manifest of `a`, as if its run had recorded them so."""
    manifest = json.loads((line.folder / "a" / "manifest.json").read_text())
    for section, change in sections.items():
        change(manifest[section])
    declare(line.folder / "a", manifest)


def test_another_loss_on_the_same_rows_stops_the_run_before_its_first_step(line: Line) -> None:
    redeclared(line, evaluation=lambda parts: parts[0]["results"].update({AFTER: 0.25}))
    recipe = line.recipe("out")
    with pytest.raises(TrainingError, match=r"before the first step is \d.*ended with 0\.25") as caught:
        train(recipe)
    assert str(caught.value.place) == "lora.start"
    assert (recipe.output.exists(), checkpoints(work_folder(recipe))) == (False, [])
    assert "0.25" in json.loads((work_folder(recipe) / "failure.json").read_text())["cause"]


@pytest.mark.parametrize(
    ("change", "data", "reason"),
    [
        ({}, {"eval": ["rows.jsonl"], "train": ["eval.jsonl"]}, "the parent held out other rows"),
        ({}, {"eval": []}, "nothing is held out"),
        ({"evaluation": lambda parts: parts[0]["results"].pop(AFTER)}, {}, "has no held-out loss"),
        ({"dataset": lambda part: part.pop("held_out_ids_sha256")}, {}, "no hash of its held-out tokens"),
        ({"dataset": lambda part: part.update(held_out_ids_sha256="0" * 64)}, {}, "another tokenizer or template"),
        ({"dataset": lambda part: part.update(held_out_labels_sha256="0" * 64)}, {}, "another objective"),
        ({"training": lambda part: part.update(precision="bf16")}, {}, "precision is bf16, and here it is fp32"),
        ({"training": lambda part: part.update(quantization="nf4")}, {}, "quantization is nf4, and here it is none"),
        ({}, {}, ""),
    ],
)
def test_losses_that_are_not_of_the_same_rows_are_not_compared(
    line: Line, change: dict[str, Callable[[Any], None]], data: dict[str, Any], reason: str
) -> None:
    redeclared(line, **change)
    found = parent_loss(prepare(line.recipe("out", data=data)))
    assert (found.value is None, reason in found.not_compared) == (bool(reason), True)
    assert bool(found.not_compared) == bool(reason)


def test_the_header_names_the_adapter(line: Line) -> None:
    shown = header(prepare(line.recipe("out")), line.folder / "out.work")
    assert shown["goes on from"] == "a"
    assert "goes on from" not in header(prepare(line.recipe("out", None)), line.folder / "out.work")


def test_killed_and_resumed_is_the_run_that_never_stopped(line: Line) -> None:
    whole = train(line.recipe("whole"))
    recipe, stop = line.recipe("out"), StopRequest()
    stop.signal = 15
    with pytest.raises(StoppedError):
        train(recipe, stop=stop)
    resumed = train(recipe, resume=True)
    assert resumed.manifest["training"]["resumed_from_step"] == 1
    for name in (ADAPTER_TENSORS, "training_log.jsonl"):
        assert (whole.output / name).read_bytes() == (resumed.output / name).read_bytes()
    assert resumed.manifest["lora"] == whole.manifest["lora"]


def test_a_start_that_changed_after_the_kill_is_refused(line: Line) -> None:
    folder, stop = line.copy(), StopRequest()
    recipe, stop.signal = line.recipe("out", "copy"), 15
    with pytest.raises(StoppedError):
        train(recipe, stop=stop)
    change_tensors(folder, lambda tensors: tensors[B].mul_(2))
    with pytest.raises(InputError, match=r"another start\.tensors_sha256"):
        train(recipe, resume=True)


def test_a_file_that_changed_after_its_check_is_refused(line: Line) -> None:
    folder = line.copy()
    start = plan_run(line.recipe("out", "copy")).start
    assert start is not None
    change_tensors(folder, lambda tensors: tensors[B].mul_(2))
    with pytest.raises(InputError, match="as when it was checked"):
        load_start(None, replace(start, folder=AdapterFolder(folder)))


def test_a_layer_that_did_not_move_is_refused_also_by_its_lora_a(trained: tuple[Line, RunResult, RunResult]) -> None:
    _, a, b = trained
    check_adapter(b.adapter)
    for name in (A, B):
        still = Adapter({**b.adapter.tensors, name: b.adapter.initial[name]}, b.adapter.initial, *_rest(b))
        with pytest.raises(TrainingError, match=f"{name} did not move"):
            check_adapter(still)
    # a new lora_A has no gradient before lora_B has moved
    check_adapter(Adapter({**a.adapter.tensors, A: a.adapter.initial[A]}, a.adapter.initial, *_rest(a)))


def _rest(run: RunResult) -> tuple[Any, Any]:
    return run.adapter.layers, run.adapter.config


def test_verify_and_rerun_follow_the_start(line: Line) -> None:
    run = train(line.recipe("out", training={"steps": 1}))
    names = ["manifest_sha256", "tensors_sha256", "config_sha256", "dataset", "dataset_sha256", "steps", "parents"]
    beside = AdapterFolder(line.folder / "a").require_manifest().data["files"].keys()
    names += [f"files.{name}" for name in beside - {ADAPTER_TENSORS, "adapter_config.json"}]
    assert of_start(run) == {f"lora.start.{name}": "match" for name in names}
    assert rerun(run.output).fact.found == "equal bit for bit"
    change_tensors(line.folder / "a", lambda tensors: tensors[B].mul_(2))
    wrong = [field for field in verify(run.output) if field.state == "mismatch"]
    assert [(field.name, str(field.place)) for field in wrong] == [
        ("lora.start.tensors_sha256", str(line.folder / "a" / ADAPTER_TENSORS))
    ]
    with pytest.raises(InputError, match="went on from have SHA-256"):
        rerun(run.output)
    shutil.rmtree(line.folder / "a")
    gone = [field for field in verify(run.output) if field.name.startswith("lora.start") and not field.again]
    assert {(field.state, "is gone" in str(field.found)) for field in gone} == {("not available", True)}
    with pytest.raises(MistralLoraError, match="is gone"):
        rerun(run.output)


def test_a_merge_adds_the_adapter_once(trained: tuple[Line, RunResult, RunResult], tmp_path: Path) -> None:
    line, _, b = trained
    merged = merge(b.output, tmp_path / "merged", line.base)
    name = B.removeprefix("base_model.model.").replace(".lora_B", "")
    base, got = (load_file(folder / "model.safetensors")[name] for folder in (line.base, merged.output))
    low, high = (b.adapter.tensors[B.replace("lora_B", side)] for side in ("lora_A", "lora_B"))
    assert torch.allclose(got.double(), base.double() + 2 * high.double() @ low.double(), atol=1e-6)
    assert merged.manifest["lora"]["start"] == b.manifest["lora"]["start"]


def test_a_recipe_that_goes_on_from_an_adapter_is_checked_each_time(line: Line) -> None:
    """Its base is looked for in many places, and none of them may have changed."""
    file = line.folder / "recipe.yaml"
    for start in (None, "a"):
        written = recipe_data(line.base, lora={"start": start} if start else {})
        file.write_text(json.dumps({**written, "output": "new"}))
        with nullcontext() if start is None else pytest.raises(LookupError):
            assert file in [*_paths("recipe", RecipeTarget("recipe", file))]
