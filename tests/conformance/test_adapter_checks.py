from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import CONFIG, TENSORS, judged, rules, save_adapter
from safetensors.torch import load_file, save_file
from sampling import sampled_case
from small_mistral import write_small_mistral

from pytest_mistral_lora.assertions import assert_adapter_sound
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.adapter.effect import movement_findings
from pytest_mistral_lora.conformance.adapter.weights import summarize_tensors
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_mistral(tmp_path_factory.mktemp("hub") / "tied", tie_word_embeddings=True)


HARMLESS: dict[str, Any] = {
    # of newer and older versions of PEFT, at their defaults
    "a_key_of_tomorrow": None,
    "another_key_of_tomorrow": False,
    "a_config_of_tomorrow": {},
    "runtime_config": {"ephemeral_gpu_offload": False},
    "enable_lora": None,
    "merge_weights": False,
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "corda_config": None,
    "eva_config": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "target_parameters": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.18.1",
    "layer_replication": None,
    "task_type": "CAUSAL_LM",
    # of Unsloth and ms-swift
    "auto_mapping": {
        "base_model_class": "MistralForCausalLM",
        "parent_library": "transformers.models.mistral.modeling_mistral",
        "unsloth_fixed": True,
    },
    "lora_dtype": None,
    "lorap_lr_ratio": None,
    "lorap_emb_lr": 1e-06,
}

SAMPLE = (
    "every-projection",
    "a-regular-expression",
    "patterns",
    "dora",
    "saved-modules",
    "replicated-layers",
    "new-tokens",
    "the-head",
    "bias-of-lora",
    "rslora",
    "bfloat16",
)
"""What every run judges; the sweeps judge the rest."""
SOUND: dict[str, dict[str, Any]] = {
    "every-projection": {},
    "query-and-value": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "a-regular-expression": {"target_modules": r".*\.(self_attn|mlp)\.(q_proj|down_proj)"},
    "rslora": {"use_rslora": True, "lora_alpha": 2.5},
    "dora": {"use_dora": True},
    "bias-of-lora": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "patterns": {"rank_pattern": {"q_proj": 3, r"^model\.layers\.0\.mlp\..*": 4}, "alpha_pattern": {"q_proj": 5}},
    "one-layer": {"layers_to_transform": [1]},
    "one-layer-by-number": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "a-full-path": {"target_modules": ["layers.1.self_attn.q_proj"]},
    "excluded": {"exclude_modules": ["k_proj"]},
    "saved-modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the-head": {"target_modules": ["q_proj", "lm_head"]},
    "the-head-by-a-pattern": {"target_modules": r".*\.q_proj|lm_head"},
    "the-embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "the-embeddings-by-a-pattern": {"target_modules": r".*\.(q_proj|embed_tokens)"},
    "new-tokens": {"trainable_token_indices": [1, 2]},
    "replicated-layers": {"layer_replication": [[0, 2], [1, 2]]},
    "rank-one": {"r": 1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}

NOTED = ("dora", "bias-of-lora", "bias-all", "rslora", "patterns", "saved-modules", "new-tokens", "replicated-layers")
"""What PEFT loads, and vLLM refuses or leaves out."""


def notes(case: str) -> set[str]:
    return {"ML426"} if case in NOTED else set()


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("case", "settings"),
    [sampled_case(case, SOUND[case], name=case, is_kept=case in SAMPLE) for case in SOUND],
)
def test_what_peft_saves_is_sound(case: str, settings: dict[str, Any], save: Save, base: Path) -> None:
    results = judged(save(**settings), base)
    assert rules(results) == notes(case)
    assert {name: result.not_checked for name, result in results.items() if result.not_checked} == {}


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("case", "settings"),
    [sampled_case(case, SOUND[case], name=case, is_kept=case in SAMPLE) for case in SOUND],
)
def test_without_its_base_an_adapter_is_judged_as_far_as_it_goes(
    case: str, settings: dict[str, Any], save: Save
) -> None:
    folder = save(**settings)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "somebody/elsewhere"}))
    results = judged(folder, None)
    assert rules(results) == (notes(case) if "layer_replication" not in settings else set())
    unchecked = {name for name, result in results.items() if result.not_checked}
    named = {"tensors-complete", "configuration"} if "layer_replication" in settings else set()
    assert unchecked == {"fits-base", "changes-the-base"} | named
    assert named or "--mistral-base" in results["fits-base"].not_checked


