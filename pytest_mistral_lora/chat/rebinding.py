"""Copies of a library's functions that read some of its module's names as others; the library itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def rebound(function: Any, **names: Any) -> Callable[..., Any]:
    """Return a copy of a Python function for which some names of its module are other objects.

    Args:
        function: The function; one without keyword-only defaults.
        names: The objects, by the names that the function reads.
    """
    given = {**function.__globals__, **names}
    return FunctionType(function.__code__, given, None, function.__defaults__, function.__closure__)
