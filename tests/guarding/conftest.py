from __future__ import annotations

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
def saved_base(base: Path) -> Path:
    """The tiny base with the files that AutoTokenizer loads, as every checkpoint has them."""
    BaseFolder(base).tokenizer().fast.save_pretrained(base.parent / "tokenizer")
    for file in (base.parent / "tokenizer").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    return base
