"""Subject `encoded`: rows that any trainer encoded, against mistral-common; and the closed table of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FILE_CLASSES: Mapping[str, str] = {"ML501": "unreadable-line", "ML507": "row-refused"}
"""Lines that cannot be judged."""

ORDER_CLASSES: Mapping[str, str] = {
    "ML502": "row-dropped",
    "ML503": "row-doubled",
    "ML504": "row-order",
    "ML505": "row-changed",
}
"""The rows of a file against their source."""

TEXT_CLASSES: Mapping[str, str] = {"ML506": "supervised-text-lost"}
"""The supervised texts of a whole file against its assistants' texts."""

PACKING_CLASSES: Mapping[str, str] = {
    "ML510": "padding-trained",
    "ML511": "padding-inside",
    "ML512": "position-ids",
    "ML513": "packed-attention-mask",
    "ML514": "packed-boundary-trained",
    "ML515": "packed-conversation-lost",
    "ML516": "packed-order",
    "ML517": "packed-mask-numbers",
    "ML518": "positions-run-on",
    "ML519": "padding-attended",
    "ML552": "token-hidden",
}
"""Padding, and several conversations in one sequence."""

ID_CLASSES: Mapping[str, str] = {
    "ML520": "id-out-of-vocabulary",
    "ML521": "bos",
    "ML522": "eos",
    "ML523": "control-token-injection",
    "ML524": "control-token-as-text",
    "ML525": "system-prompt-dropped",
    "ML526": "system-prompt-misplaced",
    "ML527": "system-prompt-invented",
    "ML528": "spacing",
    "ML529": "text-whitespace",
    "ML530": "tool-format",
    "ML531": "truncated",
    "ML532": "other-tokenizer",
    "ML533": "turns",
    "ML534": "text-changed",
    "ML535": "other-conversation",
    "ML553": "eos-surplus",
    "ML554": "character-changed",
    "ML555": "calls-split",
    "ML556": "ascii-escapes",
    "ML557": "key-order",
    "ML558": "arguments-padded",
}
"""`input_ids` against mistral-common's."""

LABEL_CLASSES: Mapping[str, str] = {
    "ML540": "labels-length",
    "ML541": "labels-shifted",
    "ML542": "label-of-another-token",
    "ML543": "everything-trained",
    "ML544": "nothing-trained",
    "ML545": "first-token-masked",
    "ML546": "eos-masked",
    "ML547": "prompt-trained",
    "ML548": "tool-call-marker-masked",
    "ML549": "weight-ignored",
    "ML550": "wrong-span",
    "ML551": "answer-masked",
    "ML559": "masks-contradict",
}
"""`labels` against the assistant's tokens."""

CLASSES: Mapping[str, str] = {
    **FILE_CLASSES,
    **ORDER_CLASSES,
    **TEXT_CLASSES,
    **PACKING_CLASSES,
    **ID_CLASSES,
    **LABEL_CLASSES,
}
"""The name of each class in reports, by its rule."""


@dataclass(frozen=True, slots=True)
class EncodingFault:
    """A broken rule of a row or a line, before it becomes a finding with a place.

    Attributes:
        rule: Id of the rule, a key of `CLASSES`.
        found: The value or tokens that break it.
        expected: The value that keeps it; empty if the rule's title is enough.
    """

    rule: str
    found: str
    expected: str = ""
