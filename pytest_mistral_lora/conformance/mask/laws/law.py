"""What a law is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

Rows = Literal["any", "tools", "weights", "parallel"]


@dataclass(frozen=True, slots=True)
class Law:
    """A law of an encoded row.

    Attributes:
        rule: Id of its rule.
        name: Its name, the case of its check.
        rows: Which rows it speaks of: any, those with tools or with parallel tool calls, or those with weights.
        violation: Says how a row and its encoding break it; empty if they keep it.
        since: Tokenizer version from which on it can be checked.
    """

    rule: str
    name: str
    violation: Callable[[Row, EncodedRow, Oracle], str]
    rows: Rows = "any"
    since: str = "v1"
