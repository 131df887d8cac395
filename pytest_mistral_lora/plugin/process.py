"""What a run that uses the suite changes in its process, up to its end, so that imports take less CPU time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import pytest

_COMPILED = (f"{__name__.partition('.')[0]}.", "hypothesis.")
"""How the names of modules begin that have no assertions to explain: this package's and Hypothesis's."""
_COLLECT_AFTER = 100_000
"""New objects after which the youngest are searched for garbage; 700 by default.

The libraries of the suite make millions of objects that stay. A tenth of the CPU time of a whole run is the search.
"""


class _CompiledModules:
    """Finds modules of plugins before pytest does, which would compile each anew for its assertions.

    In a fresh environment, as in CI, that is three seconds of CPU time for the 200 modules of the suite, and half a
    second for Hypothesis. Pip has compiled them already.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module that is taken as it is compiled; None for any other module."""
        return PathFinder.find_spec(name, path, target) if name.startswith(_COMPILED) else None


def speed_up_imports(config: pytest.Config) -> None:
    """Import the modules of the suite as Python compiled them, and collect garbage less often."""
    finder = _CompiledModules()
    sys.meta_path.insert(0, finder)
    config.add_cleanup(lambda: sys.meta_path.remove(finder))
    youngest, *older = gc.get_threshold()
    # a user may have switched it off, or chosen a larger number
    if 0 < youngest < _COLLECT_AFTER:
        gc.set_threshold(_COLLECT_AFTER, *older)
        config.add_cleanup(lambda: gc.set_threshold(youngest, *older))
