"""Adapters of a base in 4 bits, and bases that are stored so: merged into full weights, and said to be; where
bitsandbytes is installed."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import declare
from fp8_bases import fp8_copy
from safetensors.torch import load_file
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import base_tensors
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # PyTorch's, when bitsandbytes is imported
]

LAYER = "model.layers.0.mlp.up_proj.weight"
"""A layer without an adapter."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """A run on the base in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    write_rows(folder / "rows.jsonl")
    data = recipe_data(base, training={"steps": 10}, evaluation={"generations": 1, "max_new_tokens": 10})
    data["base"]["quantization"] = "nf4"
    return train(parse_recipe(data, folder=folder))


def test_into_the_full_weights_with_a_note(packed: RunResult, base: Path, tmp_path: Path) -> None:
    done = merge(packed.output, tmp_path / "out", base)
    [note] = done.notes
    assert re.search("trained on the base in nf4, .* full weights", note)
    parent = done.manifest["parent"]
    assert (parent["quantization"], parent["dequantized"], parent["greedy_equal"]) == ("nf4", False, True)
    assert parent["max_abs_logit_difference"] < 1e-3
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[LAYER], load_file(base / "model.safetensors")[LAYER]
    )


def test_into_what_the_four_bits_of_training_stand_for(packed: RunResult, base: Path, tmp_path: Path) -> None:
    done = merge(packed.output, tmp_path / "out", base, dequantize=True)
    assert done.notes == ()
    parent = done.manifest["parent"]
    assert (parent["quantization"], parent["dequantized"]) == ("nf4", True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[LAYER], base_tensors(load_nf4(BaseFolder(base), "fp32", "cpu").dequantize())[LAYER])
    assert not torch.equal(found[LAYER], load_file(base / "model.safetensors")[LAYER])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert compare(tmp_path / "out", packed.output / "transcripts").tiers["exact"] == 1
    assert {fact.state for fact in verify(tmp_path / "out", base=base, parent=packed.output)} == {
        "match",
        "not available",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_base_that_is_stored_in_four_bits(run: RunResult, base: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    load_nf4(BaseFolder(base), "fp32", "cpu").save_pretrained(stored)
    shutil.copy(base / "tokenizer.model.v3", stored)
    adapter = Path(shutil.copytree(run.output, tmp_path / "lora"))
    declare(adapter, {**run.manifest, "base_weights_sha256": BaseFolder(stored).weights_sha256})
    with pytest.raises(InputError, match=r"the base is quantised \(bitsandbytes\).*--dequantise"):
        merge(adapter, tmp_path / "out", stored)
    done = merge(
        adapter, tmp_path / "out", stored, dequantize=True, golden=run.output / "transcripts" / "row-0004.json"
    )
    assert done.manifest["parent"]["dequantized"] is True
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[LAYER], base_tensors(load_nf4(BaseFolder(base), "fp32", "cpu").dequantize())[LAYER])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_method_that_cannot_be_undone_is_said(
    packed: RunResult, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.training.merge.load_nf4", lambda *given: NotUndone())
    with pytest.raises(InputError, match=r"cannot be dequantised: no such method"):
        merge(packed.output, tmp_path / "out", base, dequantize=True)
    assert list(tmp_path.iterdir()) == []


def test_an_fp8_base_may_be_rounded_to_four_bits_in_training(base: Path, tmp_path: Path) -> None:
    fp8 = fp8_copy(base, tmp_path / "fp8")
    write_rows(tmp_path / "rows.jsonl")
    data = recipe_data(fp8, training={"steps": 5}, evaluation={"generations": 1, "max_new_tokens": 10})
    data["base"]["quantization"] = "nf4"
    run = train(parse_recipe(data, folder=tmp_path))
    assert run.manifest["training"]["quantization"] == "nf4"
    assert run.manifest["training"]["dequantized"]["method"] == "fp8"
    full, rounded = load_base(BaseFolder(fp8), "fp32", "cpu"), load_nf4(BaseFolder(fp8), "fp32", "cpu").dequantize()
    for dequantize, expected in ((False, full), (True, rounded)):
        done = merge(run.output, tmp_path / f"merged-{dequantize}", fp8, dtype="float32", dequantize=dequantize)
        assert done.manifest["parent"]["dequantized"] is dequantize
        found = load_file(done.output / "model.safetensors")
        assert torch.equal(found[LAYER], base_tensors(expected)[LAYER])
    assert not torch.equal(base_tensors(full)[LAYER], base_tensors(rounded)[LAYER])


class NotUndone:
    def dequantize(self) -> Any:
        raise NotImplementedError("no such method")
