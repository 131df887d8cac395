"""ms-swift: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.programs.facts.entries import release_of
from pytest_mistral_lora.runners.configuration import Reading, as_written, short, values_in
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer

_STRATEGIES = {"last_round": "last-round", "all": "everything"}
"""The strategies of `loss_scale` that are not its default, each with the turns that have a loss."""
_ROUND_BEHIND_TOOLS = Version("4.5.3")
"""The first version whose last round begins behind the last result of a tool, too, so that it is the last turn."""


class MsSwift(Trainer):
    """ms-swift."""

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return what `loss_scale` declares: a strategy, or weights by patterns of the text.

        By `loss_scale/base.py`, `last_round` begins behind the message that `get_last_user_round` of
        `template/utils.py` finds: up to 4.5.2 the last one of the user, and then the last one of the user or of a tool.
        The names of `loss_scale/mapping.py` behind the strategy, such as `hermes`, weigh parts of an answer.
        """
        written = settings.get("loss_scale")
        if written is None or written in ("default", "base", "default+base"):
            return None
        turns = _STRATEGIES.get(str(written).removesuffix("+base"))
        if turns is None:
            return Declaration(None, "loss_scale")
        if turns == "last-round" and (release_of(self.version) or _ROUND_BEHIND_TOOLS) >= _ROUND_BEHIND_TOOLS:
            turns = "last-answer"
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
