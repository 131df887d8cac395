"""Laws that hold our encoding to mistral-common's own front door: equal ids, and the same refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def reference_violation(row: Row, encoded: EncodedRow, oracle: Oracle) -> str:
    """The ids are those of mistral-common, called as its documentation does."""
    expected = oracle.reference(row)
    if encoded.input_ids == expected:
        return ""
    at = next(
        (n for n, pair in enumerate(zip(encoded.input_ids, expected, strict=False)) if pair[0] != pair[1]),
        min(len(encoded.input_ids), len(expected)),
    )
    return f"{len(encoded.input_ids)} ids; mistral-common gives {len(expected)}, and others from token {at} on"


def refusal_violation(row: Row, oracle: Oracle) -> str:
    """A row is refused exactly where mistral-common refuses it, and for the same reason."""
    if oracle.version == "v1" and row.tools:
        return ""  # mistral-common leaves the tools out without a word; here the row is refused
    theirs, ours = _refusal_of_reference(row, oracle), _refusal(row, oracle)
    if ours == theirs:
        return ""
    return f"{ours or 'nothing'} is raised; mistral-common raises {theirs or 'nothing'}"


def construction_violation(row: Row, oracle: Oracle) -> str:
    """Each token that mistral-common gives is known to come from one of its per-message encoders."""
    try:
        oracle.encode(row)
    except InputError:
        return ""
    except MistralLoraError as error:
        return error.found
    return ""


def _refusal_of_reference(row: Row, oracle: Oracle) -> str:
    try:
        oracle.reference(row)
    except Exception as error:  # mistral-common's, pydantic's, and bare assertions
        return type(error).__name__
    return ""


def _refusal(row: Row, oracle: Oracle) -> str:
    try:
        oracle.encode(row)
    except OracleRejection as error:
        return type(error.__cause__).__name__
    return ""
