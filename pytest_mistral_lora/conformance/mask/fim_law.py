"""The law of an encoded fill-in-the-middle row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.fim import FIM, FIM_ROLES, FimRow
from pytest_mistral_lora.conformance.mask.row_laws import as_decoded

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def fim_violation(row: FimRow, encoded: EncodedRow, oracle: Oracle) -> str:
    """Return how an encoding differs from mistral-common's and the row's texts; empty if it does not."""
    texts = {span.role: span for span in encoded.spans if span.kind == "text"}
    for role in FIM_ROLES:
        span = texts.get(role)
        ids = encoded.input_ids[span.start : span.end] if span else ()
        # SentencePiece writes a space in front of the prompt, and leaves it out when it decodes
        decoded = oracle.decode(ids) if role == "prompt" else FIM.answer_text(oracle, ids)
        text = as_decoded(getattr(row, role), oracle)
        if decoded != text:
            return f"the {role} decodes to {decoded!r}; its text is {text!r}"
    markers = [oracle.control_tokens[token] for token in encoded.input_ids if token in oracle.control_tokens]
    if markers != ["<s>", "[SUFFIX]", "[PREFIX]", "</s>"]:
        return f"the control tokens are {' '.join(markers)}"
    return ""
