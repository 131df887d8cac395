"""ms-swift: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.runners.configuration import Reading, short, values_in
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer


class MsSwift(Trainer):
    """ms-swift."""

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
