"""The estimate of memory, from a configuration alone, against the count on a real model and the peak of a step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from class_models import Case
from packaging.version import Version
from sampling import sampled
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.memory import _BLOCKS_AT_ONCE, estimate_need, parse_size, recipe_memory
from pytest_mistral_lora.training.step import StepRow
from pytest_mistral_lora.training.step.attention_cpu import BLOCK
from pytest_mistral_lora.training.step.forward import attend_in_segments, supervised_losses
from pytest_mistral_lora.training.step.frozen_layers import use_frozen_layers
from pytest_mistral_lora.training.step.memory_need import (
    _bytes_of_pass,
    checkpoint_activations,
    checkpointed_layers,
    measure_need,
)

SIZES = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 320, "num_attention_heads": 4}
CASES = [
    Case("mistral"),
    Case("ministral3", tied=True),
    Case("mixtral"),
    Case("mistral4"),
    Case("qwen2"),
    Case("ministral", wrapped=True),
]
SAMPLE = {"mixtral", "wrapped-ministral"}
each_case = pytest.mark.parametrize("case", sampled(CASES, SAMPLE))


def skip_without_estimate(kind: str) -> None:
    """Skip a test if the installed transformers has no estimate for a kind of model."""
    if kind == "mixtral" and Version(transformers.__version__) < Version("5"):
        pytest.skip("its experts are chosen by numbers in a loop: there is no estimate")


def described(case: Case, folder: Path) -> Path:
    """Write the configuration of a model, and nothing else; no window is shorter than the rows."""
    skip_without_estimate(case.kind)
    windows = {"sliding_window": 4096} if case.kind in ("mistral", "ministral") else {}
    case.config(**SIZES, **windows).save_pretrained(folder)
    return folder


def real(folder: Path, recipe: Any, layers: list[str], dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of a configuration with real, random numbers."""
    model = BaseFolder(folder).empty_model().to_empty(device="cpu").to(dtype)
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    model = attach_adapter(model, recipe.lora, layers, seed=0)
    if hasattr(model.get_base_model(), "set_experts_implementation"):
        model.get_base_model().set_experts_implementation("eager")
    attend_in_segments(model)
    use_frozen_layers(model)
    return model


