"""The commands of a trainer that take preferences, and the one that a run is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import RecordKind


@dataclass(frozen=True, slots=True)
class PreferenceTasks:
    """The commands of a trainer that take preferences, in the trainer's own words; the first of each is its default.

    Attributes:
        pairs: Those that take a chosen and a rejected answer.
        rated: Those that take an answer with a label.
        key: The key of the trainer's configuration that names one of them; empty if its command line does.
        configs: The name of the default configuration of a task, if that of chat rows cannot take its rows.
    """

    pairs: tuple[str, ...] = ()
    rated: tuple[str, ...] = ()
    key: str = ""
    configs: Mapping[str, str] = field(default_factory=dict)

    def of_kind(self, kind: RecordKind) -> tuple[str, ...]:
        """Return the commands that take rows of a kind; empty for chat rows."""
        taking: tuple[str, ...] = getattr(self, kind.tasks) if kind.tasks else ()
        return taking

    def task_for(self, kind: RecordKind, named: str | None, config: Path | None) -> str:
        """Return the command for rows of a kind: the named one, that of the configuration, or the default.

        Args:
            kind: The kind of the rows.
            named: The command that the user names, or None.
            config: The user's configuration of the trainer, or None.

        Returns:
            The command; empty for chat rows.

        Raises:
            InputError: If the command does not take such rows, or the user and the configuration name two.
        """
        taking = self.of_kind(kind)
        if named is not None and named not in taking:
            found = f"{named!r} does not take {kind.title}"
            raise InputError(found, place="--task", expected=" or ".join(taking) or "no --task")
        configured = self.configured(config)
        if configured and configured not in taking and (taking or configured in (*self.pairs, *self.rated)):
            expected = "preference pairs as rows" if configured in self.pairs else "rated answers as rows"
            if taking:
                expected = " or ".join(f"{self.key}: {task}" for task in taking)
            raise InputError(
                f"`{self.key}: {configured}` does not take {kind.title}", place=str(config), expected=expected
            )
        if named and configured and named != configured:
            found = f"--task {named}, and `{self.key}: {configured}` in the configuration"
            raise InputError(found, place=str(config), expected="one of them, or the same task in both")
        if not taking:
            return ""
        return named or configured or taking[0]

    def configured(self, config: Path | None) -> str:
        """Return the value of `key` in a configuration; empty without it, or if the trainer itself must refuse it."""
        from pytest_mistral_lora.runners.configuration import read_configuration

        if not self.key or config is None:
            return ""
        try:
            value: Any = read_configuration(config)[0].get(self.key)
        except (OSError, InputError):
            return ""
        return value if isinstance(value, str) else ""
