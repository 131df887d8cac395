from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from of_classes import architecture, tiny_base
from safetensors.torch import load_file

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.tiny_model import TinyKind, write_tiny_base
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train import tiny_run as module
from pytest_mistral_lora.conformance.train.checks import checks
from pytest_mistral_lora.conformance.train.harness import TrainerHarness, TrainingLaw, record_decoder_calls
from pytest_mistral_lora.conformance.train.step_laws import (
    judge_difference,
    merge_by_hand,
    reference_step,
    step_difference,
)
from pytest_mistral_lora.conformance.train.tiny_run import LAWS, attempt, take_figures, tiny_run
from pytest_mistral_lora.errors import MistralLoraError, TrainingError
from pytest_mistral_lora.records.goldens import goldens_folder

pytestmark = pytest.mark.mistral_training


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerHarness]:
    """A base with rows, and nothing trained yet."""
    folder = tmp_path_factory.mktemp("harness")
    write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
    rows = (goldens_folder() / "training" / "conversations.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows)
    (folder / "scratch").mkdir()
    with module.quiet_single_thread():
        yield TrainerHarness(folder, folder / "scratch", "cpu")


@pytest.mark.parametrize("is_frozen", [True, False])
def test_objects_that_the_process_keeps_from_the_collector_stay_kept(is_frozen: bool) -> None:
    gc.freeze()
    try:
        if not is_frozen:
            gc.unfreeze()
        with module.quiet_single_thread():
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) is is_frozen
    finally:
        gc.freeze()


def test_every_law_is_a_rule_or_a_name_within_one() -> None:
    assert {law.rule for law in LAWS} <= RULES.keys()
    assert all(law.name == law.rule or RULES.has_name(law.name) for law in LAWS)
    assert len({law.name for law in LAWS}) == len(LAWS)
    measures = {law.measure for law in LAWS}
    assert len({measure.__name__ for measure in measures}) == len(measures)


def test_the_reference_is_the_mean_of_transformers_own_losses(harness: TrainerHarness) -> None:
    model, rows = load_base(BaseFolder(harness.base), "fp32", "cpu"), harness.encoded
    zero = {name: torch.zeros(8, 128) for name in ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)}
    zero |= {name.replace("_A", "_B"): torch.zeros(128, 8) for name in zero}
    total = sum(
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        * row.supervised_tokens
        for row in rows
    )
    found = reference_step(harness.base, zero, 2.0, rows)
    assert found.tokens == sum(row.supervised_tokens for row in rows)
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)


def test_the_gradient_of_the_reference_is_a_difference_of_losses(harness: TrainerHarness) -> None:
    from pytest_mistral_lora.training.adapter import adapter_tensors

    tensors = {name: tensor.double() for name, tensor in adapter_tensors(harness.perturbed_model()).items()}
    name = max(tensors)
    found, rows = reference_step(harness.base, tensors, 2.0, harness.encoded[:2]), harness.encoded[:2]
    for place in ((0, 0), (5, 3)):
        shifted = {key: tensor.clone() for key, tensor in tensors.items()}
        shifted[name][place] += 1e-3
        slope = (reference_step(harness.base, shifted, 2.0, rows).loss - found.loss) / 1e-3
        assert found.gradients[name][place].item() == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_an_adapter_is_worked_in_by_hand(harness: TrainerHarness) -> None:
    from pytest_mistral_lora.training.adapter import adapter_tensors, base_tensors

    model = harness.perturbed_model()
    by_hand = merge_by_hand(load_file(harness.base / "model.safetensors"), adapter_tensors(model), 2.0)
    merged = model.merge_and_unload().state_dict()
    assert len(by_hand) == 8
    for name, weight in by_hand.items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name
    assert base_tensors(model).keys() >= by_hand.keys()


def test_a_step_is_what_it_was_and_changes_no_file(harness: TrainerHarness) -> None:
    one, two = harness.step(), harness.step()
    assert one.loss == two.loss
    assert all(torch.equal(one.gradients[name], two.gradients[name]) for name in one.gradients)
    assert len(one.gradients) == 16
    assert list(harness.scratch.glob("work/checkpoint-*")) == []


def test_watching_ends_with_the_block(harness: TrainerHarness) -> None:
    model = load_base(BaseFolder(harness.base), "fp32", "cpu")
    with record_decoder_calls() as calls:
        model(input_ids=torch.tensor([[1, 5]]), use_cache=True)
    model(input_ids=torch.tensor([[1, 5]]))
    assert [(call.ids, call.has_cache, call.training) for call in calls] == [((1, 5), True, False)]


@pytest.mark.parametrize("name", ["mixtral", "wrapped-ministral3"])
def test_the_decoder_of_every_class_is_watched(name: str) -> None:
    if not hasattr(transformers, architecture(name).text.name):
        pytest.skip("a newer transformers has the class")
    model = load_base(BaseFolder(tiny_base(name)), "fp32", "cpu")
    with record_decoder_calls() as calls:
        model(input_ids=torch.tensor([[1, 5]]), use_cache=False)
    assert [(call.ids, call.has_cache, call.training) for call in calls] == [((1, 5), False, False)]


