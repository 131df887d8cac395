"""A sample of a test's parameters for each run; the rest is run by the sweeps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled_case(*values: Any, name: str, is_kept: bool) -> Any:
    """Return the parameters of one case of a table; a case that is not kept is marked slow."""
    return pytest.param(*values, id=name, marks=() if is_kept else pytest.mark.slow)


def sampled(values: Iterable[Any], kept: Collection[str]) -> list[Any]:
    """Return parameters, named by their text; each that is not kept is marked slow.

    Args:
        values: The parameters.
        kept: The texts of those that every run tests.
    """
    texts = {str(value): value for value in values}
    missing = set(kept) - texts.keys()
    assert not missing, f"no parameters any more: {missing}"
    return [sampled_case(value, name=text, is_kept=text in kept) for text, value in texts.items()]
