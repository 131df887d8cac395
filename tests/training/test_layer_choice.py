"""Layers by indices and patterns, and ranks and alphas of their own: those of PEFT, in each place that names them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from class_models import FUSED_EXPERTS, Case, gradients, row_by_row, step_rows
from forked import run_forked
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from sampling import sampled
from tiny_runs import recipe_data, write_rows
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import attach_adapter, lora_config, peft_quiet, without_weights
from pytest_mistral_lora.training.layers import layers_text, planned_layers, ranks_and_alphas
from pytest_mistral_lora.training.memory import recipe_memory
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.prepare import plan_run, prepare
from pytest_mistral_lora.training.progress import header, trainable_parameters
from pytest_mistral_lora.training.recipe import Lora, load_recipe, parse_recipe
from pytest_mistral_lora.training.rerun import rerun
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.step import StepRow
from pytest_mistral_lora.training.step.forward import attend_in_segments, supervised_losses
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.memory_need import checkpoint_activations

CHOICES: dict[str, dict[str, Any]] = {
    "the first layer": {"layers_to_transform": [0]},
    "the last layer": {"layers_to_transform": 1, "target_modules": ["v_proj", "up_proj"]},
    "a pattern": {"target_modules": r"model\.layers\.(0\.self_attn\.(k|v)_proj|1\.mlp\.\w+_proj)"},
    "ranks": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    "ranks of rsLoRA": {
        "rank_pattern": {r"0\.self_attn\.\w_proj": 12},
        "alpha_pattern": {"q_proj": 1.5},
        "rslora": True,
    },
    "ranks of some layers": {"layers_to_transform": [1], "rank_pattern": {"o_proj": 1}, "target_modules": "all-linear"},
}
"""Choices for a model of two decoder layers."""


def lora_of(**settings: Any) -> Lora:
    return Lora(**{"r": 4, "alpha": 8, **settings})


def of_peft(lora: Lora) -> LoraConfig:
    """Return a choice as PEFT's own keys have it."""
    names = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "all-linear": "all-linear"}
    targets: Any = lora.target_pattern or names.get(lora.target_modules[0], lora.target_modules)
    if targets == "all-linear":
        targets = [*names["attention"], "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=None if lora.layers_to_transform is None else list(lora.layers_to_transform),
        rank_pattern=lora.rank_pattern or {},
        alpha_pattern=lora.alpha_pattern or {},
    )