def test_a_trainers_other_files_and_newer_keys_are_no_finding(save: Save, base: Path) -> None:
    folder = save()
    for name in (
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"),
        *("optimizer_1.bin", "sampler.bin", "random_states_0.pkl", "dl_state_dict.bin"),  # of accelerate's save_state
    ):
        (folder / name).write_bytes(b"PK")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **HARMLESS}))
    assert rules(judged(folder, base)) == set()
    assert_adapter_sound(folder, base)


@pytest.mark.parametrize(
    ("settings", "is_noted"),
    [
        ({"target_modules": r".*\.q_proj|lm_head"}, True),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": "all-linear"}, False),
        ({"trainable_token_indices": [1, 40]}, False),
    ],
    ids=str,
)
def test_a_change_of_tied_embeddings_is_noted_however_it_is_named(
    settings: dict[str, Any], is_noted: bool, tied_base: Path, tmp_path: Path
) -> None:
    results = judged(save_adapter(tied_base, tmp_path / "adapter", **settings), tied_base)
    assert rules(results) - {"ML426"} == ({"ML420"} if is_noted else set())
    assert not results["changes-the-base"].not_checked


def test_a_note_does_not_fail_the_assertion_and_an_error_does(save: Save, base: Path) -> None:
    folder = save(revision=None)
    assert rules(judged(folder, base)) == {"ML411"}
    assert_adapter_sound(folder, base)
    (folder / TENSORS).write_bytes(b"")
    with pytest.raises(AssertionError, match=r"^ML405 .*adapter_model.safetensors"):
        assert_adapter_sound(folder, base)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(save: Save, base: Path) -> None:
    folder = save()
    for name in (CONFIG, TENSORS):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    results = judged(folder, base)
    assert rules(results) == {"ML405"}
    assert all("not a regular file" in finding.text() for finding in results["files"].findings)


def test_a_configuration_of_gigabytes_is_not_read(save: Save, base: Path) -> None:
    folder = save()
    with (folder / CONFIG).open("wb") as file:
        file.truncate(2 << 30)
    assert "too large" in judged(folder, base)["files"].findings[0].found


def test_a_configuration_with_a_number_that_is_none_cannot_be_read(save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": float("nan")}))
    results = judged(folder, base)
    assert rules(results) == {"ML405"}
    assert any("NaN is not a JSON number" in finding.found for one in results.values() for finding in one.findings)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_replication": [[0, 10**9]]},
        {"layer_replication": [[0]]},
        {"layers_to_transform": "all"},
        {"target_modules": ["q_proj"] * 20_000},
        {"target_modules": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": ["q_proj"]},
        {"modules_to_save": [1]},
        {"r": 10**30},
        {"r": True},
        {"lora_alpha": -8},
        {"use_rslora": "yes"},
        {"bias": "some"},
        {"trainable_token_indices": "all"},
        {"target_modules": "("},
    ],
    ids=str,
)
def test_a_value_that_no_lora_has_is_named(change: dict[str, Any], save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    results = judged(folder, base)
    assert rules(results) == {"ML408"}
    assert results["tensors-complete"].not_checked


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: name.removeprefix("base_model.model."), "is missing"),
        (lambda name: f"base_model.model.{name}", "twice"),
        (lambda name: name.replace("model.model.", "model."), "it begins with 'base_model.model.'"),
        (lambda name: name.replace("model.layers", "language_model.layers"), "'language_model.' is in it"),
        (lambda name: f"module.{name}", "'module.' is in it"),
        (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "'_orig_mod.' is in it"),
        (lambda name: name.replace(".weight", ".default.weight"), "the adapter's name 'default'"),
        (lambda name: name.replace(".lora_", ".base_layer.lora_"), "'.base_layer' is in it"),
        (lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "it ends otherwise"),
        (lambda name: name.removesuffix(".weight"), "it ends otherwise"),
    ],
)
def test_without_a_base_names_that_peft_does_not_find_are_told_with_the_right_one(
    rename: Callable[[str], str], says: str, save: Save
) -> None:
    folder = save()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / TENSORS)
    [finding] = judged(folder, None)["tensors-complete"].findings
    assert finding.rule == "ML407"
    assert f"{len(tensors)} names" in finding.found
    assert says in finding.found
    assert finding.expected in tensors


def test_an_adapter_that_is_small_everywhere_is_a_short_run(save: Save, base: Path) -> None:
    folder = save()
    tensors = {name: tensor / (1e6 if "lora_B" in name else 1) for name, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)
    assert not judged(folder, base)["layers-trained"].findings