def test_the_decoders_are_those_of_transformers() -> None:
    for text in TEXT_MODELS.values():
        if hasattr(transformers, text.name):
            assert hasattr(transformers, text.decoder)


def test_a_tiny_model_is_of_the_class_of_its_target(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base("wrapped-mistral", tied=True), tmp_path / "base"))
    target = Target("base", folder)
    kind = TinyKind.of(target.checkpoint)
    assert (str(kind), kind.label) == ("Mistral3ForConditionalGeneration (mistral), tied", "wrapped-mistral-tied")
    assert TinyKind.labelled(kind.label) == kind
    assert module.folder_of(target.oracle, tmp_path, "cpu", kind).name.endswith("-wrapped-mistral-tied-cpu")
    made = module.make_inputs(target.oracle, tmp_path / "tiny", "cpu", kind)
    assert BaseFolder(made.base).architecture == kind.architecture
    assert not any("lm_head" in name for name in load_file(made.base / "model.safetensors"))
    assert TinyKind.of(Target("spm-v3").checkpoint) == TinyKind() == TinyKind.labelled("mistral")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "is an oracle for"),
        ({"architectures": ["MistralLarge4ForConditionalGeneration"]}, "sparse attention"),
    ],
)
def test_a_class_of_which_no_tiny_model_is_trained_is_not_checked(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_base("mistral"), tmp_path / "base"))
    (folder / "config.json").write_text(json.dumps(config))
    settings = Settings(1, None, "cpu", False, (), False, tmp_path)
    for check in checks(Target("base", folder), settings):
        assert said in check.run().not_checked


def test_steps_that_differ_are_told_apart(harness: TrainerHarness) -> None:
    step = harness.whole_step
    gradients = {name: tensor.double() for name, tensor in step.gradients.items()}
    first = min(gradients)
    same = step_difference(step, step.loss, gradients)
    judge = partial(judge_difference, device="cpu", rule="ML311", subject="it", expected="the same")
    assert list(judge(same)) == []
    for other in (
        step_difference(step, step.loss + 0.01, gradients),
        step_difference(step, step.loss, {**gradients, first: gradients[first] * 1.01}),
        step_difference(step, step.loss, {name: one for name, one in gradients.items() if name != first}),
    ):
        [finding] = judge(other)
        assert finding.rule == "ML311"


def boom(harness: TrainerHarness) -> dict[str, Any]:
    raise KeyError("logits")


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (boom, "KeyError: 'logits'"),
        (lambda harness: {"a": {"loss": float("nan")}, "b": float("inf"), "c": 1}, "not a finite number: a.loss, b"),
    ],
)
def test_a_trainer_that_cannot_be_measured_is_a_finding(harness: TrainerHarness, measure: Any, said: str) -> None:
    law = TrainingLaw("ML311.batches", measure, lambda figures, device: iter(()))
    [finding] = law.result(json.loads(json.dumps(take_figures(measure, harness), allow_nan=False)), "cpu").findings
    assert (finding.rule, finding.name, finding.found) == ("ML311", "ML311.batches", said)


def test_a_run_that_fails_is_one_finding_and_the_laws_are_judged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_mistral_lora.training import run

    def refuse(recipe: Any, **named: Any) -> Any:
        raise TrainingError("the disk is full")

    monkeypatch.setattr(run, "train", refuse)
    found = attempt(Oracle(shipped_tokenizer("spm-v3")), tmp_path, device="cpu")
    assert found.failed == "the disk is full"
    settings = Settings(1, None, "cpu", False, (), False, tmp_path)
    results = {check.case: check.run() for check in checks(Target("spm-v3"), settings)}
    assert [finding.rule for finding in results["learned-by-heart"].findings] == ["ML301"]
    for case in ("every-layer-moved", "merged-as-adapter", "frozen-adapter-is-refused"):
        assert "the disk is full" in results[case].not_checked, case
    assert {finding.rule for finding in results["not-finite-stops"].findings} == {"ML322"}
    assert results["steps-are-exact"].findings == results["loaded-as-configured"].findings == ()
    with pytest.raises(MistralLoraError, match="the disk is full"):
        tiny_run(Oracle(shipped_tokenizer("spm-v3")), tmp_path, device="cpu")


@pytest.mark.slow
def test_a_run_that_was_killed_half_way_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    oracle = Oracle(shipped_tokenizer("spm-v3"))
    folder = tmp_path / f"train-{oracle.sha256[:12]}-cpu"
    write_tiny_base(folder / "base", oracle.path)
    (folder / "base" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(module, "LAWS", ())
    monkeypatch.setattr(module, "STEPS", 2)
    assert attempt(oracle, tmp_path, device="cpu").failed == ""
