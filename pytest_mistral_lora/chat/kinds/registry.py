"""The kinds of records, by name: those of this package, and those that another package registers.

Each module of this package that has a kind is one. No module is named here: without it, its kind is not there.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module

from pytest_mistral_lora.chat import kinds
from pytest_mistral_lora.chat.rows import RecordKind, imported


def _packaged() -> dict[str, RecordKind]:
    """Return the kinds of this package: the object of each module that is found under its importable name."""
    modules = [f"{kinds.__name__}.{module.name}" for module in pkgutil.iter_modules(kinds.__path__)]
    found = [
        value
        for module in modules
        # this one, and the one that stands on it
        if module not in (__name__, f"{kinds.__name__}.records")
        for value in vars(import_module(module)).values()
        if isinstance(value, RecordKind) and value.importable.startswith(f"{module}:")
    ]
    return {kind.name: kind for kind in sorted(found, key=lambda kind: kind.order)}


KINDS: dict[str, RecordKind] = _packaged()
"""The kinds of records, by name, in the order in which they are asked."""


def kind_names() -> tuple[str, ...]:
    """Return the importable name of each kind."""
    return tuple(kind.importable for kind in KINDS.values())


def register_kinds(importable: Iterable[str]) -> None:
    """Add kinds by their importable names, `package.module:ATTRIBUTE`; one that is registered already stays.

    The processes that judge parts of a file are given the names of all kinds.
    """
    found = [*KINDS.values(), *(kind for kind in map(imported, importable) if kind.name not in KINDS)]
    KINDS.clear()
    KINDS.update((kind.name, kind) for kind in sorted(found, key=lambda kind: kind.order))
