from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from peft_adapters import save_adapter
from small_mistral import write_small_mistral


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 ids and two layers; a test that changes it copies it first."""
    return write_small_mistral(tmp_path_factory.mktemp("hub") / "small")


@pytest.fixture
def save(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save an adapter of the checkpoint by PEFT, with the settings of `save_adapter`."""
    return partial(save_adapter, base, tmp_path / "adapter")
