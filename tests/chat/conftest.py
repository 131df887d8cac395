from __future__ import annotations

from collections.abc import Callable

import pytest
from each_oracle import NEWER, WITH_TOOLS, oracle_named
from sampling import sampled

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle

# its assertions explain themselves as those of a test do
pytest.register_assert_rewrite("encoding_laws")


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[str], Oracle]:
    return oracle_named


@pytest.fixture(
    scope="module", params=sampled(sorted(SHIPPED), ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "tekken-240718"))
)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return oracle_named(request.param)


@pytest.fixture(scope="module", params=WITH_TOOLS)
def oracle_with_tools(request: pytest.FixtureRequest) -> Oracle:
    return oracle_named(request.param)


@pytest.fixture(scope="module", params=sampled(NEWER, ("derived-v11", "derived-v13-thinking", "derived-v15-schema")))
def newer_name(request: pytest.FixtureRequest) -> str:
    """The name of a tokenizer whose version is not shipped: its file is derived from a shipped vocabulary."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def newer_oracle(newer_name: str) -> Oracle:
    return oracle_named(newer_name)
