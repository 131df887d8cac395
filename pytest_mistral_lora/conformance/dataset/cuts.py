"""What a recipe does with rows that are too long or teach nothing, and what that removes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.policy import Fault, Policy
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import RowError

_FAULTS = {"no-labels": "ML606", "nothing-supervised": "ML605", "too-long": "ML607"}


def fault_finding(fault: Fault, error: RowError, encoded: EncodedRow, cut: Mapping[str, int]) -> Finding:
    """Return why a row is refused as a finding, with what a cut would remove of a row that is too long."""
    detail = error.next_step
    if fault == "too-long":
        detail = f"a cut would remove {_listed(cut)}"
        if cut["supervised tokens"] == encoded.supervised_tokens:
            detail += "; nothing that is trained on would be left"
    return Finding(_FAULTS[fault], error.found, error.place, error.expected, detail)


def _listed(cut: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in cut.items() if number)


_CHANGES = {
    "too-long": "dropped: {tokens} tokens, more than training.max_length = {max_length}",
    "nothing-supervised": "dropped: no token is trained on",
    "cut": "cut to training.max_length = {max_length}, without {cut}",
    "without-loss": "kept, though no token is trained on",
}


def changes(row: Row, encoded: EncodedRow, policy: Policy, cut: Mapping[str, int]) -> Iterator[tuple[str, Finding]]:
    """Yield what the policies of a recipe do to a row that they do not refuse: its name, and a note of it."""
    for change in policy.apply(encoded).changes:
        known = {"tokens": len(encoded.input_ids), "max_length": policy.max_length, "cut": _listed(cut)}
        yield change, Finding("ML620", _CHANGES[change].format(**known), row.place)


def beyond(row: Row, encoded: EncodedRow, layout: EncodedRow, max_length: int, version: str) -> dict[str, int]:
    """Return how many of what is beyond `max_length` tokens: what a cut would remove.

    Args:
        row: The row.
        encoded: What is trained on.
        layout: mistral-common's encoding, whose spans say who owns a token; `encoded` where there is none.
        max_length: Tokens that a cut would leave.
        version: Tokenizer version.
    """
    labels = (encoded.labels or ())[:max_length]
    closing = [span for span in layout.spans if span.kind == "eos" and span.end > max_length]
    start = _system_start(row, layout, version)
    return {
        "tokens": len(encoded.input_ids) - max_length,
        "supervised tokens": encoded.supervised_tokens - sum(label != IGNORE_INDEX for label in labels),
        "closing </s>": len(closing),
        "system prompt": int(start is not None and start >= max_length),
    }


def _system_start(row: Row, layout: EncodedRow, version: str) -> int | None:
    """Return where the system prompt begins, if there is one: up to v3 it is in the text of a user's turn."""
    if all(message["role"] != "system" for message in row.messages):
        return None
    role = "user" if version in ("v1", "v2", "v3") else "system"
    starts = [span.start for span in layout.spans if span.role == role and span.kind == "text"]
    return starts[0 if version not in ("v2", "v3") else -1] if starts else None
