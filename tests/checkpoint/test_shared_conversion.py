"""Two tokenizer files with one vocabulary are converted once, and each gets a tokenizer of its own."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import write_cut
from transformers import AddedToken

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint import shared_conversion
from pytest_mistral_lora.checkpoint.shared_conversion import converted_once
from pytest_mistral_lora.checkpoint.tokenizers import _converted


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Oracle]:
    """The conversions that are made; none is kept from an earlier test."""
    monkeypatch.setattr(shared_conversion, "_CONVERTED", type(shared_conversion._CONVERTED)())
    return []


def convert(oracle: Oracle, conversions: list[Oracle]) -> Any:
    def counted() -> Any:
        conversions.append(oracle)
        return _converted(oracle)

    return converted_once(oracle, counted)


def two_files(kind: str, folder: Path) -> list[Path]:
    """Return two files of one vocabulary."""
    if kind == "spm":
        return [shipped_tokenizer(name) for name in ("spm-v7", "spm-v7m1")]
    folders = [folder / name for name in "ab"]
    for each in folders:
        each.mkdir()
    return [write_cut(each, words=2000) for each in folders]


@pytest.mark.parametrize("kind", ["spm", "tekken"])
def test_a_pair_of_files_is_converted_once_into_what_transformers_makes(
    kind: str, conversions: list[Oracle], tmp_path: Path
) -> None:
    oracles = [Oracle(path) for path in two_files(kind, tmp_path)]
    first, second = (convert(oracle, conversions) for oracle in oracles)
    assert conversions == [oracles[0]]
    alone = _converted(oracles[1])
    assert second.backend_tokenizer.to_str() == alone.backend_tokenizer.to_str()
    assert second.special_tokens_map == alone.special_tokens_map
    assert {**second.init_kwargs, "name_or_path": ""}.keys() == {**alone.init_kwargs, "name_or_path": ""}.keys()
    if oracles[1].kind == "tekken":
        assert second.vocab_file == alone.vocab_file == str(oracles[1].path)
    # each is the caller's own
    first.add_tokens([AddedToken("<mine>", special=True)])
    first.backend_tokenizer.enable_truncation(3)
    assert "<mine>" not in second.get_vocab()
    assert second.backend_tokenizer.truncation is None
    assert "<mine>" not in convert(oracles[0], conversions).get_vocab()
    assert conversions == [oracles[0]]


def test_a_file_with_another_vocabulary_is_converted_anew(conversions: list[Oracle]) -> None:
    kept = [convert(Oracle(shipped_tokenizer(name)), conversions) for name in ("spm-v2", "spm-v3")]
    assert [oracle.version for oracle in conversions] == ["v2", "v3"]
    assert len(kept) == 2


def test_a_conversion_that_nobody_holds_is_not_kept(conversions: list[Oracle], tmp_path: Path) -> None:
    copied = tmp_path / "tokenizer.model.v1"
    shutil.copy(shipped_tokenizer("spm-v1"), copied)
    made = convert(Oracle(shipped_tokenizer("spm-v1")), conversions)
    assert convert(Oracle(copied), conversions) is not made
    assert len(conversions) == 1
    del made
    gc.collect()
    assert not shared_conversion._CONVERTED
