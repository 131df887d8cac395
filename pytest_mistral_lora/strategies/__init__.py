"""Hypothesis strategies for chat rows: plain JSON data that Mistral's own validation accepts.

`rows()` is accepted by every tokenizer version, `tool_rows()` by every version from v2 on, `tool_rows(parallel=True)`
from v3 on, `fim_rows()` by every tokenizer with `[SUFFIX]` and `[PREFIX]`; both sides of `pairs()` are accepted as rows
are. Every strategy of rows shrinks to short ASCII. `objectives()` generates what labels are judged by.
"""

from pytest_mistral_lora.strategies.row_strategies import (
    conversations,
    fim_rows,
    messages,
    objectives,
    pairs,
    rows,
    tool_rows,
)
from pytest_mistral_lora.strategies.texts import CONTROL_LITERALS, hostile_text, plain_text

__all__ = [
    "CONTROL_LITERALS",
    "conversations",
    "fim_rows",
    "hostile_text",
    "messages",
    "objectives",
    "pairs",
    "plain_text",
    "rows",
    "tool_rows",
]
