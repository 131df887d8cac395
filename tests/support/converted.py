"""Tokenizers that several test modules read, converted once a process: a Tekken file takes seconds."""

from __future__ import annotations

import functools

from derived_tekken import tokenizer_named

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer


@functools.cache
def converted_tokenizer(name: str) -> CheckpointTokenizer:
    """Return a shipped or a derived tokenizer by name. A test that changes it must load its own."""
    return CheckpointTokenizer(tokenizer_named(name))
