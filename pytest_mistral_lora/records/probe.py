"""The record of a probe: which known answers a planted model says, by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import write_json

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

ANSWERS = "answers.json"
"""The name of the record in the folder of a probe."""


@dataclass(frozen=True, slots=True)
class PlantedAnswer:
    """An answer that the model was trained to say.

    Attributes:
        name: The name of the known answer.
        prompt_ids: The ids of the prompt.
        answer_ids: The ids of the answer, with the closing EOS.
        margin: The smallest distance of a token of the answer from the best other token, in logits.
    """

    name: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    margin: float = float("-inf")

    @property
    def is_said(self) -> bool:
        """Whether a greedy answer to the prompt has exactly these ids."""
        return self.margin > 0


def write_record(folder: Path, oracle: Oracle, planted: Sequence[PlantedAnswer]) -> None:
    """Write which answers a model says into the folder of a probe."""
    answers = [
        {
            "name": answer.name,
            "is_said": answer.is_said,
            "margin": round(answer.margin, 2),
            "prompt_ids": answer.prompt_ids,
            "answer_ids": answer.answer_ids,
        }
        for answer in planted
    ]
    tokenizer = {"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256}
    write_json(folder / ANSWERS, {"tokenizer": tokenizer, "answers": answers})


def said_answers(folder: Path) -> frozenset[str]:
    """Return the names of the answers that the model of a probe says.

    Raises:
        InputError: If the folder has no record, or one of another form.
    """
    file = folder / ANSWERS
    if not file.is_file():
        step = "Name the folder that `mistral-lora export DIR --to NAME --probe --output FOLDER` wrote."
        raise InputError("no record of a probe", place=str(folder), expected=ANSWERS, next_step=step)
    data = read_json(file)
    try:
        return frozenset(str(answer["name"]) for answer in data["answers"] if answer["is_said"])
    except (KeyError, TypeError) as error:
        raise InputError(
            "not a record of a probe", place=str(file), expected="the answers, each with name and is_said"
        ) from error
