from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from derived_tekken import DERIVED, derived_oracle

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer


@functools.cache
def _load(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[str], Oracle]:
    return _load


@pytest.fixture(scope="session", params=sorted(SHIPPED))
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return _load(request.param)


@pytest.fixture(scope="session", params=sorted(set(SHIPPED) - {"spm-v1"}))
def oracle_with_tools(request: pytest.FixtureRequest) -> Oracle:
    return _load(request.param)


@pytest.fixture(scope="session", params=sorted(set(DERIVED) - {"derived-v7"}))
def newer_name(request: pytest.FixtureRequest) -> str:
    """The name of a tokenizer whose version is not shipped: its file is derived from a shipped vocabulary."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def newer_oracle(newer_name: str) -> Oracle:
    return derived_oracle(newer_name)
