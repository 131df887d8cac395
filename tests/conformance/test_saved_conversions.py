"""A conversion that several tokenizer files share is saved and loaded once, and the template of each for itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer import ids
from pytest_mistral_lora.conformance.tokenizer.ids import save_and_load

PAIR = ("spm-v7", "spm-v7m1")


@pytest.fixture(autouse=True)
def nothing_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_CHANGES", type(ids._CHANGES)())


@pytest.fixture
def vocabularies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tokenizers that transformers loads."""
    sizes: list[int] = []
    load = transformers.AutoTokenizer.from_pretrained

    def noted(*given: Any, **more: Any) -> Any:
        loaded = load(*given, **more)
        sizes.append(len(loaded))
        return loaded

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", noted)
    return sizes


def found(target: Target) -> list[tuple[str, str, str]]:
    return [(finding.rule, finding.found, str(finding.place)) for finding in save_and_load(target)]


def test_files_with_one_vocabulary_are_saved_once_with_each_template(vocabularies: list[int]) -> None:
    targets = [Target(name) for name in PAIR]
    assert [found(target) for target in targets] == [[], []]
    assert vocabularies == [32768, 0, 0]


def test_a_token_that_is_lost_is_found_in_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    load = transformers.AutoTokenizer.from_pretrained

    def without_eos(*given: Any, **more: Any) -> Any:
        loaded = load(*given, **more)
        if len(loaded):
            loaded.eos_token = AddedToken("<s>", special=True)
        return loaded

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", without_eos)
    targets = [Target(name) for name in PAIR]
    for target in targets:
        place = str(shipped_tokenizer(target.name))
        assert found(target) == [("ML206", "eos_token changes by save and load", place)]


def test_a_template_that_changes_is_found_though_the_vocabulary_was_judged(tmp_path: Path) -> None:
    assert found(Target("spm-v7")) == []
    shutil.copy(shipped_tokenizer("spm-v7"), tmp_path)
    # a text file has no carriage returns when it is read again
    changed = [("ML206", "the chat template changes", str(tmp_path))]
    for template, expected in (("{{ 1 }}\n", []), ("{{ 1 }}\r\n", changed)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert found(Target("folder", tmp_path)) == expected
