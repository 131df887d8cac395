"""Fixtures for a user's own tests; heavy imports stand in their bodies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.records.goldens import Golden


@pytest.fixture(scope="session")
def mistral_tokenizer(pytestconfig: pytest.Config) -> CheckpointTokenizer:
    """The tokenizer under test (session): the first of `mistral_tokenizers`, else mistral-common's SentencePiece v3."""
    from pytest_mistral_lora.chat.oracle import shipped_tokenizer
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    given = pytestconfig.getoption("mistral_tokenizer") or pytestconfig.getini("mistral_tokenizers")
    if not given:
        return CheckpointTokenizer(shipped_tokenizer("spm-v3"))
    return CheckpointTokenizer(Path(pytestconfig.invocation_params.dir, given[0]))  # an ini path is absolute


@pytest.fixture(scope="session")
def mistral_oracle(mistral_tokenizer: CheckpointTokenizer) -> Oracle:
    """Mistral's own tokenization of the tokenizer under test (session)."""
    return mistral_tokenizer.oracle


@pytest.fixture(scope="session")
def mistral_encode(mistral_oracle: Oracle) -> Callable[[Any], EncodedRow]:
    """A function from a chat row (a mapping with `messages`) to its ids, labels and spans (session)."""
    return mistral_oracle.encode


@pytest.fixture(scope="session")
def mistral_golden(mistral_oracle: Oracle) -> Callable[[str], Golden]:
    """A function from the name of a packaged case to its golden for the tokenizer under test (session).

    It raises `InputError` for a tokenizer that has no packaged goldens, or a case that it does not have.
    """
    from pytest_mistral_lora.records.goldens import packaged_golden

    return lambda case: packaged_golden(mistral_oracle.sha256, case)
