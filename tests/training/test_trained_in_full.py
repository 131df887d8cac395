"""DoRA, and modules that are trained and saved in full."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from class_models import Case
from safetensors.torch import load_file, save_file
from sampling import sampled
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.errors import RecipeError, TrainingError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import (
    adapted_layers,
    adapter_tensors,
    attach_adapter,
    base_tensors,
    expected_names,
    saved_modules,
)
from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke
from pytest_mistral_lora.training.recipe import Lora, parse_recipe
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.save import Adapter, check_adapter
from pytest_mistral_lora.training.step.forward import attend_in_segments
from pytest_mistral_lora.training.step.trainer import collate, step_rows, supervised_losses

HEAD = "base_model.model.lm_head.weight"
MAGNITUDE = "base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector"
WAYS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"dora": True, "modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj", "up_proj"]},
}


def test_the_tensors_have_the_names_that_are_expected(base: Path) -> None:
    lora = Lora(r=4, dora=True, modules_to_save=("embed_tokens", "lm_head", "input_layernorm"))
    layers, saved = (
        adapted_layers(BaseFolder(base), ("attention",)),
        saved_modules(BaseFolder(base), lora.modules_to_save),
    )
    model = attach_adapter(load_base(BaseFolder(base), "bf16", "cpu"), lora, layers, seed=0)
    assert saved == ["model.embed_tokens", *(f"model.layers.{n}.input_layernorm" for n in range(2)), "lm_head"]
    assert adapter_tensors(model).keys() == expected_names(layers, dora=True, saved=saved)
    assert len(expected_names(layers, dora=True, saved=saved)) == 8 * 3 + 4
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lm_heads"], "'lm_heads' matches nothing"),
        (["head"], "'head' matches nothing"),
        (["embed_tokens", "layers"], "'layers' matches nothing"),
        (["self_attn"], "'self_attn' matches nothing"),
        (["norm"], r"'norm' matches model.layers.0.input_layernorm as well"),
    ],
)
def test_a_module_that_is_not_there_is_an_error_before_weights_are_loaded(
    base: Path, tmp_path: Path, names: list[str], said: str
) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(RecipeError, match=said) as caught:
        saved_modules(BaseFolder(tmp_path), names)
    assert str(caught.value.place) == "lora.modules_to_save"


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        (Case("mixtral"), "gate", r"model\.layers\.0\..*\.gate' is of a router or its experts"),
        (Case("mistral4"), "down_proj", r"model\.layers\.0\.mlp\.shared_experts\.down_proj' "),
        (Case("mistral", wrapped=True), "linear_1", r"multi_modal_projector\.linear_1 is outside the text model"),
        (Case("mistral", wrapped=True), "patch_conv", r"vision_tower\.patch_conv is outside the text model"),
    ],
    ids=lambda value: str(value) if isinstance(value, Case | str) else None,
)
def test_routers_experts_and_vision_are_not_trained_in_full(kind: Case, name: str, found: str, tmp_path: Path) -> None:
    kind.config().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=found) as caught:
        saved_modules(BaseFolder(tmp_path), [name])
    assert str(caught.value.place) == "lora.modules_to_save"
    # the head and the norms of the same model are
    assert saved_modules(BaseFolder(tmp_path), ["lm_head", "input_layernorm"])[-1] == "lm_head"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_embeddings_that_the_base_keeps_as_one_with_its_head_are_refused(base: Path, tmp_path: Path, name: str) -> None:
    config = read_json(base / "config.json")
    write_json(tmp_path / "config.json", {**config, "tie_word_embeddings": True})
    with pytest.raises(RecipeError, match=f"'{name}' is one with"):
        saved_modules(BaseFolder(tmp_path), [name])
    assert saved_modules(BaseFolder(tmp_path), ["input_layernorm"])


def test_the_log_says_how_large_the_adapter_gets(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = Lora(r=4, modules_to_save=("lm_head",))
    with caplog.at_level(logging.WARNING):
        folder = BaseFolder(base)
        attach_adapter(load_base(folder, "fp32", "cpu"), lora, adapted_layers(folder, ("attention",)), seed=0)
    rows = read_json(base / "config.json")
    count = rows["vocab_size"] * rows["hidden_size"]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("lora.modules_to_save: lm_head ")
    assert f" {count * 4 / 1e6:.0f} MB ({count} numbers)" in warning
    caplog.clear()
    folder = BaseFolder(base)
    attach_adapter(load_base(folder, "fp32", "cpu"), Lora(), adapted_layers(folder, ("attention",)), seed=0)
    assert caplog.records == []


@pytest.mark.of_field
def test_in_a_bf16_base_the_head_is_trained_in_float32_and_used_in_bf16(make_recipe: MakeRecipe, base: Path) -> None:
    training = {"precision": "bf16", "steps": 2, "learning_rate": 1e-4}
    evaluation = {"generations": 2, "max_new_tokens": 2}
    result = train(
        make_recipe(
            lora={"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"], "dora": True},
            training=training,
            evaluation=evaluation,
        )
    )
    head = result.adapter.tensors[HEAD]
    assert head.dtype == torch.float32
    # a step of 1e-4 is lost in the rounding of a bf16 weight of 0.1
    assert not torch.equal(head, head.bfloat16().float())
    assert len(result.completions) == 2
    output = result.output
    del result, head  # smoke loads a second model of this size
    rows = list(read_rows(output.parent / "rows.jsonl"))
    again = smoke(model_spec(output, base, device="cpu"), rows, max_new_tokens=1)
    assert again["adapter_effect"] > 0
    assert {finding.rule for finding in adapter_findings(output, base)} == {"ML426"}


def test_a_dora_adapter_without_its_magnitudes_is_a_finding(make_recipe: MakeRecipe, base: Path) -> None:
    output = train(make_recipe(lora={"dora": True}, training={"steps": 3})).output
    file = output / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name != MAGNITUDE}, file)
    for where in (base, None):
        found = [finding for finding in adapter_findings(output, where) if finding.rule == "ML401"]
        assert [finding.found for finding in found] == [f"{MAGNITUDE} is missing"]
    save_file({**tensors, MAGNITUDE: torch.zeros_like(tensors[MAGNITUDE])}, file)
    found = [finding for finding in adapter_findings(output, base) if finding.rule == "ML403"]
    assert [finding.found for finding in found] == [f"{MAGNITUDE} is zero: this layer learned nothing"]


def test_a_head_of_another_vocabulary_is_a_finding(make_recipe: MakeRecipe, base: Path) -> None:
    output = train(make_recipe(lora={"modules_to_save": ["lm_head"]}, training={"steps": 3})).output
    file = output / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({**tensors, HEAD: tensors[HEAD][:-1].clone()}, file)
    assert "ML412" in {finding.rule for finding in adapter_findings(output, base)}
    save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, file)
    assert [f"{HEAD} is missing"] == [one.found for one in adapter_findings(output, base) if one.rule == "ML401"]


def test_the_step_gives_them_the_gradient_of_each_row_by_itself(make_recipe: MakeRecipe, base: Path) -> None:
    lora = Lora(r=4, dora=True, modules_to_save=("lm_head", "embed_tokens"))
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))
    encoded = load_data(make_recipe(), encoder).train.encoded
    found = []
    for plain in (True, False):
        folder = BaseFolder(base)
        model = attach_adapter(load_base(folder, "fp32", "cpu"), lora, adapted_layers(folder, ("attention",)), seed=0)
        if plain:
            for row in encoded:
                logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits
                labels = torch.tensor(row.labels)
                torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], reduction="sum").backward()
        else:
            attend_in_segments(model)
            supervised_losses(model, step_rows(collate(list(RowDataset(encoded)))))[0].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    alone, together = found
    assert sum("modules_to_save" in name for name in alone) == 2
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


# these tests are the last of the file: the run keeps 130 MB until then
@pytest.fixture(scope="module", params=sampled(WAYS, ("both",)))
def full_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl")
    data = recipe_data(base, lora=WAYS[request.param], training={"steps": 8, "learning_rate": 5e-3})
    return train(parse_recipe(data, folder=folder))


@pytest.mark.of_field
def test_such_an_adapter_is_sound_and_verifies(full_run: RunResult) -> None:
    dataset = full_run.output.parent
    facts = verify(full_run.output, base=full_run.base_folder, dataset=dataset)
    assert [fact for fact in facts if fact.state != "match"] == []
    assert {"lora.dora", "lora.modules_to_save"} <= {fact.name for fact in facts}
    # a note: vLLM refuses both
    assert {finding.rule for finding in adapter_findings(full_run.output, full_run.base_folder)} == {"ML426"}


def test_what_the_run_says_of_it_is_what_the_recipe_asked_for(full_run: RunResult) -> None:
    config = read_json(full_run.output / "adapter_config.json")
    lora = full_run.manifest["lora"]
    assert lora["dora"] == config["use_dora"]
    assert lora["modules_to_save"] == (config["modules_to_save"] or [])
    assert lora["layers"] == 2 * len(lora["target_modules"])
    assert lora["parameters"] == sum(tensor.numel() for tensor in full_run.adapter.tensors.values())
    text = (full_run.output / "DECISION.md").read_text()
    assert all(f"{name}" in text for name in lora["modules_to_save"])
    assert ("DoRA" in text) == lora["dora"]


def test_a_changed_record_of_it_does_not_verify(full_run: RunResult, tmp_path: Path) -> None:
    for file in full_run.output.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lora = full_run.manifest["lora"]
    changed = {**lora, "dora": not lora["dora"], "modules_to_save": ["norm"]}
    write_json(tmp_path / "manifest.json", {**full_run.manifest, "lora": changed})
    wrong = {fact.name for fact in verify(tmp_path) if fact.state == "mismatch"}
    assert {"lora.dora", "lora.modules_to_save"} <= wrong


def test_every_tensor_moves_and_the_base_does_not(full_run: RunResult) -> None:
    for name, tensor in full_run.adapter.tensors.items():
        assert not torch.equal(tensor, full_run.adapter.initial[name]), name
    on_disk, in_memory = load_file(full_run.base_folder / "model.safetensors"), base_tensors(full_run.model)
    assert on_disk.keys() == in_memory.keys()
    assert all(torch.equal(on_disk[name], in_memory[name]) for name in on_disk)


def test_loaded_afresh_it_has_the_logits_that_it_had_in_memory(full_run: RunResult) -> None:
    rows = list(read_rows(full_run.output.parent / "rows.jsonl"))
    result = smoke(model_spec(full_run.output, full_run.base_folder, device="cpu"), rows, max_new_tokens=1)
    assert result["probe"]["sha256"] == full_run.probe.sha256


def changed(run: RunResult, change: Any) -> Adapter:
    tensors = {name: tensor.clone() for name, tensor in run.adapter.tensors.items()}
    change(tensors)
    return Adapter(tensors, run.adapter.initial, run.adapter.layers, run.adapter.config, run.adapter.saved)


@pytest.mark.parametrize("kind", ["lora_magnitude_vector", "lm_head.weight", "embed_tokens.weight"])
def test_an_adapter_without_one_of_them_or_with_one_that_did_not_move_is_not_saved(
    full_run: RunResult, kind: str
) -> None:
    names = [name for name in full_run.adapter.tensors if name.endswith(kind)]
    if not names:
        with pytest.raises(TrainingError, match="is not a tensor of the adapter"):
            check_adapter(changed(full_run, lambda tensors: tensors.update({f"{HEAD[:-14]}{kind}": torch.ones(1)})))
        return
    with pytest.raises(TrainingError, match=f"{kind} is missing"):
        check_adapter(changed(full_run, lambda tensors: tensors.pop(names[0])))
    with pytest.raises(TrainingError, match=f"{kind} did not move"):
        check_adapter(changed(full_run, lambda tensors: tensors.update({names[0]: full_run.adapter.initial[names[0]]})))
