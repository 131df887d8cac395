"""Hypothesis strategies for chat rows: plain JSON data that Mistral's own validation accepts.

`rows()` is accepted by every tokenizer version, `tool_rows()` by every version from v2 on, `tool_rows(parallel=True)`
from v3 on, `fim_rows()` by every tokenizer with `[SUFFIX]` and `[PREFIX]`; both sides of `pairs()` are accepted as rows
are. Every strategy shrinks to short ASCII.
"""

from pytest_mistral_lora.strategies.row_strategies import conversations, fim_rows, messages, pairs, rows, tool_rows
from pytest_mistral_lora.strategies.texts import CONTROL_LITERALS, hostile_text, plain_text

__all__ = [
    "CONTROL_LITERALS",
    "conversations",
    "fim_rows",
    "hostile_text",
    "messages",
    "pairs",
    "plain_text",
    "rows",
    "tool_rows",
]
