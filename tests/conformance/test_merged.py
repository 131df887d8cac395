"""Healthy merges as PEFT makes them pass; broken ones are in the gallery."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_bases import write_base_and_lora
from safetensors.torch import load_file, save_file
from sampling import sampled_case
from suite_outcomes import suite_outcomes
from transformers import MistralConfig

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.merged.checks import cases
from pytest_mistral_lora.conformance.merged.structure import difference_findings, tie_findings
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

WEIGHTS = "model.safetensors"
Merge = Callable[..., Path]


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Make a base, an adapter and their merge by PEFT alone: no manifest, no tokenizer."""
    made: dict[str, Path] = {}

    def make(dtype: torch.dtype = torch.bfloat16, *, tied: bool = False, std: float = 0.02, **settings: Any) -> Path:
        key = repr((dtype, tied, std, settings))
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("merge")
            values = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **settings}
            adapted = write_base_and_lora(folder, dtype, tied=tied, std=std, **values)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted.merge_and_unload().save_pretrained(folder / "merged")
        return made[key]

    return make


def judged(folder: Path, *, with_adapter: bool = False, base: bool = True) -> dict[str, Result]:
    of_run = BaseFolder(folder / "base") if base else None
    beside = [AdapterFolder(folder / "lora", of_run)] if with_adapter else []
    found = cases(AdapterFolder(folder / "merged", of_run), beside)
    return {name: judge() for name, judge in found.items()}


def rules(results: dict[str, Result]) -> set[str]:
    return {finding.rule for result in results.values() for finding in result.findings}


SAMPLE = ("bfloat16", "float32-tied", "rslora", "dora")
HEALTHY: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32-tied": {"dtype": torch.float32, "tied": True},
    "hardly-above-rounding": {"std": 0.001},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 64}},
    "dora": {"use_dora": True},
    "dora-in-float32": {"use_dora": True, "dtype": torch.float32},
    "half-of-the-rank": {"r": 16},
    "all-projections-tied": {"tied": True, "target_modules": "all-linear"},
}


@pytest.mark.parametrize(
    "settings", [sampled_case(HEALTHY[name], name=name, is_kept=name in SAMPLE) for name in HEALTHY]
)
def test_a_healthy_merge_passes(merge: Merge, settings: dict[str, Any]) -> None:
    folder = merge(**settings)
    for with_adapter in (False, True):
        results = judged(folder, with_adapter=with_adapter)
        assert [finding.text() for result in results.values() for finding in result.findings] == []
        compared = {name for name, result in results.items() if not result.not_checked}
        assert {"names-and-shapes", "changes-the-base", "changed-places", "low-rank", "configuration"} <= compared
        assert ("adapter-product" in compared) is with_adapter


def test_tensors_trained_in_full_and_layers_left_out_are_explained_by_the_adapter(merge: Merge) -> None:
    saved, some = merge(modules_to_save=["lm_head"]), merge(layers_to_transform=[1])
    assert (rules(judged(saved)), rules(judged(some))) == ({"ML430"}, {"ML438"})
    assert rules(judged(saved, with_adapter=True)) == rules(judged(some, with_adapter=True)) == set()


@pytest.mark.parametrize(("rank", "is_judged"), [(12, True), (16, True), (20, False)])
def test_a_matrix_of_twice_the_rank_is_judged_and_a_smaller_one_is_not(
    rank: int, is_judged: bool, merge: Merge, tmp_path: Path
) -> None:
    """A matrix with fewer rows than twice the rank can have any change; one with more cannot."""
    folder = Path(shutil.copytree(merge(r=rank, std=0.05), tmp_path / "made"))
    merged = folder / "merged"
    tensors = load_file(merged / WEIGHTS)
    [name] = [name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight")]
    assert tensors[name].shape == (32, 64)
    random = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    (merged / WEIGHTS).unlink()
    save_file(tensors | {name: (random * tensors[name].float().std()).bfloat16()}, merged / WEIGHTS)
    result = judged(folder)["low-rank"]
    assert dict(result.facts)["highest rank"] == 32  # that of the random matrix
    found = [finding.found for finding in result.findings if finding.rule == "ML431"]
    assert [text.split()[3] for text in found] == [name] * is_judged


def test_another_adapter_of_the_same_shape_is_no_explanation(merge: Merge) -> None:
    folder, other = merge(), merge(std=0.021)
    base = BaseFolder(folder / "base")
    beside = [AdapterFolder(made / "lora", base) for made in (other, folder)]
    results = cases(AdapterFolder(folder / "merged", base), beside[:1])
    [finding, *_] = results["adapter-product"]().findings
    assert finding.rule == "ML434"
    # of several adapters, the one that fits is the one that was merged
    both = cases(AdapterFolder(folder / "merged", base), beside)
    assert both["adapter-product"]().findings == ()


def test_without_a_base_numbers_ties_and_sizes_are_checked(merge: Merge) -> None:
    results = judged(merge(), base=False)
    checked = {name for name, result in results.items() if not result.not_checked}
    assert checked == {"files", "other-files", "tensors-finite", "tie"}
    assert "--mistral-base" in results["low-rank"].not_checked


def test_a_merge_that_went_through_a_narrower_dtype_passes(merge: Merge, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merge(dtype=torch.float32), tmp_path / "made"))
    # as if the base had been loaded in bfloat16: weights of float32 that have its numbers
    tensors = {name: one.bfloat16().float() for name, one in load_file(folder / "merged" / WEIGHTS).items()}
    save_file(tensors, folder / "merged" / WEIGHTS)
    assert rules(judged(folder)) == rules(judged(folder, with_adapter=True)) == set()


