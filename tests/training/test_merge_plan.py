"""What becomes of each tensor: held to PEFT's own merge in float32, and refused where no sum is known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_plans import OPTIONS, planned, write_adapter, write_base
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.weights import INDEX, Weights, weight_files, write_safetensors
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.training.adapter import base_tensors, peft_quiet
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.generate import load_adapted
from pytest_mistral_lora.training.merge.folders import merge_dtype, require_full_weights
from pytest_mistral_lora.training.merge.plan import write_weights
from pytest_mistral_lora.training.merge.proof import float32_sums


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("small") / "base")


def merged(adapter: Path, base: Path, folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    folder.mkdir()
    weights = Weights(weight_files(base))
    write_weights(folder, weights, Weights([adapter / ADAPTER_TENSORS]), planned(adapter, base), dtype)
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def by_peft(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    with peft_quiet():
        return base_tensors(
            PeftModel.from_pretrained(load_base(BaseFolder(base), "fp32", "cpu"), adapter).merge_and_unload()
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_the_weights_of_pefts_merge(small: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = write_adapter(tmp_path / "adapter", small, **options)
    found, expected = merged(adapter, small, tmp_path / "out"), by_peft(adapter, small)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    before = load_file(small / "model.safetensors")
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == planned(adapter, small).keys()


def test_a_tied_base_stays_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", base)
    found, expected = merged(adapter, base, tmp_path / "out"), by_peft(adapter, base)
    assert "lm_head.weight" not in found
    assert found.keys() == load_file(base / "model.safetensors").keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}],
)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_one_of_two_tied_matrices_cannot_be_changed(tmp_path: Path, options: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", base, **options)
    with pytest.raises(InputError, match="embed_tokens and lm_head"):
        planned(adapter, base)


def test_the_shards_of_the_base_are_those_of_the_merged_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    adapter = write_adapter(tmp_path / "adapter", base)
    found, expected = merged(adapter, base, tmp_path / "out", "bfloat16"), by_peft(adapter, base)
    assert [file.name for file in weight_files(tmp_path / "out")] == [file.name for file in weight_files(base)]
    assert len(weight_files(base)) > 3
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "out"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"] == {**before["metadata"], "total_size": before["metadata"]["total_size"] // 2}
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].bfloat16())
    (tmp_path / "out" / "config.json").write_bytes((base / "config.json").read_bytes())
    loaded = base_tensors(load_base(BaseFolder(tmp_path / "out"), "fp32", "cpu"))
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in found.items())


def test_a_pipe_counts_the_tensors_every_few_seconds(small: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", small)
    weights, tensors = Weights(weight_files(small)), Weights([adapter / ADAPTER_TENSORS])
    pipe, seconds = StringIO(), count()
    (tmp_path / "out").mkdir()
    # each look at the clock takes a second
    display = RunDisplay(pipe, clock=lambda: float(next(seconds)))
    write_weights(tmp_path / "out", weights, tensors, planned(adapter, small), "float32", display)
    lines = pipe.getvalue().splitlines()
    assert 1 < len(lines) < len(weights) / 2
    assert all(re.fullmatch(rf"\d:\d\d:\d\d \d+ of {len(weights)} tensors", line) for line in lines)


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / ADAPTER_TENSORS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_TENSORS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STRANGER = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(FIRST), f"{FIRST} is missing; expected the 12 tensors"),
        (lambda tensors: tensors.update({STRANGER: torch.ones(4, 32)}), f"{STRANGER} has no place in a merged model"),
        (lambda tensors: tensors.update({FIRST: torch.ones(3, 32)}), r"has shape \(3, 32\); expected \(4, 32\)"),
        (lambda tensors: tensors.update({FIRST: torch.ones(4, 31)}), r"has shape \(4, 31\); expected \(4, 32\)"),
    ],
)
def test_an_odd_tensor_is_an_error(small: Path, tmp_path: Path, change: Any, said: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", small)
    rewrite(adapter, change)
    with pytest.raises(InputError, match=said):
        planned(adapter, small)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["embed_tokens"]}, "PEFT's Embedding; expected LoRA, rsLoRA or DoRA"),
        ({"bias": "all"}, "bias is 'all'; expected none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ["nothing"]}, "PEFT refuses it on this base: Target modules"),
        ({"r": 0}, "r is 0; expected the rank"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]; expected null"),
        ({"use_dora": True}, r"lora_magnitude_vector is missing, and 5 more"),
    ],
)
def test_what_has_no_known_sum_is_refused(small: Path, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", small)
    edit(adapter / "adapter_config.json", **config)
    with pytest.raises(InputError, match=said):
        planned(adapter, small)


def test_weights_that_are_not_the_configurations_are_found(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    name = "model.layers.2.self_attn.v_proj.weight"
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, name: torch.ones(8, 32)}, base / "model.safetensors")
    with pytest.raises(InputError, match=r"shape \(16, 32\); expected \(8, 32\), as model\.layers\.2"):
        planned(adapter, base)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, base / "model.safetensors")
    with pytest.raises(InputError, match=f"changes {name}; expected a tensor of"):
        planned(adapter, base)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sums_are_in_float32_on_coarse_weights(
    tmp_path: Path, precision: Any, options: dict[str, Any], tied: bool
) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    adapter = write_adapter(tmp_path / "adapter", base, **options)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        model = load_adapted(AdapterFolder(adapter), BaseFolder(base), precision, "cpu")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with float32_sums(model):
            found = model(input_ids=ids).logits
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model(input_ids=ids).logits.dtype == before["base_model.model.model.embed_tokens.weight"].dtype
        assert torch.equal(found, model.float()(input_ids=ids).logits)


@pytest.mark.parametrize("number", [torch.nan, 1e6])
def test_numbers_that_the_dtype_does_not_have_are_refused(tmp_path: Path, number: float) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    rewrite(adapter, lambda tensors: tensors[FIRST].fill_(number))
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj\.weight is not finite in torch\.float16"):
        merged(adapter, base, tmp_path / "out", "float16")


def test_a_base_that_is_not_full_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    weights = Weights(weight_files(base))
    require_full_weights(BaseFolder(base))
    edit(base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match=r"the base is quantised \(gptq\).*--dequantise"):
        require_full_weights(BaseFolder(base))
    edit(base / "config.json", quantization_config=None)
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="has an adapter in its folder"):
        require_full_weights(BaseFolder(base))
    (base / "adapter_config.json").unlink()
    first = weights.files[0]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, first)
    with pytest.raises(InputError, match=f"{name} is in I8, and .* expected full weights: float32, bfloat16"):
        require_full_weights(BaseFolder(base))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, first)
    with pytest.raises(InputError, match=f"{name} is not where the index says"):
        require_full_weights(BaseFolder(base))


def test_the_bases_dtype_is_that_of_its_weights(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype="bfloat16")
    edit(base / "config.json", dtype="float32", torch_dtype="float32")
    assert merge_dtype(BaseFolder(base), Weights(weight_files(base)), "base") == "bfloat16"
    assert merge_dtype(BaseFolder(base), Weights(weight_files(base)), "float16") == "float16"
    with pytest.raises(InputError, match="--dtype: 'int8'; expected base or one of float32"):
        merge_dtype(BaseFolder(base), Weights(weight_files(base)), "int8")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(32)}, base / "model.safetensors")
    assert merge_dtype(BaseFolder(base), Weights(weight_files(base)), "base") == "float32"
    edit(base / "config.json", dtype="float16", torch_dtype="float16")
    with pytest.raises(InputError, match=r"are in bfloat16 and float32. Choose with --dtype"):
        merge_dtype(BaseFolder(base), Weights(weight_files(base)), "base")


def test_a_file_that_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).bfloat16(), "é": torch.tensor(2.0).bfloat16(), "a": torch.ones(0).bfloat16()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", shapes, "bfloat16", tensors.__getitem__)
    read, weights = load_file(tmp_path / "x.safetensors"), Weights([tmp_path / "x.safetensors"])
    assert list(weights) == list(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x.safetensors", {}, "bfloat16", tensors.__getitem__)
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"y.safetensors: . is in x.safetensors too"):
        Weights([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
