from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings, collect
from pytest_mistral_lora.conformance.targets import named_targets


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(2, None, "cpu", True, (), False, tmp_path)


def test_a_tokenizer_that_two_targets_have_is_judged_once(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model.v3")
    copied = shutil.copytree(folder, tmp_path / "copy")
    named = named_targets(tokenizers=[folder, copied / ".." / "base", copied])
    checks = {check.name: check for check in collect(named, settings)}
    for case in ("tokenizer::file", "tokenizer::bos-eos-unk", "mask::bos-once"):
        results = [checks[f"{name}::{case}"].run() for name in ("base", "base-2", "copy")]
        assert results[1] is results[0], case
        assert results[2] is not results[0], case


def test_a_check_that_cannot_be_made_says_so_for_each_target(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "tokenizer.model.v3").write_bytes(b"no tokenizer")
    checks = collect(named_targets(tokenizers=[tmp_path, tmp_path]), settings)
    files: list[Check] = [check for check in checks if check.case == "vocabulary"]
    assert [finding.rule for check in files for finding in check.run().findings] == ["ML201", "ML201"]
