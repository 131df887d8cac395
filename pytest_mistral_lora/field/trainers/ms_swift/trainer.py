"""ms-swift: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.trainers.ms_swift.going_on import GOING_ON
from pytest_mistral_lora.formats.containers import open_source
from pytest_mistral_lora.runners.configuration import Reading, as_written, short, values_in
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer

_STRATEGIES = {"last_round": "last-round", "all": "everything"}
"""The strategies of `loss_scale` that are not its default, each with the turns that have a loss."""
_ROUND_BEHIND_TOOLS = "4.5.3"
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
        # here: the list of trainers in a verb's help imports nothing heavy
        from packaging.version import Version

        from pytest_mistral_lora.programs.facts.entries import release_of

        behind_tools = Version(_ROUND_BEHIND_TOOLS)
        if turns == "last-round" and (release_of(self.version) or behind_tools) >= behind_tools:
            turns = "last-answer"
        return Declaration(Objective(turns), f"loss_scale: {as_written(written)}")

    def with_own_data(self, declared: Declaration | None, settings: Mapping[str, Any]) -> Declaration | None:
        """Return a declaration, without an objective if a message of the data has a loss against it, or a part of one.

        By `loss_scale/base.py`, `loss: true` of an answer gives it the loss that `last_round` takes away, and
        `loss_scale` of an answer is its weight.
        """
        is_last = declared is not None and declared.objective is not None and declared.objective.is_of_turns
        for messages in _conversations(settings.get("dataset")):
            answers = [message for message in messages if message.get("role") == "assistant"]
            if is_last and any(answer.get("loss") for answer in answers[:-1]):
                return Declaration(None, "loss")
            if any(answer.get("loss_scale") not in (None, 0, 1) for answer in answers):
                return Declaration(None, "loss_scale")
        return declared

    def require_no_code(self, reading: Reading) -> None:
        """Refuse values that are options: the script gives a configuration as words of a command line."""
        for key, value in reading.made.data.items():
            for text in values_in(value):
                if isinstance(text, str) and text.lstrip().startswith("-"):
                    raise reading.refusal(key, f"`{short(text)}` would be an option of the command line")


def _conversations(dataset: Any) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the messages of each record of the files that `dataset` names; those that cannot be read are left out."""
    for name in dataset if isinstance(dataset, list) else [dataset]:
        # behind it is the number of records to draw
        file = Path(str(name).partition("#")[0])
        with suppress(InputError, OSError):
            for record in open_source(file).records(lambda read: None) if file.is_file() else ():
                messages = record.value.get("messages") if isinstance(record.value, Mapping) else None
                yield [message for message in messages or () if isinstance(message, Mapping)]


MS_SWIFT = MsSwift.packaged(
    Path(__file__).parent,
    "ms-swift",
    "ms-swift",
    "swift",
    "swift sft",
    going_on=GOING_ON,
    tasks=PreferenceTasks(
        ("dpo", "rm", "cpo", "simpo", "orpo"), ("kto",), key="rlhf_type", configs={"kto": "ms-swift-kto"}
    ),
)
