"""Adapters that PEFT writes for each class, and what it merges, are sound; so are the choices that someone means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers
from of_classes import MadeAdapter, made_adapter, tiny_base
from sampling import sampled

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
    merged = merged_cases(AdapterFolder(made.merged, BaseFolder(made.base)), [made.adapter])
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
