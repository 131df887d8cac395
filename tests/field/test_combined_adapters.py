"""A sum of rsLoRA adapters, as PEFT makes it: √r times too strong, which `check` and `doctor` name as a fact."""

from __future__ import annotations

import json
import math
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from of_classes import COMMIT, tiny_base
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

from pytest_mistral_lora import judge
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.programs.facts import fact
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.lora_delta import deltas_of

RANK = 4
COMBINED_RSLORA = fact("combined-rslora")


@pytest.fixture(scope="module")
def base() -> Path:
    return tiny_base("mistral")


@pytest.fixture
def combined(base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter of rsLoRA, `first`, and of the sum that PEFT makes of it alone, with the weight 1."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=targets, use_rslora=True, lora_dropout=0.0
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, config, adapter_name="first")
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.02)
        adapted.add_weighted_adapter(["first"], [1.0], "sum", combination_type="cat")
        adapted.save_pretrained(tmp_path)
    for name in ("first", "sum"):
        configure(tmp_path / name, revision=COMMIT)
    return tmp_path


def configure(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def scales(folder: Path, base: Path) -> list[str]:
    verdict = judge(folder, base=base)
    # a server that knows no rsLoRA is named for each such scale
    assert {finding.rule for finding in verdict.findings} <= {"ML426"}
    return [line for line in str(verdict).splitlines() if line.startswith("scale of")]


def test_a_sum_of_peft_is_too_strong_by_the_root_of_its_rank(combined: Path) -> None:
    if COMBINED_RSLORA.standing({"peft": version("peft")}).state != "present":
        pytest.skip("not a version of PEFT with the fault")
    source, made = (deltas_of(AdapterFolder(combined / name), Weights([])) for name in ("first", "sum"))
    for layer, delta in source.items():
        (a, b), (c, d) = delta.factors(), made[layer].factors()
        factor = (d @ c) * made[layer].scaling / ((b @ a) * delta.scaling)
        assert factor == pytest.approx(math.sqrt(RANK), rel=1e-3)


def test_the_scale_of_an_adapter_that_can_be_a_sum_is_a_fact(combined: Path, base: Path) -> None:
    [line] = scales(combined / "sum", base)
    assert f"√{RANK}" in line
    assert COMBINED_RSLORA.symptom in line


def test_another_scale_is_no_fact(combined: Path, base: Path) -> None:
    assert scales(combined / "first", base) == []
    configure(combined / "sum", use_rslora=False)
    assert scales(combined / "sum", base) == []
    configure(combined / "sum", use_rslora=True, lora_alpha=2 * RANK)
    assert scales(combined / "sum", base) == []
