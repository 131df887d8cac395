"""The laws of an encoded row, on a user's own rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.mask.laws import LAWS, Law

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

ON_EVERY_ROW = frozenset({"ML101", "ML102", "ML103", "ML104", "ML105", "ML107", "ML109", "ML110"})
"""Rules of the laws that look at one encoding; the others encode the row again, and are left to Hypothesis."""


def law_findings(row: Row, encoded: EncodedRow, oracle: Oracle) -> Iterator[Finding]:
    """Yield the laws that a row's encoding breaks.

    Args:
        row: The row.
        encoded: mistral-common's encoding of it.
        oracle: Mistral's own tokenization.
    """
    version = int(oracle.version[1:])
    for law in LAWS:
        if law.rule in ON_EVERY_ROW and version >= int(law.since[1:]) and _speaks_of(law, row):
            violation = law.violation(row, encoded, oracle)
            if violation:
                yield Finding(law.rule, violation, row.place)


def _speaks_of(law: Law, row: Row) -> bool:
    tools = bool(row.tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in row.messages)
    weights = any(message["role"] == "assistant" and not weight_of(message) for message in row.messages)
    return (law.rows == "tools" or not tools) and (law.rows == "weights" or not weights)
