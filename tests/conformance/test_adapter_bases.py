"""The base of an adapter: found or missing, unreadable, of another class, or changed by an initialisation."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_adapters import COMMIT, CONFIG, TENSORS, judged, rules
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM

from pytest_mistral_lora.errors import PinError

Save = Callable[..., Path]


def test_a_base_beside_the_folder_is_found_by_its_name(save: Save, base: Path) -> None:
    folder = save()
    shutil.copytree(base, folder.parent / "small")
    results = judged(folder, None)
    assert not any(result.not_checked or result.findings for result in results.values())


def test_a_base_is_found_in_the_cache_at_its_commit_and_nowhere_else(
    save: Save, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--base" / "snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    folder = save()
    config = {**json.loads((folder / CONFIG).read_text()), "base_model_name_or_path": "some/base"}
    (folder / CONFIG).write_text(json.dumps(config))
    assert not judged(folder, None)["changes-the-base"].not_checked
    (folder / CONFIG).write_text(json.dumps({**config, "revision": COMMIT[::-1]}))
    assert "is missing" in judged(folder, None)["changes-the-base"].not_checked
    (folder / CONFIG).write_text(json.dumps({**config, "revision": None}))
    assert "is missing" in judged(folder, None)["changes-the-base"].not_checked


def test_an_adapter_in_the_hubs_cache_may_link_to_its_blobs(save: Save, base: Path, tmp_path: Path) -> None:
    made = save()
    blobs = tmp_path / "models--some--adapter" / "blobs"
    snapshot = blobs.parent / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        shutil.copy(made / name, blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-of-{name}")
    assert rules(judged(snapshot, base)) == set()


def test_a_base_that_cannot_be_read_is_an_error_of_its_own(save: Save, base: Path, tmp_path: Path) -> None:
    folder = save()
    with pytest.raises(PinError, match=r"config\.json"):
        judged(folder, tmp_path)
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PinError, match="does not load"):
        judged(folder, broken)


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}]
)
def test_on_a_quantised_base_all_but_the_effect_is_judged(
    quantization: dict[str, Any], save: Save, base: Path, tmp_path: Path
) -> None:
    folder, other = save(), Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    results = judged(folder, other)
    assert rules(results) == set()
    unchecked = {name: result.not_checked for name, result in results.items() if result.not_checked}
    assert unchecked.keys() == {"changes-the-base"}
    assert unchecked["changes-the-base"].startswith(f"{other} is quantised")


@pytest.mark.parametrize("architecture", ["VoxtralForConditionalGeneration", "GptOssForCausalLM"])
def test_names_are_not_checked_on_a_base_of_another_architecture(
    architecture: str, save: Save, base: Path, tmp_path: Path
) -> None:
    folder, other = save(), Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(PinError, match=rf"the base is \['{architecture}'\]; expected one of Mistral"):
        judged(folder, other)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    results = judged(folder, None)
    assert rules(results) == set()
    assert all(architecture in results[case].not_checked for case in ("tensors-complete", "configuration"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "two"},
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"num_attention_heads": 0, "head_dim": None},
        {"vocab_size": 10**30},
    ],
)
def test_a_base_of_impossible_size_is_refused_at_once(
    change: dict[str, Any], save: Save, base: Path, tmp_path: Path
) -> None:
    folder, other = save(), Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PinError, match="other"):
        judged(folder, other)


@pytest.mark.parametrize("head", ["base_model.model.model.language_model", "base_model.model.language_model.model"])
def test_without_a_base_an_adapter_of_a_model_with_images_is_not_checked(head: str, save: Save) -> None:
    folder = save()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    renamed = {name.replace("base_model.model.model", head): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "somebody/elsewhere"}))
    results = judged(folder, None)
    assert rules(results) == set()
    assert "is not of a MistralForCausalLM" in results["tensors-complete"].not_checked


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("scale", [pytest.param(8, marks=pytest.mark.slow), 32])
def test_a_base_that_an_initialisation_changed_is_told_from_the_plain_one(
    start: str, scale: int, base: Path, tmp_path: Path
) -> None:
    """Real PEFT: the adapter after some steps, the plain base, the run's own base, and the converted adapter."""
    settings = {"r": 4, "lora_alpha": scale // 2, "target_modules": ["q_proj", "down_proj"], "revision": COMMIT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=start, **settings))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        for _ in range(5):
            model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        own = model.unload()
        own.config.architectures = ["MistralForCausalLM"]
        own.save_pretrained(tmp_path / "own")
    assert rules(judged(tmp_path / "adapter", base)) == {"ML423"}
    assert rules(judged(tmp_path / "adapter", tmp_path / "own")) == set()
    assert rules(judged(tmp_path / "plain", base)) == set()


def test_an_initialisation_that_leaves_no_trace_is_not_checked(save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "lora_ga"}))
    results = judged(folder, base)
    assert rules(results) == set()
    assert "needs a base of its own" in results["initial-base"].not_checked
