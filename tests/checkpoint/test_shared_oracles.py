"""A tokenizer file is loaded once while its oracle is in use, and again if the file has changed."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import TokenizerError


def test_two_readers_of_one_file_share_its_oracle(tmp_path: Path) -> None:
    file = Path(shutil.copy(shipped_tokenizer("spm-v3"), tmp_path))
    first = CheckpointTokenizer(tmp_path).oracle
    assert CheckpointTokenizer(file).oracle is first
    # messages name the file of each
    other = tmp_path / "copy"
    other.mkdir()
    shutil.copy(file, other)
    assert CheckpointTokenizer(other).oracle.path == other / file.name


def test_a_changed_file_is_loaded_again(tmp_path: Path) -> None:
    file = Path(shutil.copy(shipped_tokenizer("spm-v3"), tmp_path))
    first = CheckpointTokenizer(tmp_path).oracle
    file.write_bytes(b"broken")
    with pytest.raises(TokenizerError):
        _ = CheckpointTokenizer(tmp_path).oracle
    shutil.copy(shipped_tokenizer("spm-v7"), file)
    assert CheckpointTokenizer(tmp_path).oracle.vocab_size == first.vocab_size
    assert CheckpointTokenizer(tmp_path).oracle is not first


def test_an_oracle_that_nothing_holds_takes_no_memory(tmp_path: Path) -> None:
    shutil.copy(shipped_tokenizer("spm-v3"), tmp_path)
    tokenizer = CheckpointTokenizer(tmp_path)
    held = weakref.ref(tokenizer.oracle)
    del tokenizer
    gc.collect()
    assert held() is None
