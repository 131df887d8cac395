"""Rules of the subject `dataset`: every row of a recipe's files."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

RULES = (
    Rule(
        "ML601",
        "Every row can be read, is a chat row, and is accepted by mistral-common.",
        "dataset",
        "A trainer drops such a row, or trains on something else.",
        "Correct the row; the field and the value are named.",
        "mistralai/mistral-common#148",
    ),
)
