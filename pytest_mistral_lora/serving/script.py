"""A server that a script of the user's own asks: rows in, the ids of their prompts out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.serving.client import ServerClient
from pytest_mistral_lora.serving.server import ServedPrompt, Server, Strength


@dataclass(frozen=True)
class ScriptedServer(Server):
    """A server behind a script; the script is run once for all rows: see `conformance.server.script`.

    Attributes:
        file: The script.
    """

    file: Path
    name: ClassVar[str] = "script"
    strength: ClassVar[Strength] = "ids"
    remark: ClassVar[str] = "a script of your own"
    gives_answers: ClassVar[bool] = False

    @property
    def title(self) -> str:  # type: ignore[override]
        """The name of the script."""
        return self.file.name

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Refuse to ask for one row.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a script is run once for all rows")