def test_shards_and_a_vocabulary_that_grew_pass(merge: Merge, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merge(), tmp_path / "made"))
    merged = folder / "merged"
    tensors = load_file(merged / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "vocab_size": 130, "pad_token_id": 128}))
    names, where = sorted(tensors), {}
    (merged / WEIGHTS).unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, merged / file)
        where |= dict.fromkeys(part, file)
    (merged / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    assert rules(judged(folder)) == set()


def of_another_class(folder: Path, wrapped: bool) -> Path:
    """Make base, adapter and merge of a model that is not a MistralForCausalLM: with images, or with experts."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MixtralConfig,
        MixtralForCausalLM,
        PixtralVisionConfig,
    )

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind: Any = MixtralForCausalLM
    config: Any = MixtralConfig(**sizes, **heads, num_local_experts=2)
    if wrapped:
        vision = PixtralVisionConfig(**tower, image_size=28, patch_size=14)
        kind, text = Mistral3ForConditionalGeneration, MistralConfig(**sizes, **heads)
        config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        kind(config).bfloat16().save_pretrained(folder / "base")
        model = kind.from_pretrained(folder / "base", dtype=torch.bfloat16)
        target = r".*layers\.\d+\.self_attn\.(q|v)_proj"
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=target))
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.02)
        adapted.save_pretrained(folder / "lora")
        adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder


@pytest.mark.skipif(version("transformers") < "5", reason="older versions write other names of these models")
@pytest.mark.parametrize("wrapped", [False, True], ids=["mixtral", "mistral3"])
def test_a_merge_of_another_class_is_held_to_its_adapter(tmp_path: Path, wrapped: bool) -> None:
    folder = of_another_class(tmp_path, wrapped)
    results = judged(folder, with_adapter=True)
    assert rules(results) == set()
    assert not results["adapter-product"].not_checked
    file = folder / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": True}))
    assert rules(judged(folder, with_adapter=True)) == {"ML434"}


V5 = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
V4 = {**V5, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
THETA = {"rope_theta": 1000000, "rope_type": "default"}


@pytest.mark.parametrize(
    ("own", "base"),
    [
        ({**V5, "rope_parameters": THETA}, V4),
        (V4, {**V5, "rope_parameters": THETA}),
        ({**V4, "rope_scaling": None, "head_dim": 16, "num_key_value_heads": 8, "unsloth_version": "2026.1"}, V4),
        ({**V4, "sliding_window": 4096, "attention_dropout": 0.0, "pad_token_id": 11, "use_cache": False}, V4),
        ({**V4, "rope_scaling": {"type": "linear", "factor": 2.0}},) * 2,
        (
            {**V5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
            {**V4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_the_same_values_in_another_spelling_are_no_difference(own: dict[str, Any], base: dict[str, Any]) -> None:
    assert [finding.text() for finding in difference_findings(own, base, "config.json")] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": None}, "rope_theta is 10000.0"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 77.0}}, "rope_theta is 77.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope.type is 'linear'"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"layer_types": ["full_attention"] * 32}, "the architecture is Ministral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"max_position_embeddings": 512}, "max_position_embeddings is 512"),
    ],
)
def test_another_value_is_named(change: dict[str, Any], named: str) -> None:
    own = {key: value for key, value in {**V4, **change}.items() if value is not None}
    found = [finding.found for finding in difference_findings(own, V4, "config.json")]
    assert any(text.startswith(named) for text in found), found
    assert any("the key is missing" in text for text in found) == (own.keys() < V4.keys()), found


@pytest.mark.parametrize(
    ("top", "text", "head", "wrong"),
    [
        (True, True, False, []),
        (False, False, True, []),
        (None, False, True, []),
        (None, None, True, []),
        (True, False, True, ["tie_word_embeddings is true"]),
        (True, False, False, ["text_config.tie_word_embeddings is false"]),
        (None, None, False, ["tie_word_embeddings is missing"]),
    ],
)
def test_ties_are_judged_at_both_levels(
    tmp_path: Path, top: bool | None, text: bool | None, head: bool, wrong: list[str]
) -> None:
    tensors = {"language_model.model.embed_tokens.weight": torch.zeros(4, 2)}
    tensors |= {"language_model.lm_head.weight": torch.ones(4, 2)} if head else {}
    save_file(tensors, tmp_path / WEIGHTS)
    levels = [{} if value is None else {"tie_word_embeddings": value} for value in (top, text)]
    findings = tie_findings({**levels[0], "text_config": levels[1]}, Weights([tmp_path / WEIGHTS]), "config.json")
    found = [finding.found for finding in findings]
    assert len(found) == len(wrong)
    assert all(text.startswith(part) for text, part in zip(found, wrong, strict=True))


def test_check_takes_a_merged_folder_with_its_base_and_its_adapter(merge: Merge) -> None:
    folder = merge()
    judged = suite_outcomes([folder / "merged", folder / "lora"], folder / "base")
    outcomes = {outcome.name: outcome.state for outcome in judged}
    assert outcomes["merged::merged::adapter-product"] == outcomes["merged::merged::low-rank"] == "passed"
    assert "failed" not in outcomes.values()
    # without a base it is a checkpoint like any other
    assert recognised(folder / "merged").kind == "tokenizer"
