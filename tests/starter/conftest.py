from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Path:
    """The base that `init` is given."""
    return tiny_base
