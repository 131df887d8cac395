from __future__ import annotations

from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("guarded") / "base", shipped_tokenizer("spm-v3"))