@each_case
def test_the_estimate_is_the_count_on_a_real_model(case: Case, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    folder, recipe = described(case, tmp_path / "base"), make_recipe(lora={"target_modules": ["attention"]})
    layers = adapted_layers(BaseFolder(folder), recipe.lora.target_modules)
    found = estimate_need(BaseFolder(folder), recipe, layers, "fp32", on_gpu=False)
    counted = measure_need(real(folder, recipe, layers))
    exact = ("base", "quantisable", "values", "adapter", "vocabulary")
    assert {name: getattr(found, name) for name in exact} == {name: getattr(counted, name) for name in exact}
    # a real model gets short rows: a block of attention does not reach over as many tokens as in a long one
    blocks = _BLOCKS_AT_ONCE * BLOCK * SIZES["num_attention_heads"] * 4
    for one, other in ((found.plain, counted.plain), (found.checkpointed, counted.checkpointed)):
        assert one.head == pytest.approx(other.head, rel=0.2)
        assert one.backward == pytest.approx(other.backward, abs=blocks)


@each_case
def test_a_model_that_is_checkpointed_already_is_measured_like_any_other(
    case: Case, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    folder, recipe = described(case, tmp_path / "base"), make_recipe(lora={"target_modules": ["attention"]})
    model = real(folder, recipe, adapted_layers(BaseFolder(folder), recipe.lora.target_modules)).train()
    plain = measure_need(model)
    checkpoint_activations(model)
    layers = checkpointed_layers(model)
    again = measure_need(model)
    # with checkpointing, the embeddings need a gradient, which keeps the input of the first layer
    assert again.plain.head == pytest.approx(plain.plain.head, rel=0.05)
    assert again.plain.backward == pytest.approx(plain.plain.backward, rel=0.05)
    assert again == replace(plain, plain=again.plain)
    assert plain.checkpointed.head < 0.8 * plain.plain.head
    assert plain.checkpointed.backward < plain.plain.backward
    # and it is left as it was
    assert layers
    assert checkpointed_layers(model) == layers


def test_layers_without_an_adapter_are_counted_apart(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    folder, recipe = tmp_path / "base", make_recipe(lora={"target_modules": ["attention"]})
    Case("mistral").config(**SIZES, num_hidden_layers=9, sliding_window=None).save_pretrained(folder)
    model = real(folder, recipe, adapted_layers(BaseFolder(folder), recipe.lora.target_modules)).train()
    for name, parameter in model.named_parameters():
        # of the layers below the first adapter, and of two between others
        if re.search(r"\.layers\.[01346]\..*lora_", name):
            parameter.requires_grad = False
    found = measure_need(model).plain
    (short_head, short), (long_head, long) = (_bytes_of_pass(model, tokens) for tokens in (16, 48))
    assert found.head == pytest.approx((long_head - short_head) / 32, rel=0.02)
    assert found.backward == pytest.approx((long - short) / 32, rel=0.02)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the most bytes that are allocated on the CPU at a time while a function runs, beside those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(accumulate(changes))


@each_case
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_estimate_is_near_the_peak_of_a_real_step(
    case: Case, tmp_path: Path, make_recipe: MakeRecipe, checkpointed: bool
) -> None:
    folder, recipe = described(case, tmp_path / "base"), make_recipe(lora={"target_modules": ["attention"]})
    layers, tokens = adapted_layers(BaseFolder(folder), recipe.lora.target_modules), 512
    model = real(folder, recipe, layers).train()
    if checkpointed:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    ids = torch.randint(3, 300, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    rows = [StepRow(0, ids, ids)]

    def step() -> None:
        supervised_losses(model, rows)[0].sum().backward()
        optimizer.step()

    peak = sum(one.nbytes for one in model.parameters()) + peak_bytes(step)
    need = estimate_need(BaseFolder(folder), recipe, layers, "fp32", on_gpu=False)
    total = need.total(tokens, checkpointed=checkpointed)
    # experts are the most above: a step computes one after the other, and each has a part of the tokens
    assert 0.9 < total / peak < 1.3


# the estimate for a device


BIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
"""The sizes of Mistral 7B: 7.25 billion numbers."""

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def big_base(tmp_path: Path) -> Path:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(BIG))
    return tmp_path / "big"


@pytest.mark.parametrize(
    ("training", "fits"),
    [
        # 14.5 GB of weights in bf16, and less than 6 of activations, with checkpointing
        pytest.param({"precision": "bf16", "activation_checkpointing": True}, "24GB", marks=pytest.mark.slow),
        ({"precision": "bf16", "micro_batch_tokens": 8192, "max_length": 4096}, "80GB"),
        pytest.param(
            {"device": "cpu", "precision": "fp32", "micro_batch_tokens": 512, "max_length": 512},
            "48GiB",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_7b_base_fits_as_its_users_know(
    big_base: Path, make_recipe: MakeRecipe, training: dict[str, Any], fits: str
) -> None:
    memory = recipe_memory(make_recipe(training={"device": "auto", **training}), BaseFolder(big_base))
    size = parse_size(fits, place="")
    assert memory.text(size).count("\n") == 0
    assert memory.total <= memory.usable(size)
    assert memory.to_json(size)["fits"]
    # its weights alone are half of a device that is too small for all
    assert 2 * 7.248e9 * (1 if training["precision"] == "bf16" else 2) == pytest.approx(
        next(iter(memory.parts().values())), rel=0.01
    )


@pytest.mark.parametrize(
    ("sizes", "unquantised"),
    [
        pytest.param(BIG, "4%", marks=pytest.mark.slow),  # embeddings and head
        # the experts are no linear layers: of 46.7 billion numbers, the attention's 1.3 are in 4 bits
        (BIG | MIXTRAL, "97%"),
    ],
    ids=["dense", "experts"],
)
def test_what_a_base_in_4_bits_keeps_is_said(
    sizes: dict[str, Any], unquantised: str, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    skip_without_estimate(sizes["model_type"])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(sizes))
    recipe = make_recipe(lora={"target_modules": ["attention"]}, training={"device": "auto", "precision": "bf16"})
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"quantization": "nf4"})})
    parts = recipe_memory(recipe, BaseFolder(tmp_path / "base")).parts()
    name, size = next(iter(parts.items()))
    assert name == f"base in nf4, {unquantised} of its weights in bf16"
    assert size < 2 * 7.3e9 / 3 or unquantised == "97%"


def test_settings_that_need_less_are_named_the_least_harmful_first(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BIG | {"num_hidden_layers": 4}))
    sections = {"device": "auto", "precision": "fp32", "micro_batch_tokens": 16384, "max_length": 8192}
    memory = recipe_memory(make_recipe(training=sections), BaseFolder(tmp_path / "base"))
    found = [one.setting for one in memory.savings(parse_size("12GB", place=""))]
    assert [one.partition(":")[0].partition(" over")[0] for one in found][:4] == [
        "training.precision",
        "training.micro_batch_tokens",
        "training.activation_checkpointing",
        "sharding",
    ]
    text = memory.text(parse_size("12GB", place=""))
    assert "does not fit into 10.51 GiB" in text
    assert "training.precision: bf16: about " in text


def test_devices_that_share_a_base_gather_what_they_compute(big_base: Path, make_recipe: MakeRecipe) -> None:
    memory = recipe_memory(make_recipe(training={"device": "auto", "precision": "bf16"}), BaseFolder(big_base))
    # embeddings and head of 134 million values each, and two of the 32 layers of 218 million
    gathered = 2 * (2 * 134.2e6 + 2 * 218.1e6)
    whole, shared = (memory.need.total(0, shards=shards) for shards in (1, 8))
    assert shared == pytest.approx(whole / 8 + gathered * 7 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 1_500_000_000), ("512MiB", 2**29), ("7", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, place="") == size


@pytest.mark.parametrize("text", ["", "80 apples", "-1GB", "0GB", "GB", "1e9", "9" * 5000, "80GBGB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--device-memory: .*; expected a size, such as 80GB or 24GiB"):
        parse_size(text, place="--device-memory")


@pytest.mark.usefixtures("data_alone")
def test_check_reports_whether_a_recipe_fits(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_data(base, training={"max_length": 256, "micro_batch_tokens": 256})))
    assert main(["check", str(recipe), "--device-memory", "2GB"]) == 0
    assert f"{recipe}: memory: about " in capsys.readouterr().out
    assert main(["check", str(recipe), "--device-memory", "9MB", "--output-format", "json"]) == 1
    [memory] = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["path"], memory["fits"]) == (str(recipe), False)
    assert memory["bytes"] > memory["usable_bytes"] == 9_000_000
    assert memory["savings"]
    assert main(["check", str(base), "--device-memory", "2GB"]) == 2
    assert "--device-memory is for recipes" in capsys.readouterr().err


def test_a_run_begins_with_its_memory(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_data(base, training={"steps": 1})))
    assert main(["train", str(recipe)]) == 0
    first = capsys.readouterr().err.splitlines()
    [line] = [one for one in first if one.startswith("memory: ")]
    assert re.search(r"\(base in fp32 5 MiB, adapter, .* 0 MiB, 4096 tokens at once ", line)
    assert " MiB), of " in line
