"""Adapters that PEFT writes for each class, and what it merges, are sound; so are the choices that someone means."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from of_classes import MadeAdapter, made_adapter, tiny_base
from peft import PeftModel
from safetensors.torch import save_file
from sampling import sampled
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.checks import cases
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.merged.checks import cases as merged_cases
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

TEXTS = [name for name, one in TEXT_MODELS.items() if hasattr(transformers, one.name)]
WRAPPED = [f"wrapped-{name}" for name in TEXTS if TEXT_MODELS[name].has_oracle and name != "mixtral"]
# plain, latent and wrapped attention; an older transformers lacks the newer classes
SAMPLE = [name for name in ("mistral", "mistral4", "wrapped-ministral3") if name in (*TEXTS, *WRAPPED)]
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def kinds(name: str) -> str:
    """Return a pattern of the attention of a class, in the text's layers."""
    attention = TEXT_MODELS[name.removeprefix("wrapped-")].attention
    tower = r"model\.language_model" if name.startswith("wrapped-") else "model"
    return rf"{tower}\.layers\.\d+\.self_attn\.({'|'.join(attention)})"


def judged(made: MadeAdapter) -> Mapping[str, Result]:
    folder = AdapterFolder(made.adapter, BaseFolder(made.base))
    return {name: judge() for name, judge in cases(folder).items()}


def fired(results: Mapping[str, Result]) -> list[str]:
    return [finding.text() for result in results.values() for finding in result.findings]


@pytest.mark.of_field
@pytest.mark.parametrize("name", sampled([*TEXTS, *WRAPPED], SAMPLE))
def test_an_adapter_of_the_attention_is_sound(name: str) -> None:
    results = judged(made_adapter(name, kinds(name)))
    # kv_b_proj of latent attention is sound, and vLLM applies no adapter of it
    note = ["ML427"] if "kv_b_proj" in kinds(name) else []
    assert [finding.rule for result in results.values() for finding in result.findings] == note
    assert [result.not_checked for result in results.values() if result.not_checked] == []


@pytest.mark.parametrize("name", sampled([*TEXTS, *WRAPPED], SAMPLE))
def test_a_merge_of_it_is_sound(name: str) -> None:
    made = made_adapter(name, kinds(name))
    folder, adapter = (AdapterFolder(path, BaseFolder(made.base)) for path in (made.merged, made.adapter))
    merged = merged_cases(folder, [adapter])
    assert fired({case: judge() for case, judge in merged.items() if "of-base" not in case}) == []


@pytest.mark.parametrize(
    ("name", "targets", "seen_images"),
    [
        pytest.param("mistral", ("o_proj",), False, marks=pytest.mark.slow),
        pytest.param("mistral", r".*\.o_proj", False, marks=pytest.mark.slow),
        ("mistral", r"model\.layers\.1\.self_attn\.(?!k_proj|o_proj)\w_proj", False),
        ("mistral", "all-linear", False),
        ("mixtral", NAMES, False),
        pytest.param("wrapped-mistral", NAMES, True, marks=pytest.mark.slow),  # trained on images, too
        ("wrapped-mistral", r".*\.language_model\..*_proj", False),
    ],
)
def test_what_someone_means_is_sound(name: str, targets: str | tuple[str, ...], seen_images: bool) -> None:
    assert fired(judged(made_adapter(name, targets, seen_images=seen_images))) == []


def test_the_layers_that_a_pattern_leaves_out_on_purpose_are_not_missed(tmp_path: Path) -> None:
    made = made_adapter("mistral", r".*\.self_attn\.(q|k|v|o)_proj")
    file = tmp_path / "adapter_config.json"
    for path in made.adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads(file.read_text())
    pattern = r"(?!.*\.(?:q_a_proj|mlp)).*\.(q|k|v|o)_proj"
    file.write_text(json.dumps({**config, "target_modules": pattern}))
    assert fired(judged(MadeAdapter(made.base, tmp_path, made.merged))) == []


TOP, INNER = "tie_word_embeddings", "text_config.tie_word_embeddings"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("top", "inner"), [(True, True), (True, False), (False, True), (False, False), (None, None), (None, True)]
)
def test_each_level_of_a_tie_is_held_to_the_file(
    tied: bool, top: bool | None, inner: bool | None, tmp_path: Path
) -> None:
    """As transformers saves a merge of a base without the key: true at the top, false within, a head in the file."""
    for file in tiny_base("wrapped-mistral", tied=tied).iterdir():
        (tmp_path / file.name).hardlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, value in ((config, top), (config["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part.update({} if value is None else {"tie_word_embeddings": value})
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    findings = merged_cases(AdapterFolder(tmp_path, BaseFolder(tmp_path)))["tie"]().findings
    given = {TOP: top, INNER: inner}
    lies = [key for key, value in given.items() if value is not None and value != tied]
    if tied and top is inner is None:
        lies = [TOP]  # a file without a head needs the flag
    assert [finding.found.split()[0] for finding in findings] == lies
    assert {finding.rule for finding in findings} <= {"ML436"}


def with_experts_apart(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Write an adapter on attention and experts as transformers 4 has them, and return its tensors."""
    config = json.loads((base / "config.json").read_text())
    width, inner, rank = config["hidden_size"], config["intermediate_size"], 2
    heads = config["num_attention_heads"] * (config.get("head_dim") or width // config["num_attention_heads"])
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}"
        sizes = {"self_attn.q_proj": (width, heads)}
        for expert in range(config["num_local_experts"]):
            experts = {"w1": (width, inner), "w2": (inner, width), "w3": (width, inner)}
            sizes |= {f"block_sparse_moe.experts.{expert}.{name}": size for name, size in experts.items()}
        for name, (inputs, outputs) in sizes.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=drawn) / 10
            tensors[f"{prefix}.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=drawn) / 10
    targets = ["q_proj", "w1", "w2", "w3"]
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**lora, "base_model_name_or_path": str(base)}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def test_experts_of_transformers_4_are_judged_as_the_installed_peft_loads_them(tmp_path: Path) -> None:
    base = tiny_base("mixtral")
    tensors = with_experts_apart(tmp_path, base)
    made = MadeAdapter(base, tmp_path, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    # huggingface/peft#3009: before 0.19, one that runs beside transformers 5 loads the attention alone
    is_whole = any(".experts." in name and ".lora_B." in name for name, _ in model.named_parameters())
    errors = {
        finding.rule for result in judged(made).values() for finding in result.findings if finding.severity == "error"
    }
    assert errors == (set() if is_whole else {"ML401", "ML409"})
    for name in [name for name in tensors if ".experts.1.w2." in name]:
        del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    # joined, the experts that are left have another rank
    found = {finding.rule for result in judged(made).values() for finding in result.findings}
    assert found & {"ML401", "ML404"}
