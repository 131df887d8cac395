"""Each fault of the table is planted by a test, and no test plants one that the table lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from planted_faults import PLANTED


def names_of(planted_by: str) -> set[str]:
    """Return the first arguments with which a test is run; empty for one without arguments of its own."""
    module, _, function = planted_by.rpartition(".")
    marks = getattr(getattr(import_module(module), function), "pytestmark", [])
    return {name for mark in marks if mark.name == "parametrize" for name in _values(mark.args[1])}


def _values(given: Any) -> Iterator[str]:
    for value in given:
        # `pytest.param`
        yield value if isinstance(value, str) else value.values[0]


@pytest.mark.parametrize("name", PLANTED)
def test_a_test_plants_each_fault(name: str) -> None:
    planted = names_of(PLANTED[name].planted_by)
    assert not planted or name in planted


def test_each_planted_fault_is_in_the_table() -> None:
    tests = {fault.planted_by for fault in PLANTED.values()}
    extra = {name for test in tests for name in names_of(test)} - PLANTED.keys()
    # the noise of a dtype is no fault, and has one member in the table
    assert extra == {"bf16", "f16"}


def test_what_is_found_has_words_for_its_cause() -> None:
    for fault in PLANTED.values():
        assert bool(fault.rules) == bool(fault.says), fault
        assert all(re.fullmatch(r"ML\d{3}", rule) for rule in fault.rules)
