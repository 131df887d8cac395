"""Fill-in-the-middle rows: the text before a gap, the text after it, and the text that fills it.

A row is `{"prompt": …, "suffix": …, "completion": …}`, as Codestral's API names the first two. It has no turns and no
chat layout: mistral-common encodes it as `[SUFFIX]`, the suffix, `[PREFIX]`, the prompt, and the completion follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.fields import FIM_KEYS, ROW_KEYS, check_text, error_at, kind_of, refuse_keys
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place

FIM_ROLES = ("suffix", "prompt", "completion")
"""The parts of a fill-in-the-middle row, in the order of their ids."""


@dataclass(frozen=True, slots=True, eq=False)
class FimRow(Row):
    """A fill-in-the-middle row.

    Its `messages` are its three texts with the roles of `FIM_ROLES`, so that whatever reads the texts of a row reads
    all of them. No chat template and no request of a chat has these roles: nothing takes the row for a conversation.
    """

    @classmethod
    def of(cls, prompt: str, suffix: str, completion: str, *, place: Place = NOWHERE) -> FimRow:
        """Return the row of three texts.

        Args:
            prompt: The text before the gap.
            suffix: The text after it; empty at the end of a file.
            completion: The text that fills it.
            place: The place of the row.
        """
        texts = zip(FIM_ROLES, (suffix, prompt, completion), strict=True)
        return cls(tuple({"role": role, "content": text} for role, text in texts), place=place)

    @property
    def suffix(self) -> str:
        """The text after the gap."""
        return str(self.messages[0]["content"])

    @property
    def prompt(self) -> str:
        """The text before the gap."""
        return str(self.messages[1]["content"])

    @property
    def completion(self) -> str:
        """The text that fills the gap, which is trained on."""
        return str(self.messages[2]["content"])

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, fit for one line of a dataset."""
        return {key: getattr(self, key) for key in FIM_KEYS}

    def prompt_json(self) -> dict[str, Any]:
        """Return what the completion follows, as plain JSON data."""
        return {"prompt": self.prompt, "suffix": self.suffix}

    def assistant_groups(self) -> list[list[int]]:
        """Return the index of the completion: the one text that the model writes."""
        return [[FIM_ROLES.index("completion")]]

    def content_field(self, index: int) -> str:
        """Return the key of a text, for places."""
        return FIM_ROLES[index]


def is_fim(record: Mapping[str, Any]) -> bool:
    """Return whether a record is a fill-in-the-middle row, by its keys: a suffix is in no other row."""
    return all(record.get(key) is not None for key in FIM_KEYS)


def parse_fim_row(data: Any, *, place: Place = NOWHERE) -> FimRow:
    """Check plain JSON data and return it as a fill-in-the-middle row.

    Raises:
        RowError: With the field and the value, if the data is not such a row.
    """
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {kind_of(data)}", place=place, expected='an object with "prompt" and "suffix"')
    refuse_keys(data, place)
    for key in ROW_KEYS:
        if data.get(key) is not None:
            raise error_at(place / key, "beside a suffix", "a row of turns, or prompt, suffix and completion")
    for key in FIM_KEYS:
        if data.get(key) is None:
            raise RowError(f'no "{key}"', place=place, expected=f'a text under "{key}"')
        check_text(data[key], place / key)
    return FimRow.of(*(data[key] for key in FIM_KEYS), place=place)
