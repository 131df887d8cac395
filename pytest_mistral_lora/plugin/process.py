"""What a run that uses the suite changes in its process, up to its end, so that imports take less CPU time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest

_PACKAGE = f"{__name__.partition('.')[0]}."
_COLLECT_AFTER = 100_000
"""New objects after which the youngest are searched for garbage; 700 by default.

The libraries of the suite make millions of objects that stay. A tenth of the CPU time of a whole run is the search.
"""


class _CompiledModules:
    """Finds the modules of this package before pytest does, which would compile each anew for its assertions.

    In a fresh environment, as in CI, that is three seconds of CPU time for the 200 modules of the suite. They have no
    assertions to explain, and pip has compiled them already.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module of this package; None for any other module."""
        return PathFinder.find_spec(name, path, target) if name.startswith(_PACKAGE) else None


def speed_up_imports(config: pytest.Config) -> None:
    """Import the modules of this package as Python compiled them, and collect garbage less often."""
    finder = _CompiledModules()
    sys.meta_path.insert(0, finder)
    config.add_cleanup(lambda: sys.meta_path.remove(finder))
    youngest, *older = gc.get_threshold()
    # a user may have switched it off, or chosen a larger number
    if 0 < youngest < _COLLECT_AFTER:
        gc.set_threshold(_COLLECT_AFTER, *older)
        config.add_cleanup(lambda: gc.set_threshold(youngest, *older))
