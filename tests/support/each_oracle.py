"""A property of every tokenizer, on the same generated rows: to make a row takes longer than to encode it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from derived_tekken import DERIVED, derived_oracle, tokenizer_named

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle

LAYOUTS = ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "tekken-cut")
"""A shipped tokenizer of each layout, and the first words of a Tekken file: a whole one takes a second to load."""
WITH_TOOLS = LAYOUTS[1:]
ALL = [*sorted(SHIPPED), *sorted(DERIVED)]
NEWER = sorted(set(DERIVED) - {"derived-v7"})
"""Tokenizers whose version is not shipped: their files are derived from a shipped vocabulary."""


@functools.cache
def oracle_named(name: str) -> Oracle:
    """Return the oracle of a shipped or a derived tokenizer, loaded once a process."""
    return derived_oracle(name) if name in DERIVED else Oracle(tokenizer_named(name))


def of_each(
    *names: str, made: Callable[[str], Any] = oracle_named
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a test, whose first parameter is the oracle, judge each example by all of the named tokenizers.

    Put it below `@given`, which then gives the other parameters. A failure has a note with the tokenizer's name.

    Args:
        names: The tokenizers.
        made: Returns the first argument for a name.
    """

    def decorate(judge: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(judge)
        def judge_each(*example: Any) -> None:
            for name in names:
                try:
                    judge(made(name), *example)
                except Exception as error:
                    error.add_note(f"with the tokenizer {name}")
                    raise

        signature = inspect.signature(judge)
        vars(judge_each)["__signature__"] = signature.replace(parameters=[*signature.parameters.values()][1:])
        return judge_each

    return decorate
