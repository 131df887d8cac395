"""A sample of a test's parameters for each run; the rest is run by the sweeps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], kept: Collection[str]) -> list[Any]:
    """Return parameters, named by their text; each that is not kept is marked slow.

    Args:
        values: The parameters.
        kept: The texts of those that every run tests.
    """
    texts = {str(value): value for value in values}
    missing = set(kept) - texts.keys()
    assert not missing, f"no parameters any more: {missing}"
    return [
        pytest.param(value, id=text, marks=() if text in kept else pytest.mark.slow) for text, value in texts.items()
    ]
