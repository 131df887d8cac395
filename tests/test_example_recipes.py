"""The recipes to copy: each is accepted for a tiny checkpoint of its class, with a tokenizer of its version."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from derived_tekken import write_derived
from packaging.version import Version
from sampling import sampled
from write_recipe_memory import DIMENSIONS, comment, configurations, memory, row, write_base

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture, architecture_of
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.training.memory import recipe_memory
from pytest_mistral_lora.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
THINKING = {"type": "thinking", "thinking": "Two and two."}
CHECKPOINTS: dict[str, tuple[Architecture, bool, str]] = {
    "mistral-7b-v0.3": (Architecture(TEXT_MODELS["mistral"]), False, "spm-v3"),
    "nemo-12b": (Architecture(TEXT_MODELS["mistral"]), False, "tekken-240718"),
    "small-3.2-24b": (Architecture(TEXT_MODELS["mistral"], is_wrapped=True), False, "derived-v11"),
    "ministral-3-3b": (Architecture(TEXT_MODELS["ministral3"], is_wrapped=True), True, "derived-v13"),
    "ministral-3-8b": (Architecture(TEXT_MODELS["ministral3"], is_wrapped=True), False, "derived-v13"),
    "devstral-small-2-24b": (Architecture(TEXT_MODELS["ministral3"], is_wrapped=True), False, "derived-v13"),
    "magistral-small-24b": (Architecture(TEXT_MODELS["mistral"], is_wrapped=True), False, "derived-v13-thinking"),
}
"""The class, the tie and the tokenizer of each checkpoint."""


def test_every_recipe_is_listed_and_tried() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == CHECKPOINTS.keys() == configurations().keys()
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[([\w.-]+)\.yaml\]\(\1\.yaml\)", page, flags=re.MULTILINE)) == names
    for name in names:
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert "Not run on the published weights." in text
        assert f"check {name}.yaml" in text


@pytest.mark.parametrize("name", sampled(CHECKPOINTS, ("mistral-7b-v0.3", "ministral-3-3b", "magistral-small-24b")))
def test_a_recipe_is_accepted_for_its_class(name: str, tmp_path: Path) -> None:
    architecture, tied, tokenizer = CHECKPOINTS[name]
    if Version(version("transformers")) < Version(architecture.text.since or "0"):
        pytest.skip(f"{architecture.title} needs transformers {architecture.text.since}")
    derived = tokenizer.startswith("derived-")
    source = write_derived(tokenizer, tmp_path, words=2000) if derived else shipped_tokenizer(tokenizer)
    data: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    base = write_tiny_base(tmp_path / data["base"]["path"], source, architecture=architecture, tied=tied)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").replace("0" * 64, BaseFolder(base).weights_sha256)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    answer = [THINKING, {"type": "text", "text": "4"}] if "thinking" in tokenizer else "4"
    rows = [ROW, {"messages": [{"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": answer}]}]
    # enough rows that the share of held-out ones has some
    rows += [
        {"messages": [{**ROW["messages"][0], "content": f"{n} + 2?"}, {"role": "assistant", "content": f"{n + 2}"}]}
        for n in range(3, 200)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(1, None, "cpu", True, (), False, tmp_path)
    checks = list(collect(NamedPaths(recipes=[tmp_path / "recipe.yaml"]).targets(), settings))
    found = [one.run() for one in checks if one.subject == "dataset"]
    assert len(found) > 5
    errors = [finding for result in found for finding in result.findings if finding.severity == "error"]
    assert [finding.text() for finding in errors] == []
    # the tiny model fits; of the published one, the same call needs its config.json alone
    assert ": fits into " in recipe_memory(load_recipe(tmp_path / "recipe.yaml"), BaseFolder(base)).text(80 * 10**9)


def _needs(name: str) -> None:
    since = CHECKPOINTS[name][0].text.since
    if Version(version("transformers")) < Version(since or "0"):
        pytest.skip(f"its class needs transformers {since}")


@pytest.mark.parametrize("name", sampled(CHECKPOINTS, ("ministral-3-3b",)))
def test_the_memory_on_the_page_is_the_estimate_from_the_dimensions(name: str) -> None:
    _needs(name)
    found = memory(name)
    assert row(name, found) in (RECIPES / "README.md").read_text(encoding="utf-8")
    assert comment(found) in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert "; fits " in comment(found)


@pytest.mark.parametrize("name", ["ministral-3-3b", "devstral-small-2-24b", "magistral-small-24b"])
def test_the_dimensions_give_the_size_of_the_published_weights(name: str, tmp_path: Path) -> None:
    _needs(name)
    config, entry = configurations()[name], json.loads(DIMENSIONS.read_text(encoding="utf-8"))["recipes"][name]
    assert CHECKPOINTS[name][0] == architecture_of(config)
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == CHECKPOINTS[name][1]
    size = 0
    for tensor, parameter in BaseFolder(write_base(tmp_path, name)).empty_model().named_parameters():
        in_text = "language_model" in tensor or tensor.startswith("lm_head")
        packed = (
            "quantization_config" in config and tensor.endswith("_proj.weight") and "language_model.layers" in tensor
        )
        tied = CHECKPOINTS[name][1] and tensor.startswith("lm_head")
        if not tied and (in_text or entry["published"].get("part") != "text model"):
            size += parameter.numel() * (1 if packed else 2)
    assert size / 1e9 == pytest.approx(entry["published"]["gigabytes"], rel=0.01)
