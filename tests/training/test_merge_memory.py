"""The weights of a merge pass through memory one tensor at a time, however large the base and its files are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from forked import run_forked
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.training.adapter import peft_quiet

STATUS = Path("/proc/self/status")
MEASURED = """
import sys
from pathlib import Path

import torch

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.merge.plan import plan_merge
from pytest_mistral_lora.training.merge.plan import write_weights

torch.set_num_threads(1)
first, second = Path(sys.argv[3], "first"), Path(sys.argv[3], "second")
base, adapter = BaseFolder(Path(sys.argv[1])), AdapterFolder(Path(sys.argv[2]))
weights, tensors = base.weights, adapter.weights
changes = plan_merge(adapter, base)
first.mkdir(parents=True)
second.mkdir()


def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def growth(how):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = peak()
    how()
    return peak() - before


# the first pass also has the system map the code of the libraries, 25 MB of it under some kernels
write_weights(first, weights, tensors, changes, "float32")
streamed = growth(lambda: write_weights(second, weights, tensors, changes, "float32"))
whole = growth(lambda: {name: tensor.clone() for name, tensor in weights.items()})
print(streamed, whole)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of one file, and an adapter on all its layers."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
    config = MistralConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, head_dim=64, pad_token_id=None)
    with peft_quiet(), torch.no_grad():
        with torch.device("meta"):
            model = MistralForCausalLM(config)
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.zero_()  # to draw 34 million numbers takes longer than the merge
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


@pytest.mark.skipif(not STATUS.is_file(), reason="no /proc: a process does not know its peak")
def test_the_peak_is_far_below_the_size_of_the_model(large: tuple[Path, Path], tmp_path: Path) -> None:
    size = (large[0] / "model.safetensors").stat().st_size
    done = run_forked([sys.executable, "-c", MEASURED, *large, tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    streamed, whole = map(int, done.stdout.split())
    assert streamed < size / 4 < size / 2 < whole, f"{streamed / 1e6:.0f} and {whole / 1e6:.0f} of {size / 1e6:.0f} MB"
