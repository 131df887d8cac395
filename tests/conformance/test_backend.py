"""The backend that AutoTokenizer takes for a folder is reported, with all that it changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from check_outcomes import outcome_of
from derived_tekken import write_derived
from packaging.version import Version

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.checks import loaded
from pytest_mistral_lora.report import basis_lines

VERSION = transformers.__version__
TEKKEN_FIRST = Version(VERSION) >= Version("5.15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a small vocabulary, as transformers saves it, and Mistral's own file."""
    folder = tmp_path_factory.mktemp("checkpoint")
    CheckpointTokenizer(write_derived("derived-v13", folder, words=1000)).fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "mistral", "vocab_size": 2000}')
    return folder


@pytest.mark.skipif(not TEKKEN_FIRST, reason="this transformers does not look for tekken.json first")
def test_the_backend_of_a_folder_with_tekken_is_in_the_summary(folder: Path) -> None:
    facts = dict(loaded(Target("one", folder)).facts)
    [line] = basis_lines([outcome_of("one::tokenizer::x", facts=facts)])
    assert re.match(rf"backend of one: .*MistralCommonBackend .*transformers {re.escape(VERSION)}:", line)
    assert "return_assistant_tokens_mask is ignored" in line


def test_a_folder_without_it_is_loaded_from_its_own_files(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert loaded(Target("one", tmp_path)).facts == ()
