"""ms-swift: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.runners.configuration import Reading, as_written, short, values_in
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer

_STRATEGIES = {"last_round": "last-answer", "all": "everything"}
"""The strategies of `loss_scale` that are not its default, each with the turns that have a loss."""


class MsSwift(Trainer):
    """ms-swift."""

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return what `loss_scale` declares: a strategy, or weights by patterns of the text.

        By 4.6.0, `loss_scale/base.py` and `get_last_user_round` of `template/utils.py`: `last_round` begins behind the
        last message of the user or of a tool, so that it is the last turn, also where calls come before it. In 3.x it
        began behind the last message of the user. The names of `loss_scale/mapping.py` behind the strategy, such as
        `hermes`, give parts of an answer weights of their own.
        """
        written = settings.get("loss_scale")
        if written is None or written in ("default", "base", "default+base"):
            return None
        turns = _STRATEGIES.get(str(written).removesuffix("+base"))
        if turns is None:
            return Declaration(None, "loss_scale")
        return Declaration(Objective(turns), f"loss_scale: {as_written(written)}")

    def require_no_code(self, reading: Reading) -> None:
        """Refuse values that are options: the script gives a configuration as words of a command line."""
        for key, value in reading.made.data.items():
            for text in values_in(value):
                if isinstance(text, str) and text.lstrip().startswith("-"):
                    raise reading.refusal(key, f"`{short(text)}` would be an option of the command line")


MS_SWIFT = MsSwift.packaged(
    Path(__file__).parent,
    "ms-swift",
    "ms-swift",
    "swift",
    "swift sft",
    tasks=PreferenceTasks(
        ("dpo", "rm", "cpo", "simpo", "orpo"), ("kto",), key="rlhf_type", configs={"kto": "ms-swift-kto"}
    ),
)