@pytest.mark.parametrize(
    ("moved", "still"),
    [
        ({0: 1.0}, 5),
        ({5: 1.0}, 5),
        ({2: 1.0, 3: 1.0}, 4),
        # a gradient that shrinks towards the first block is no freezing
        ({n: 0.3**n for n in range(6)}, 0),
        (dict.fromkeys(range(6), 1e-5), 0),
    ],
)
def test_blocks_that_hardly_moved_are_told_from_those_that_moved(
    moved: dict[int, float], still: int, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    sides = {"lora_A": (4, 16), "lora_B": (16, 4)}
    names = {n: f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in range(6)}
    tensors = {
        f"{name}.{side}.weight": torch.randn(shape, generator=random) * (moved.get(n, 1e-6) if side == "lora_B" else 1)
        for n, name in names.items()
        for side, shape in sides.items()
    }
    save_file(tensors, tmp_path / TENSORS)
    found = [finding.found for finding in movement_findings(AdapterFolder(tmp_path, None))]
    assert len(found) == still
    assert not any(f"layers.{n}." in text for n in moved for text in found)


@pytest.mark.parametrize(
    ("kind", "zeros", "dtype", "lost"),
    [
        ("self_attn.q_proj", {0: slice(8, 16), 1: slice(8, 16)}, torch.float32, True),
        ("self_attn.q_proj", {0: slice(2, 4), 1: slice(2, 4)}, torch.bfloat16, True),
        # rows of a fused projection that are not trained, one block, other rows in each, and no shard
        ("mlp.gate_up_proj", {0: slice(8, 16), 1: slice(8, 16)}, torch.float32, False),
        ("self_attn.q_proj", {0: slice(8, 16)}, torch.float32, False),
        ("self_attn.q_proj", {0: slice(8, 16), 1: slice(0, 8)}, torch.float32, False),
        ("self_attn.q_proj", {0: slice(7, 8), 1: slice(7, 8)}, torch.float32, False),
    ],
)
def test_a_shard_that_is_zero_in_each_block_is_lost(
    kind: str, zeros: dict[int, slice], dtype: torch.dtype, lost: bool, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for side, shape in (("lora_A", (4, 16)), ("lora_B", (16, 4))):
            tensor = torch.randn(shape, generator=random)
            if side == "lora_B" and block in zeros:
                tensor[zeros[block]] = 0
            tensors[f"base_model.model.model.layers.{block}.{kind}.{side}.weight"] = tensor.to(dtype)
    save_file(tensors, tmp_path / TENSORS)
    found = list(movement_findings(AdapterFolder(tmp_path, None)))
    assert [(finding.rule, "lora_B" in finding.found) for finding in found] == [("ML424", True)] * lost


@pytest.mark.parametrize(("factor", "expected"), [(1.0, set()), (1.9, set()), (3.0, {"ML428"}), (0.3, {"ML428"})])
def test_magnitudes_are_about_the_norms_of_the_base(factor: float, expected: set[str], save: Save, base: Path) -> None:
    folder = save(use_dora=True)
    tensors = load_file(folder / TENSORS)
    names = [name for name in tensors if "magnitude" in name]
    weights = BaseFolder(base).weights
    for name in names:
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        tensors[name] = weights[f"{layer}.weight"].float().norm(dim=1) * factor
    save_file(tensors, folder / TENSORS)
    assert rules(judged(folder, base)) - {"ML426"} == expected


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("rank", "alpha", "largest", "expected"),
    [
        (1, 32, 1000.0, set()),
        (1, 33, 1000.0, {"ML428"}),
        (512, 512, 1000.0, set()),
        (513, 513, 1000.0, {"ML426"}),
        (1, 32, 1000.0001, {"ML416"}),
    ],
)
def test_the_numbers_of_an_adapter_have_their_bounds(
    rank: int, alpha: int, largest: float, expected: set[str], save: Save, base: Path
) -> None:
    folder = save(r=rank, lora_alpha=alpha, target_modules=["q_proj"])
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values()))[0, 0] = -largest
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    assert rules(judged(folder, base)) & {"ML416", "ML426", "ML428"} == expected


def test_tensors_without_a_number_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"x.{number}.lora_A.weight": torch.empty(0, 4) for number in range(20_000)}, file)
    start = time.process_time()
    weights = Weights([file])
    header = time.process_time()
    summaries = summarize_tensors(weights)
    assert time.process_time() - header < (header - start) / 2
    assert {(summary.finite, summary.largest) for summary in summaries.values()} == {(True, 0.0)}
