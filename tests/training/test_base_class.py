"""A base is loaded as AutoModel loads it, or refused by name: in training, smoke, merge and checks of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import base_with
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.training.run import RunResult

MIXED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
        {"sliding_window": 4, "layer_types": None},
        {"sliding_window": 4},
        MIXED,
        {"layer_types": ["full_attention"] * 2, "sliding_window": ...},
    ],
)
def test_layers_of_any_types_compute_as_automodel_does(base: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = base_with(base, tmp_path / "base", **keys)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = load_base(BaseFolder(folder), "fp32", "cpu")(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)


def test_layers_of_two_types_are_another_model(base: Path, tmp_path: Path) -> None:
    from transformers import MistralForCausalLM

    folder = base_with(base, tmp_path / "base", **MIXED)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
        right = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    assert not torch.allclose(plain, right)  # the reason why the class in `architectures` is not always the one loaded


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"layer_types": "full_attention"}, "its layer_types are 'full_attention'"),
        ({"model_type": "ministral"}, "of model_type 'ministral'"),
        ({"model_type": "mixtral"}, "of model_type 'mixtral'"),
    ],
)
def test_another_model_is_refused_by_name(base: Path, tmp_path: Path, keys: dict[str, Any], found: str) -> None:
    folder = base_with(base, tmp_path / "base", **keys)
    for load in (BaseFolder.empty_model, lambda base: load_base(base, "fp32", "cpu")):
        with pytest.raises(PinError, match=found):
            load(BaseFolder(folder))


def test_every_command_that_loads_a_base_refuses_it(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base_with(run.base_folder, tmp_path / "base", model_type="mixtral")
    words = (str(run.output), "--base", str(folder))
    for command in (["smoke", *words], ["merge", str(run.output), str(tmp_path / "merged"), *words[1:]]):
        assert main(command) == 2
        assert "of model_type 'mixtral'" in capsys.readouterr().err
    with pytest.raises(PinError, match="of model_type 'mixtral'"):
        list(adapter_findings(run.output, folder))
