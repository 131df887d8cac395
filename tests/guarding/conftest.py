from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("guarded") / "base", shipped_tokenizer("spm-v3"))


@pytest.fixture(scope="module")
def saved_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with the files that AutoTokenizer loads, as every checkpoint has them.

    It is a copy: from such files, a tokenizer is loaded in half a second, and the other tests share a conversion.
    """
    folder = tmp_path_factory.mktemp("saved") / "base"
    shutil.copytree(base, folder)
    BaseFolder(base).tokenizer().fast.save_pretrained(folder)
    return folder
