"""Runs and merges on FP8 bases, plain and wrapped: recorded, verified, and merged into full weights."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_sentencepiece import cut_v3
from fp8_bases import BLOCK, GATE0, K0, Q0, SCALE, WEIGHTS, by_formula, changed, fp8_config, fp8_copy, reconfigured
from safetensors.torch import load_file, save_file
from tiny_runs import MakeRecipe, recipe_data, write_rows
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.conformance.merged.checks import cases as merged_cases
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train


@pytest.fixture(scope="session")
def fp8_run(tmp_path_factory: pytest.TempPathFactory, fp8_bases: dict[int | None, Path]) -> RunResult:
    folder = tmp_path_factory.mktemp("fp8-run")
    write_rows(folder / "rows.jsonl")
    sections = {"training": {"steps": 8}, "evaluation": {"generations": 1, "max_new_tokens": 8}}
    return train(parse_recipe(recipe_data(fp8_bases[None], **sections), folder=folder))


def test_the_memory_is_reported_before_the_weights_are_loaded(
    fp8_bases: dict[int | None, Path], make_recipe: MakeRecipe, monkeypatch: Any, caplog: Any
) -> None:
    class Loading(Exception):
        pass

    def load(*given: Any) -> Any:
        raise Loading

    monkeypatch.setattr("pytest_mistral_lora.training.run.load_base", load)
    with caplog.at_level(logging.WARNING), pytest.raises(Loading):
        train(make_recipe(fp8_bases[BLOCK]))
    assert re.search(r"FP8, blocks of 32 x 32, 0\.00228 GB .*fp32, .*0\.00513 GB", caplog.text)


def test_a_run_records_the_layout(fp8_run: RunResult, fp8_bases: dict[int | None, Path]) -> None:
    manifest, files = fp8_run.manifest, fp8_bases[None] / WEIGHTS
    assert manifest["training"]["dequantized"] == {
        "method": "fp8",
        "scaling": "one scale a matrix",
        "matrices": 14,
        "stored_bytes": files.stat().st_size,
        "bytes": 4 * sum(one.numel() for one in by_formula(fp8_bases[None], None).values()),
    }
    assert manifest["base_config"]["quantization"] == {
        "quant_method": "fp8",
        "weight_block_size": None,
        "scale_fmt": "float",
    }
    decision = (fp8_run.output / "DECISION.md").read_text()
    assert re.search(r"fp32 base, .*FP8 \(one scale", decision)


def test_a_run_is_verified_used_and_sound(fp8_run: RunResult, fp8_bases: dict[int | None, Path]) -> None:
    base = fp8_bases[None]
    assert [fact for fact in verify(fp8_run.output, base=base) if fact.state == "mismatch"] == []
    assert compare(fp8_run.output, fp8_run.output / "transcripts", base).tiers["exact"] == 1
    assert [one for one in adapter_findings(fp8_run.output, base) if one.severity == "error"] == []


def test_a_base_of_another_layout_is_another_base(
    fp8_run: RunResult, fp8_bases: dict[int | None, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fp8_bases[None], tmp_path / "base"))
    reconfigured(folder, fp8_config(128))
    assert BaseFolder(folder).canonical_config["quantization"]["weight_block_size"] == [128, 128]
    with pytest.raises(InputError, match=r'quantization is {"quant_method": "fp8", "scale_fmt": "float", "weight_'):
        merge(fp8_run.output, tmp_path / "out", folder)


@pytest.mark.parametrize("dequantize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merged_weights_are_full_and_need_no_scale(
    fp8_run: RunResult, fp8_bases: dict[int | None, Path], tmp_path: Path, dequantize: bool
) -> None:
    done = merge(fp8_run.output, tmp_path / "out", fp8_bases[None], dequantize=dequantize)
    assert done.notes == ()
    parent = done.manifest["parent"]
    assert (parent["merge_dtype"], parent["dequantized"]) == ("bfloat16", False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)
    found, full = load_file(tmp_path / "out" / WEIGHTS), by_formula(fp8_bases[None], None)
    assert found.keys() == full.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not torch.equal(found[f"{Q0}.weight"], full[f"{Q0}.weight"].bfloat16())
    # layers without an adapter: FP8 before, and full before
    for name in (f"{GATE0}.weight", "model.norm.weight"):
        assert torch.equal(found[name], full[name].bfloat16())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in found.items())


def test_a_merged_model_is_judged_beside_its_fp8_base(
    fp8_run: RunResult, fp8_bases: dict[int | None, Path], tmp_path: Path
) -> None:
    merge(fp8_run.output, tmp_path / "out", fp8_bases[None])
    results = {
        name: judge()
        for name, judge in merged_cases(
            AdapterFolder(tmp_path / "out", BaseFolder(fp8_bases[None])),
            [AdapterFolder(fp8_run.output, BaseFolder(fp8_bases[None]))],
        ).items()
    }
    assert {name: (one.findings, one.not_checked) for name, one in results.items()} == dict.fromkeys(results, ((), ""))
    # the twin: a merge that took one scale for all of a matrix's blocks, as by the mean
    changed(tmp_path / "out", lambda one: one.update({f"{K0}.weight": one[f"{K0}.weight"] * 1.5}))
    judged = merged_cases(
        AdapterFolder(tmp_path / "out", BaseFolder(fp8_bases[None])),
        [AdapterFolder(fp8_run.output, BaseFolder(fp8_bases[None]))],
    )
    assert {one.rule for name in ("low-rank", "adapter-product") for one in judged[name]().findings} >= {"ML434"}


def test_a_base_in_shards_is_merged_with_an_index_of_full_weights(
    fp8_run: RunResult, fp8_bases: dict[int | None, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fp8_bases[BLOCK], tmp_path / "base"))
    tensors, files = load_file(folder / WEIGHTS), [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    (folder / WEIGHTS).unlink()
    # a matrix and its scale are in different files
    places = {name: files[name.endswith(SCALE)] for name in tensors}
    for file in files:
        save_file({name: one for name, one in tensors.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    expected = by_formula(fp8_bases[BLOCK], BLOCK)
    assert all(torch.equal(one, expected[name].to(one.dtype)) for name, one in BaseFolder(folder).weights.items())
    write_rows(tmp_path / "rows.jsonl")
    sections = {"training": {"steps": 1}, "evaluation": {"generations": 1, "max_new_tokens": 4}}
    run = train(parse_recipe(recipe_data(folder, **sections), folder=tmp_path))
    merge(run.output, tmp_path / "merged", folder)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0


@pytest.fixture(scope="module", params=["ministral3", "mistral4"])
def wrapped_fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of text and images whose text layers are in FP8; routed experts, embeddings and tower are not."""
    kind = Architecture(TEXT_MODELS[request.param], is_wrapped=True)
    folder = tmp_path_factory.mktemp("wrapped")
    try:
        full = write_tiny_base(folder / "full", cut_v3(), architecture=kind, tied=True)
    except PinError as error:
        pytest.skip(str(error))
    return fp8_copy(full, folder / "fp8")


