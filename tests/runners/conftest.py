from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.runners import HARNESS, TRAINERS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "spm-v3"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model.v3")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with the files that AutoTokenizer loads."""
    folder = write_tiny_base(tmp_path_factory.mktemp("trl") / "base", shipped_tokenizer("spm-v3"))
    BaseFolder(folder).tokenizer().fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return [
        parse_row(
            {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        )
        for n in range(4)
    ]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the scripts of all trainers and their harness modules, as they are in their own processes."""
    folders = {HARNESS, *(trainer.script.parent for trainer in TRAINERS.of_this_package())}
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in {file.stem for folder in folders for file in folder.glob("*.py")}:
        sys.modules.pop(name, None)
