"""The optional parts of the package, by the extra that installs each, and the error for a missing part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from pytest_mistral_lora.errors import InputError

PACKAGE = "pytest-mistral-lora"


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional part of the package.

    Attributes:
        name: The name in `pip install 'pytest-mistral-lora[NAME]'`.
        modules: The modules that it installs, as Python imports them.
        gives: Its use, as the end of "to".
    """

    name: str
    modules: tuple[str, ...]
    gives: str

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install '{PACKAGE}[{self.name}]'"

    @property
    def missing(self) -> tuple[str, ...]:
        """Its modules that are not installed."""
        return tuple(module for module in self.modules if not is_installed(module))


EXTRAS: tuple[Extra, ...] = (
    Extra("train", ("torch", "peft", "accelerate"), "train, merge and run models, and compare adapters with a base"),
    Extra("parquet", ("pyarrow",), "read Parquet and Arrow files of rows"),
    Extra("near", ("rensa",), "find nearly equal rows"),
    Extra("guidance", ("llguidance",), "judge answers by the grammar that servers decode with"),
    Extra("serving", ("httpx",), "ask a server"),
    Extra("gguf", ("gguf",), "compare the numbers of a GGUF file"),
    Extra("qlora", ("bitsandbytes",), "train with a base in 4 bits, and with optimizers in 8 bits"),
    Extra("kernels", ("liger_kernel",), "train with Liger's kernels on a GPU"),
)
"""Every extra that a user installs, as `pyproject.toml` has them."""

_BY_MODULE = {module: extra for extra in EXTRAS for module in extra.modules}


class MissingExtraError(InputError):
    """A library of an extra is not installed (exit code 2).

    Args:
        module: The library, as Python imports it.

    Attributes:
        extra: The extra.
    """

    def __init__(self, module: str) -> None:
        self.extra: Extra = _BY_MODULE[module]
        super().__init__(
            f"{module.replace('_', '-')} is not installed",
            next_step=f"To {self.extra.gives}: {self.extra.command}",
        )


def is_installed(module: str) -> bool:
    """Return whether Python finds a module, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook or None in sys.modules blocks it
        return False


def extra(name: str) -> Extra:
    """Return an extra by its name."""
    return next(extra for extra in EXTRAS if extra.name == name)


def require_extra(name: str) -> None:
    """Refuse to go on without the libraries of an extra.

    Raises:
        MissingExtraError: For the first of its modules that is not installed.
    """
    for module in extra(name).missing:
        raise MissingExtraError(module)


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """Return the error for a user if an import failed because an extra is missing; None for every other error.

    Modules import their libraries where they need them, and catch nothing: each front asks here.
    """
    if not isinstance(error, ImportError):
        return None
    module = str(error.name or "").partition(".")[0]
    # without torch, transformers has a stand-in for each model class, which raises this on use
    if re.search(r"requires the PyTorch library|PyTorch is not installed", str(error)):
        module = "torch"
    if module not in _BY_MODULE or is_installed(module):
        return None
    found = MissingExtraError(module)
    found.__cause__ = error
    return found
