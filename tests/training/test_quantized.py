"""A base in 4 bits, and AdamW with moments in 8 bits: where bitsandbytes is installed, on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4, unquantized_share
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.generate import probe
from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke
from pytest_mistral_lora.training.memory import FourBitLinear
from pytest_mistral_lora.training.recipe import Lora, parse_recipe
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.step.memory_need import LiveBytes

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.mistral_gpu, NO_CUDA])
pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # PyTorch's, when bitsandbytes is imported
]

Run = Callable[..., RunResult]


@pytest.fixture
def run_on(base: Path, tmp_path: Path) -> Run:
    write_rows(tmp_path / "rows.jsonl")

    def make(
        device: str, quantization: str | None, *, lora: dict[str, Any] | None = None, **training: Any
    ) -> RunResult:
        data = recipe_data(base, lora=lora or {}, training={"device": device, "logging_steps": 1, **training})
        if quantization:
            data["base"]["quantization"] = quantization
        return train(parse_recipe(data, folder=tmp_path))

    return make


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_base_in_four_bits_trains_to_a_sound_adapter(
    device: str, lora: dict[str, Any], run_on: Run, base: Path, tmp_path: Path
) -> None:
    result = run_on(device, "nf4", lora=lora, precision="bf16", steps=20, activation_checkpointing=True)
    losses = [line["loss"] for line in result.log]
    assert losses[-1] < losses[0] / 2
    assert result.manifest["training"]["quantization"] == "nf4"
    share = result.manifest["training"]["unquantized"]
    # two layers behind a vocabulary of 32,768
    assert 0.9 < share < 1
    said = f"nf4 ({share:.0%} of its values in bf16)"
    assert f"bf16 base in {said}" in (result.output / "DECISION.md").read_text()
    assert f"The base was in {said} " in (result.output / "README.md").read_text()
    assert {fact.state for fact in verify(result.output, base=base, dataset=tmp_path)} == {"match"}
    assert {finding.rule for finding in adapter_findings(result.output, base)} == ({"ML426"} if lora else set())


def test_loaded_afresh_the_base_is_in_four_bits_again(run_on: Run, base: Path, tmp_path: Path) -> None:
    result = run_on("cpu", "nf4", precision="fp32", steps=10)
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    spec = model_spec(result.output, base, device="cpu")
    assert smoke(spec, rows, max_new_tokens=1)["probe"]["sha256"] == result.probe.sha256
    judged = model_spec(result.output, base, device="cpu").load()
    assert probe(judged, result.data.train.encoded[:8]) == result.probe


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_linear_layers_alone_are_in_four_bits_and_nothing_is_upcast(base: Path, precision: Any) -> None:
    import bitsandbytes

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load_nf4(BaseFolder(base), precision, "cpu")
    model = attach_adapter(model, Lora(), adapted_layers(BaseFolder(base), ("attention",)), seed=0)
    packed = [name for name, one in model.named_modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == sum(".layers." in name for name in packed) == 2 * 7
    state = load_base(BaseFolder(base), precision, "cpu").state_dict()
    in_full = sum(tensor.numel() for name, tensor in state.items() if ".layers." not in name or "norm" in name)
    assert unquantized_share(model) == in_full / sum(tensor.numel() for tensor in state.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
        elif isinstance(parameter, bitsandbytes.nn.Params4bit):
            assert parameter.dtype == torch.uint8
            assert parameter.quant_state.nested
            assert parameter.quant_state.dtype == dtype
        else:
            assert parameter.dtype == dtype, name


def test_four_bits_change_the_logits_so_the_reload_test_can_fail(base: Path) -> None:
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        full, packed = (load(BaseFolder(base), "fp32", "cpu")(input_ids=ids).logits for load in (load_base, load_nf4))
    assert not torch.allclose(full, packed, atol=1e-2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.mistral_gpu, NO_CUDA])])
def test_moments_in_eight_bits_train(device: str, run_on: Run, base: Path, tmp_path: Path) -> None:
    result = run_on(device, None, lora={"r": 64}, optimizer="adamw_8bit", steps=20)
    losses = [line["loss"] for line in result.log]
    assert losses[-1] < losses[0] / 2
    assert "8-bit moments" in result.manifest["training"]["optimizer"]
    assert {fact.state for fact in verify(result.output, base=base, dataset=tmp_path)} == {"match"}


def test_a_layer_in_four_bits_keeps_what_the_estimate_of_memory_counts() -> None:
    from bitsandbytes.nn import Linear4bit

    real = Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    counted = torch.nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    counted.__class__ = FourBitLinear
    kept = []
    for layer in (real, counted):
        layer.weight.requires_grad = False
        given = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes([given, *layer.parameters(), *layer.buffers()]) as alive:
            output = layer(given)
            kept.append(alive.now)
            full, alive.most = alive.now + 2 * 256 * 512, alive.now
            output.sum().backward()
        assert alive.most > full
    # its output, and no input
    assert kept == [2 * 64 * 512] * 2