def test_the_text_of_a_wrapped_model_is_dequantised(wrapped_fp8: Path) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(wrapped_fp8, dtype=torch.bfloat16).state_dict()
    ours = load_base(BaseFolder(wrapped_fp8), "bf16", "cpu").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    layout = BaseFolder(wrapped_fp8).weights
    assert isinstance(layout, DequantizedWeights)
    assert len(layout.layout.scales) >= 2 * 5


@pytest.mark.slow
def test_a_wrapped_model_is_trained_verified_and_merged(wrapped_fp8: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    sections = {
        "lora": {"target_modules": ["attention"]},
        "training": {"steps": 8},
        "evaluation": {"generations": 1, "max_new_tokens": 8},
    }
    run = train(parse_recipe(recipe_data(wrapped_fp8, **sections), folder=tmp_path))
    assert run.manifest["training"]["dequantized"]["scaling"] == "one scale a matrix"
    assert [fact for fact in verify(run.output, base=wrapped_fp8) if fact.state == "mismatch"] == []
    assert [one for one in adapter_findings(run.output, wrapped_fp8) if one.severity == "error"] == []
    merge(run.output, tmp_path / "merged", wrapped_fp8)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    before = load_base(BaseFolder(wrapped_fp8), "bf16", "cpu").state_dict()
    different = {name for name, tensor in before.items() if not torch.equal(merged[name], tensor)}
    assert different == {f"{layer}.weight" for layer in run.adapter.layers}
    judged = merged_cases(
        AdapterFolder(tmp_path / "merged", BaseFolder(wrapped_fp8)),
        [AdapterFolder(run.output, BaseFolder(wrapped_fp8))],
    )
    assert [one for judge in judged.values() for one in judge().findings if one.severity == "error"] == []