def shapes(model: Any) -> dict[str, tuple[int, float, float]]:
    """Return rank, alpha and scale of each adapted layer, as PEFT has made it."""
    return {
        name.removeprefix("base_model.model."): tuple(
            getattr(module, key)["default"] for key in ("r", "lora_alpha", "scaling")
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("choice", CHOICES)
def test_the_layers_are_those_that_peft_adapts(choice: str, base: Path) -> None:
    folder, lora = BaseFolder(base), lora_of(**CHOICES[choice])
    expected = shapes(without_weights(folder, of_peft(lora)))
    layers = planned_layers(folder, lora)
    assert set(layers) == expected.keys()
    assert {name: shape[:2] for name, shape in expected.items()} == ranks_and_alphas(lora, layers)
    with peft_quiet():
        ours = attach_adapter(folder.empty_model().to_empty(device="cpu"), lora, layers, seed=0)
    assert shapes(ours) == expected


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({"layers_to_transform": [1, 2]}, "layers_to_transform", ["2: the base has 2 decoder layers", "from 0 to 1"]),
        ({"target_modules": r"layers\.0\..*"}, "target_modules", [r"'layers\\.0\\..*' matches nothing", "q_proj"]),
        ({"target_modules": r".*(q_proj|lm_head)"}, "target_modules", ["matches lm_head as well"]),
        ({"target_modules": r".*layers\.1\..*"}, "target_modules", ["input_layernorm as well, and 1 more"]),
        ({"target_modules": r"(\w+\.?)+#"}, "target_modules", ["regular expression that"]),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern", ["'q_prj' matches nothing (did you mean 'q_proj'?)"]),
        ({"alpha_pattern": {"up_proj": 2}}, "alpha_pattern", ["up_proj, which has no adapter", "attention"]),
        (
            {"rank_pattern": {r"layers\.0\..*": 2}, "layers_to_transform": [1]},
            "rank_pattern",
            ["model.layers.0.self_attn.q_proj, which layers_to_transform [1] leaves out"],
        ),
        ({"rank_pattern": {".*": 2, "q_proj": 3}}, "rank_pattern", ["'q_proj' is never used: '.*', before it"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_choice_that_is_not_one_of_the_base_is_named(
    settings: dict[str, Any], place: str, words: list[str], base: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        planned_layers(BaseFolder(base), lora_of(**settings))
    assert str(caught.value.place) == f"lora.{place}"
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_group_that_the_class_lacks_is_refused(tmp_path: Path) -> None:
    Case("mixtral").config().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="experts") as caught:
        planned_layers(BaseFolder(tmp_path), lora_of(target_modules="attention+mlp"))
    assert str(caught.value.place) == "lora.target_modules"
    assert "attention: q_proj" in caught.value.expected


def test_a_layer_of_a_group_is_not_trained_in_full_as_well(base: Path, tmp_path: Path) -> None:
    lora = {**NO_PATTERNS, "target_modules": "attention", "modules_to_save": ["q_proj"]}
    recipe = load_recipe(write_recipe(tmp_path, base, lora=lora))
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.self_attn\.q_proj is in target_modules and in"):
        plan_run(recipe)


@pytest.mark.skipif(not FUSED_EXPERTS, reason="each expert has linear layers of its own, which an adapter trains")
def test_a_pattern_of_experts_is_refused(tmp_path: Path) -> None:
    Case("mixtral").config().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is of a router or its experts in MixtralForCausalLM") as caught:
        planned_layers(BaseFolder(tmp_path), lora_of(target_modules=r"model\.layers\.0\.(self_attn|mlp)\..*"))
    assert str(caught.value.place) == "lora.target_modules"


@pytest.mark.parametrize(
    ("patterns", "ranks", "is_kept"),
    [
        ({r"0\.self_attn\..*": 2, "v_proj": 3}, [2, 3], True),
        ({"v_proj": 3, r"0\.self_attn\..*": 2}, [3, 3], False),
        ({r"0\.self_attn\.(q|k)_proj": 2, "v_proj": 3}, [3, 3], True),
        ({r"0\.self_attn\..*": 3, "v_proj": 3}, [3, 3], True),
    ],
)
def test_the_first_pattern_counts_also_after_peft_has_sorted_them(
    patterns: dict[str, int], ranks: list[int], is_kept: bool, base: Path, tmp_path: Path
) -> None:
    folder, lora = BaseFolder(base), lora_of(rank_pattern=patterns)
    layers = planned_layers(folder, lora)
    assert [ranks_and_alphas(lora, layers)[f"model.layers.{index}.self_attn.v_proj"][0] for index in (0, 1)] == ranks
    expected = shapes(without_weights(folder, of_peft(lora)))
    config = lora_config(lora, layers)
    assert (config.rank_pattern == patterns) is is_kept
    config.save_pretrained(tmp_path)
    assert shapes(without_weights(folder, LoraConfig.from_pretrained(tmp_path))) == expected


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("layers_to_transform: [-1]", "lora.layers_to_transform.0: -1:"),
        ("layers_to_transform: []", "lora.layers_to_transform: []:"),
        ("layers_to_transform: all", "lora.layers_to_transform: 'all':"),
        ("layers_to_transform: [1, 1]", "a layer appears twice"),
        ("rank_pattern: {q_proj: 0}", "lora.rank_pattern.q_proj: 0:"),
        ("rank_pattern: {q_proj: 1.5}", "lora.rank_pattern.q_proj: 1.5:"),
        ("alpha_pattern: {q_proj: 0}", "lora.alpha_pattern.q_proj: 0:"),
        ("rank_pattern: {'q_proj(': 2}", "'q_proj(' is not a regular expression"),
        ("rank_pattern: {'': 2}", "an empty pattern; expected the end of a module's name"),
        ("target_modules: 'q_proj('", "'q_proj(' is not a regular expression"),
        ("target_modules: ['.*q_proj', v_proj]", "'.*q_proj' is no name"),
        ("{target_modules: '.*q_proj', layers_to_transform: [0]}", "layers_to_transform [0] beside the pattern"),
    ],
)
def test_a_value_that_no_base_can_have_is_named_with_its_line(written: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    base = "base: {path: base, weights_sha256: '" + "0" * 64 + "'}\n"
    lora = written if written.startswith("{") else f"{{{written}}}"
    file.write_text(f"{base}data: {{train: [rows.jsonl]}}\ntraining: {{steps: 1}}\noutput: out\nlora:\n  {lora}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert f"{file}:6" in str(caught.value) or written.startswith("{"), str(caught.value)
    assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("the first layer", "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "),
        (
            "ranks",
            "rank 4, alpha 8: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
            "model.layers.0.self_attn.o_proj; rank 2, alpha 8: model.layers.0.self_attn.v_proj; rank 4, alpha 3: ",
        ),
    ],
)
def test_the_layers_are_shown_with_their_ranks(choice: str, text: str, base: Path) -> None:
    folder, lora = BaseFolder(base), lora_of(**CHOICES[choice])
    assert layers_text(folder, lora, planned_layers(folder, lora)).startswith(text)


def test_many_layers_are_shown_as_ranges(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))
    folder, lora = BaseFolder(tmp_path), lora_of(layers_to_transform=[9, 0, 1, 2, 5], target_modules="q_proj")
    layers = planned_layers(folder, lora)
    assert layers_text(folder, lora, layers) == "model.layers.{0-2,5,9}.self_attn.q_proj"


EXACT, CHOSEN_CASES = (
    1e-12,
    [
        Case("mistral"),
        Case("ministral"),
        Case("ministral3", with_mlp=True),
        Case("mixtral"),
        Case("mistral4"),
        Case("llama", with_mlp=True),
        Case("qwen2", tied=True),
        Case("qwen3", with_mlp=True),
        Case("mistral", wrapped=True),
        Case("ministral3", wrapped=True, tied=True, with_mlp=True),
    ],
)
OF_CLASSES: dict[str, dict[str, Any]] = {
    "every layer": {},
    "first": {"layers_to_transform": [0]},
    "last": {"layers_to_transform": [1]},
    "ranks": {"rank_pattern": {"o_proj": 2, r"layers\.1\..*": 7}, "alpha_pattern": {r"layers\.0\..*": 3}},
    "last with ranks": {"layers_to_transform": [1], "rank_pattern": {"o_proj": 2}, "rslora": True},
}
"""Choices that each class has: every one has an `o_proj`."""


def both_models(case: Case, choice: str, folder: Path) -> tuple[Any, Any]:
    """Return a model by PEFT's own keys, and one by the recipe's, with equal weights in float64."""
    lora, architecture = lora_of(**OF_CLASSES[choice]), case.architecture
    targets = architecture.targets(["attention+mlp" if case.with_mlp else "attention"])
    case.config().save_pretrained(folder)
    models = []
    for of_recipe in (False, True):
        torch.manual_seed(0)
        model = architecture.model_class()(case.config())
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch has no grouped product in float64
        if of_recipe:
            given = lora.model_copy(update={"target_modules": tuple(targets)})
            layers = planned_layers(BaseFolder(folder), given)
            models.append(attach_adapter(model, given, layers, seed=0))
            continue
        config = of_peft(lora)
        config.target_modules = set(targets)
        if case.wrapped:  # the vision tower has layers of the same names
            places = f"{architecture.layers}\\.({'|'.join(map(str, lora.layers_to_transform or (0, 1)))})"
            config.layers_to_transform, config.target_modules = None, rf"{places}\..*\.({'|'.join(targets)})"
        with peft_quiet():
            models.append(get_peft_model(model, config))
    generator = torch.Generator().manual_seed(3)
    values = {
        name: 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in models[0].named_parameters()
        if ".lora_" in name or name.endswith(".bias")
    }
    for model in models:
        found = model.load_state_dict(values, strict=False)
        assert found.unexpected_keys == []
        model.double().eval()
    return models[0], models[1]


def ready(model: Any) -> Any:
    attend_in_segments(model)
    use_frozen_layers(model)
    return model


def apart(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert found.keys() == right.keys()
    return max(float((found[name].double() - one).norm() / one.norm()) for name, one in right.items())


each = pytest.mark.parametrize("case", sampled(CHOSEN_CASES, {"mistral4", "wrapped-ministral3-tied"}))


@each
@pytest.mark.parametrize("choice", OF_CLASSES)
@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_step_is_that_of_peft_in_float64(case: Case, choice: str, share_prefix: bool, tmp_path: Path) -> None:
    reference, model = both_models(case, choice, tmp_path)
    rows = step_rows()
    truth = row_by_row(reference, rows)
    loss = supervised_losses(ready(model), rows, share_prefix=share_prefix)[0].mean()
    # the gradients of rows are added before a norm, which transformers computes in float32 in any model
    most = 1e-6 if share_prefix else EXACT
    assert abs(loss.item() - truth.item()) < most * truth.item()
    assert apart(gradients(loss, model), gradients(truth, reference)) < most


@pytest.mark.parametrize("choice", ["first", "last", "ranks"])
def test_a_checkpointed_step_is_that_of_peft_in_float64(choice: str, tmp_path: Path) -> None:
    reference, model = both_models(Case("mistral", with_mlp=True), choice, tmp_path)
    checkpoint_activations(ready(model))
    rows = step_rows()
    truth, loss = row_by_row(reference, rows), supervised_losses(model.train(), rows)[0].mean()
    assert apart(gradients(loss, model), gradients(truth, reference)) < EXACT


@each
# without rounding, each choice is compared above
@pytest.mark.parametrize("choice", sampled(OF_CLASSES, {"every layer", "last with ranks"}))
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_is_as_near_to_float64_as_that_of_peft(case: Case, choice: str, precision: str, tmp_path: Path) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    rows, models = step_rows(), both_models(case, choice, tmp_path)
    for model in models:
        for name, parameter in model.named_parameters():
            # as in a run: the base in its precision, and the adapter in float32
            parameter.data = parameter.data.to(torch.float32 if ".lora_" in name else dtype)
    exact = both_models(case, choice, tmp_path)[0]
    # the same numbers: those of the base are rounded
    exact.load_state_dict({name: one.double() for name, one in models[0].state_dict().items()})
    truth = row_by_row(exact, rows)
    right = gradients(truth, exact)
    far = []
    with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
        for loss, model in (
            (row_by_row(models[0], rows), models[0]),
            (supervised_losses(ready(models[1]), rows)[0].mean(), models[1]),
        ):
            far.append((abs(loss.item() - truth.item()) / truth.item(), apart(gradients(loss, model), right)))
    (loss_of_peft, of_peft_), (loss_of_ours, of_ours) = far
    # in bf16, a token of a mixture may go to another expert: the distance is then one of chance
    assert of_ours <= {"fp32": 1.5, "bf16": 2.0}[precision] * of_peft_
    assert precision == "bf16" or of_ours < 1e-4
    assert loss_of_ours <= max(2 * loss_of_peft, {"fp32": 1e-5, "bf16": 1e-2}[precision])


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with a run `out` whose layers differ in rank and alpha, and its recipe."""
    folder = tmp_path_factory.mktemp("chosen")
    write_recipe(folder, base)
    train(load_recipe(folder / "recipe.yaml"))
    return folder


# the patterns overlap, and sorted they would give v_proj another rank
CHOSEN = {
    "layers_to_transform": [1],
    "target_modules": "attention+mlp",
    "rank_pattern": {"v_proj": 2, r"self_attn\..*": 12},
    "alpha_pattern": {"down_proj": 3},
}
NO_PATTERNS = {"rank_pattern": None, "alpha_pattern": None}
RANKS = {"q_proj": 12, "k_proj": 12, "v_proj": 2, "o_proj": 12, "gate_proj": 8, "up_proj": 8, "down_proj": 8}


def write_recipe(folder: Path, base: Path, output: str = "out", **sections: Any) -> Path:
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "eval.jsonl", [[("user", "Name a fruit."), ("assistant", "A pear is one.")]])
    training = {"steps": 3, "logging_steps": 1, "checkpoint_steps": 1, "learning_rate": 0.003}
    lora = {**CHOSEN, **sections.pop("lora", {})}
    training |= sections.pop("training", {})
    data = recipe_data(base, training=training, lora=lora, data={"eval": ["eval.jsonl"]}, **sections)
    file = folder / ("recipe.yaml" if output == "out" else f"{output}.yaml")
    file.write_text(json.dumps({**data, "output": output}))
    return file


def test_the_folder_of_a_run_has_the_ranks_of_its_layers(chosen: Path, base: Path) -> None:
    output = chosen / "out"
    tensors, prefix = load_file(output / ADAPTER_TENSORS), "base_model.model.model.layers.1."
    blocks = {kind: "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn" for kind in RANKS}
    names = {kind: f"{prefix}{block}.{kind}.lora_A.weight" for kind, block in blocks.items()}
    assert {kind: len(tensors[name]) for kind, name in names.items()} == RANKS
    assert len(tensors) == 2 * len(RANKS)
    manifest = json.loads((output / "manifest.json").read_text())
    lora = manifest["lora"]
    assert lora["layers_to_transform"] == [1]
    assert manifest["recipe"]["lora"]["rank_pattern"] == CHOSEN["rank_pattern"]
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == (lora["rank_pattern"], lora["alpha_pattern"])
    assert lora["alpha_pattern"] == {"down_proj": 3}
    assert sorted(config["target_modules"]) == sorted(lora["modules"]) == lora["target_modules"]
    note = (output / "DECISION.md").read_text()
    assert "7: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, of the decoder layers 1" in note
    assert "alpha 3 in `down_proj`" in note
    assert [str(one) for one in adapter_findings(output, base) if one.severity == "error"] == []


def test_plain_peft_loads_the_adapter_as_it_was_trained(chosen: Path, base: Path) -> None:
    folder = BaseFolder(base)
    lora = load_recipe(chosen / "recipe.yaml").lora
    with peft_quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), chosen / "out")
    expected = ranks_and_alphas(lora, planned_layers(folder, lora))
    assert {name: shape[:2] for name, shape in shapes(model).items()} == expected


@pytest.mark.usefixtures("data_alone")
def test_a_check_names_the_rank_of_each_layer(
    chosen: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(tmp_path, base)
    assert main(["check", str(file), "-v"]) == 0
    said = capsys.readouterr().out
    assert "7 of MistralForCausalLM: rank 12, alpha 16: model.layers.1.self_attn.q_proj, " in said
    assert "rank 2, alpha 16: model.layers.1.self_attn.v_proj" in said
    assert "rank 8, alpha 3: model.layers.1.mlp.down_proj" in said
    prepared = prepare(load_recipe(file))
    count = sum(one.numel() for one in load_file(chosen / "out" / ADAPTER_TENSORS).values())
    assert trainable_parameters(prepared)[0] == count
    assert "(rank 2 to 12)" in header(prepared, tmp_path)["trainable parameters"]


def test_the_estimate_has_the_ranks_of_the_layers(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, base))
    # 16 bytes a value: the value, its gradient, and the two moments
    count, _ = trainable_parameters(prepare(recipe))
    assert recipe_memory(recipe, BaseFolder(base)).need.adapter == 16 * count


def test_a_run_is_verified_and_one_of_other_patterns_differs(chosen: Path, base: Path) -> None:
    fields = {field.name: field.state for field in verify(chosen / "out", base=base)}
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "target_modules", "modules"):
        assert fields[f"lora.{key}"] == "match", key
    train(load_recipe(write_recipe(chosen, base, "other", lora={"rank_pattern": {"v_proj": 2}})))
    changed = {field.path for field in compare_runs(chosen / "out", chosen / "other").facts}
    assert any(path.startswith("$.lora.rank_pattern") for path in changed), changed


def test_a_run_is_trained_again_from_its_manifest(chosen: Path) -> None:
    assert rerun(chosen / "out").fact.found == "equal bit for bit"


def test_a_written_recipe_has_the_same_choice(base: Path, tmp_path: Path) -> None:
    for lora in (CHOSEN, {"target_modules": r".*\.1\..*_proj", "layers_to_transform": None}):
        recipe = load_recipe(write_recipe(tmp_path, base, lora=lora))
        again = parse_recipe(json.loads(json.dumps(recipe.as_written())), folder=tmp_path)
        assert again == recipe
        folder = BaseFolder(base)
        shapes_of = [ranks_and_alphas(one.lora, planned_layers(folder, one.lora)) for one in (recipe, again)]
        assert shapes_of[0] == shapes_of[1]


def test_a_rank_that_was_changed_afterwards_is_a_mismatch(chosen: Path, base: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(chosen / "out", tmp_path / "out"))
    config = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"down_proj": 5}}))
    found = {field.name: field.state for field in verify(output, base=base)}
    assert found["lora.alpha_pattern"] == "mismatch"


def test_a_merge_scales_each_layer_as_it_was_trained(chosen: Path, base: Path, tmp_path: Path) -> None:
    proven = merge(chosen / "out", tmp_path / "merged", base).manifest["parent"]
    assert proven["greedy_equal"]
    assert proven["max_abs_logit_difference"] < 1e-3
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if before[name].ne(after[name]).any()}
    lora = json.loads((chosen / "out/manifest.json").read_text())["lora"]
    assert changed == {f"{layer}.weight" for layer in lora["modules"]}
    tensors = load_file(chosen / "out" / ADAPTER_TENSORS)
    for kind, block, alpha in (("v_proj", "self_attn", 16), ("down_proj", "mlp", 3), ("q_proj", "self_attn", 16)):
        name = f"model.layers.1.{block}.{kind}"
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        expected = before[f"{name}.weight"].double() + alpha / RANKS[kind] * b @ a
        torch.testing.assert_close(after[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_a_run_goes_on_from_an_adapter_with_the_same_choice_alone(chosen: Path, base: Path) -> None:
    run = train(load_recipe(write_recipe(chosen, base, "next", lora={"start": "out"})))
    start = run.manifest["lora"]["start"]
    assert start["held_out_loss"] == start["parent_held_out_loss"]
    for lora, words in (
        (
            {"rank_pattern": None},
            ["r is 12 in model.layers.1", "by rank_pattern", "and lora.rank_pattern, which has 4 entries in"],
        ),
        ({"alpha_pattern": None}, ['Set lora.alpha: 16 and lora.alpha_pattern: {"down_proj": 3}']),
        ({"layers_to_transform": None}, ["does not adapt model.layers.0", "and lora.layers_to_transform: [1]."]),
        (
            {"layers_to_transform": None, "target_modules": r".*layers\.1.*q_proj", **NO_PATTERNS},
            ["it adapts model.layers.1.mlp.down_proj"],
        ),
    ):
        file = write_recipe(chosen, base, "refused", lora={"start": "out", **lora})
        with pytest.raises(RecipeError) as caught:
            prepare(load_recipe(file))
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        # not the same names in each layer
        (
            r".*(0\.self_attn\.q_proj|1\.mlp\.up_proj)",
            r"Set lora.target_modules: 'model\.layers\.0\.self_attn\.q_proj|",
        ),
        (".*(embed_tokens|1.self_attn.q_proj)", "Start from an adapter of the text's decoder layers alone."),
    ],
)
def test_the_keys_of_an_adapter_of_another_trainer_are_named(
    targets: str, words: str, base: Path, tmp_path: Path
) -> None:
    with peft_quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, target_modules=targets))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    lora = {**NO_PATTERNS, "layers_to_transform": None, "start": "theirs"}
    recipe = load_recipe(write_recipe(tmp_path, base, lora=lora))
    with pytest.raises(RecipeError) as caught:
        plan_run(recipe)
    assert words in str(caught.value), str(caught.value)


def test_the_same_patterns_in_another_order_are_another_run(base: Path, tmp_path: Path) -> None:
    found = []
    patterns = {"v_proj": 2, r"1\.self_attn\.(q|v)_proj": 12}
    for given in (patterns, dict(reversed(patterns.items()))):
        lora = {"rank_pattern": given, "layers_to_transform": None}
        prepared = prepare(load_recipe(write_recipe(tmp_path, base, lora=lora)))
        found.append(prepared.identity)
    assert found[0]["recipe"] == found[1]["recipe"]
    assert found[0] != found[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_of_a_run_is_that_of_peft_in_float64(precision: str, base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, base, training={"steps": 1, "precision": precision}))
    run = train(recipe)
    [first] = [line for line in run.log if "loss" in line]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).double()
    with peft_quiet():
        model = get_peft_model(model, of_peft(recipe.lora.model_copy(update={"target_modules": tuple(RANKS)})))
        set_peft_model_state_dict(model, {name: one.double() for name, one in run.adapter.initial.items()})
    rows = [
        StepRow(index, torch.tensor(row.input_ids), torch.tensor(row.labels))
        for index, row in enumerate(run.data.train.encoded)
    ]
    loss = row_by_row(model.double().eval(), rows)
    norm = torch.stack([one.norm() for one in gradients(loss, model).values()]).norm().item()
    most = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert first["loss"] == pytest.approx(loss.item(), rel=most)
    assert first["grad_norm"] == pytest.approx(norm, rel=most)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(base: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, base)
    script = Path(__file__).with_name("dying_runs.py")
    whole = run_forked([sys.executable, script, file, "0"])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    half = str(int(whole.stdout) // 2)
    killed = run_forked([sys.executable, script, file, half])
    assert killed.returncode == 0, killed.stdout + killed.stderr
    done = tmp_path / f"done-{half}"
    assert 0 < json.loads((done / "manifest.json").read_text())["training"]["resumed_from_step"] < 3
    for name in (ADAPTER_TENSORS, "adapter_config.json", "training_log.jsonl"):
        assert (tmp_path / "done-0" / name).read_bytes() == (done / name).read_bytes(), name


@pytest.mark.parametrize(
    ("server", "words"),
    [("llamacpp", "alpha_pattern gives layers a scale of their own"), ("vllm", "")],
)
def test_a_server_that_does_not_read_patterns_is_said(
    server: str, words: str, chosen: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["export", str(chosen / "out"), "--to", server, "--base", str(base), "--output", str(tmp_path / "x")])
    assert code == (2 if words else 0)
    assert words in capsys.readouterr().err
    found = [str(one) for one in adapter_findings(chosen / "out", base) if one.rule == "ML426"]
    assert len(found) == 1
    assert "rank_pattern and alpha_pattern" in found[0] or "alpha_pattern" in found[0]


TO_TRL = pytest.param(["export", "--to", "trl", "--output", "run"], marks=pytest.mark.of_field, id="export")


@pytest.mark.usefixtures("data_alone")
@pytest.mark.parametrize("words", [pytest.param(["check"], id="check"), pytest.param(["train"], id="train"), TO_TRL])
def test_an_index_beyond_the_base_is_named_with_file_and_line(
    words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = json.loads(write_recipe(tmp_path, base).read_text())
    file = tmp_path / "indented.yaml"
    file.write_text(json.dumps({**data, "lora": {"r": 4, "layers_to_transform": [1, 7]}}, indent=1))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if "layers_to" in text)
    assert main([*words, str(file)]) == (1 if words == ["check"] else 2)
    said = "".join(capsys.readouterr())
    assert f"{file.name}:{line}, lora.layers_to_transform" in said
    assert "7: the base has 2 decoder layers" in said
    assert "indices from 0 to 1" in said
