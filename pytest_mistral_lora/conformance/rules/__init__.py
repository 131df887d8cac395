"""The closed list of rules. An id never changes its meaning; help, pages, findings and tests are made from it."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules import (
    adapter,
    dataset,
    encoded,
    encoded_ids,
    encoded_labels,
    manifest,
    mask,
    template,
    tokenizer,
    train,
    transcript,
)
from pytest_mistral_lora.conformance.rules.rule import Rule, Severity

__all__ = ["RULES", "Rule", "Severity"]

_MODULES = (
    *(template, mask, tokenizer, train, adapter, dataset),
    *(encoded, encoded_ids, encoded_labels, manifest, transcript),
)

RULES = {rule.id: rule for module in _MODULES for rule in module.RULES}
"""Every rule, by id."""
