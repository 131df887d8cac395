"""A base without Mistral's own tokenizer file is trained on by the tokenizer that its vocabulary is recognised as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.errors import TokenizerError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import train


@pytest.fixture(scope="module")
def known_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the whole vocabulary, by which it is recognised."""
    folder = write_tiny_base(tmp_path_factory.mktemp("known") / "tiny", shipped_tokenizer("spm-v3"))
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_base(known_base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(known_base, tmp_path / "base"))
    (folder / "tokenizer.model.v3").unlink()
    return folder


def recipe(base: Path, folder: Path, **sections: dict[str, Any]) -> Recipe:
    folder.mkdir()
    write_rows(folder / "rows.jsonl")
    return parse_recipe(recipe_data(base, training={"steps": 2}, **sections), folder=folder)


def test_the_run_is_the_one_of_a_base_with_the_file(known_base: Path, saved_base: Path, tmp_path: Path) -> None:
    own, recognised = (
        train(recipe(base, tmp_path / name)).output for name, base in (("own", known_base), ("recognised", saved_base))
    )
    first, second = (dict(load(folder / "manifest.json").data) for folder in (own, recognised))
    assert first["lora"]["tensors_sha256"] == second["lora"]["tensors_sha256"]
    assert "x-oracle" not in first["tokenizer"]
    assert second["tokenizer"].pop("x-oracle").startswith("recognised as spm-v3: 32,768 of 32,768 ids")
    assert first["tokenizer"] == second["tokenizer"]
    assert (recognised / "tokenizer.model.v3").read_bytes() == (own / "tokenizer.model.v3").read_bytes()
    found = verify(recognised, base=saved_base)
    assert [one.name for one in found if one.state == "mismatch"] == []
    assert AdapterFolder(recognised, BaseFolder(saved_base)).encoder.tokenizer.oracle.version == "v3"


def test_a_base_whose_own_tokenizer_gives_other_ids_is_refused(saved_base: Path, tmp_path: Path) -> None:
    data = json.loads((saved_base / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Lowercase"}
    (saved_base / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=r"its tokenizer is not spm-v3: .* gets the ids"):
        train(recipe(saved_base, tmp_path / "run"))


def test_a_recipe_can_name_the_oracle(saved_base: Path, tmp_path: Path) -> None:
    data = recipe_data(saved_base)
    data["base"]["oracle"] = "spm-v2"
    (tmp_path / "rows.jsonl").write_text("")
    named = parse_recipe(data, folder=tmp_path)
    assert named.base.oracle == "spm-v2"
    assert named.as_written()["base"]["oracle"] == "spm-v2"
    with pytest.raises(TokenizerError, match="its tokenizer is not spm-v2"):
        train(named)
