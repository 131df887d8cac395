"""The laws of an encoded row, each a function that says how a row breaks it, or nothing.

They are checked on generated rows (subject `mask`) and can be checked on any row and encoding.
"""

from __future__ import annotations

from pytest_mistral_lora.conformance.mask.laws.law import Law
from pytest_mistral_lora.conformance.mask.laws.masks import (
    bos_violation,
    eos_violation,
    owner_violation,
    partition_violation,
    scan_violation,
    whole_turn_violation,
)
from pytest_mistral_lora.conformance.mask.laws.pairs import (
    arguments_violation,
    longer_violation,
    neighbours_violation,
    order_violation,
    prompt_violation,
    stability_violation,
    strict_violation,
    weight_violation,
)
from pytest_mistral_lora.conformance.mask.laws.texts import (
    injection_violation,
    spoken_text_violation,
    system_violation,
    tool_call_violation,
)
from pytest_mistral_lora.conformance.mask.laws.turns import spoken_groups
from pytest_mistral_lora.conformance.mask.laws.verdict import (
    construction_violation,
    reference_violation,
    refusal_violation,
)

__all__ = ["LAWS", "Law", "construction_violation", "refusal_violation", "spoken_groups", "spoken_text_violation"]

LAWS = (
    Law("ML101", "labels-are-what-spans-say", partition_violation, "weights"),
    Law("ML102", "only-the-assistant-is-supervised", owner_violation, "tools"),
    Law("ML103", "whole-turns-are-supervised", whole_turn_violation, "weights"),
    Law("ML104", "every-turn-ends-with-eos", eos_violation, "weights"),
    Law("ML105", "bos-once", bos_violation),
    Law("ML106", "text-never-becomes-control", injection_violation),
    Law("ML107", "two-masks-agree", scan_violation, "tools", since="v2"),
    Law("ML108", "weights-change-no-id", weight_violation, "weights"),
    Law("ML109", "supervised-text-is-what-is-said", spoken_text_violation),
    Law("ML110", "tool-calls-are-supervised", tool_call_violation, "tools", since="v2"),
    Law("ML111", "encoding-is-stable", stability_violation, "tools"),
    Law("ML112", "prompt-is-the-beginning", prompt_violation, "tools"),
    Law("ML113", "arguments-in-any-form", arguments_violation, "tools", since="v2"),
    Law("ML114", "strict-changes-no-id", strict_violation, "tools", since="v2"),
    Law("ML115", "results-in-any-order", order_violation, "parallel", since="v11"),
    Law("ML116", "neighbours-are-one-turn", neighbours_violation, "weights"),
    Law("ML117", "another-turn-keeps-the-labels", longer_violation, "tools"),
    Law("ML118", "system-prompt-is-there", system_violation, "tools"),
    Law("ML119", "ids-are-mistral-commons", reference_violation, "tools"),
)
"""Every law, in the order of its rule."""
