"""A second, independent mask: read off the control tokens of ids that mistral-common made.

Use it on such ids only: their text never holds a control id. On ids of a chat template, users can forge a turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle

_OPENS = ("[INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[MODEL_SETTINGS]")
_CLOSES = ("[/INST]", "[/AVAILABLE_TOOLS]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]", "[/MODEL_SETTINGS]")


def scan_labels(input_ids: Sequence[int], oracle: Oracle) -> tuple[int, ...] | None:
    """Return labels for ids of mistral-common's, every answer trained on; None for v1, which has no such tokens.

    Args:
        input_ids: The ids of one row, BOS included.
        oracle: The tokenizer that made them.

    Returns:
        As many labels as ids: `IGNORE_INDEX` if there is no loss, otherwise the id.
    """
    if oracle.version == "v1":
        return None
    opens = {token for token, literal in oracle.control_tokens.items() if literal in _OPENS}
    closes = {token for token, literal in oracle.control_tokens.items() if literal in _CLOSES}
    labels: list[int] = []
    inside = False
    for token in input_ids:
        inside = inside or token in opens
        answers = not inside and token != oracle.bos_id
        labels.append(token if answers else IGNORE_INDEX)
        inside = inside and token not in closes
    return tuple(labels)
