"""The rows of fill-in-the-middle: three texts."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.places import NOWHERE, Place

FIM_KEYS = ("prompt", "suffix", "completion")
"""The keys of a fill-in-the-middle row, in the order of its JSON."""

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
        return cls(
            tuple({"role": role, "content": text} for role, text in texts),
            place=place,
            kind=imported(f"{__package__}:FIM"),
        )

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
