"""The layout of records: the keys that hold the fields of a row, recognised, declared or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.foreign_fields import MEDIA, OTHER_ROLES

RECORD_FIELDS = (
    "messages",
    "system",
    "tools",
    "prompt",
    "suffix",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "history",
    "mark",
    *MEDIA,
)
"""Fields of a record that a layout can name the key of; `mark` is the flag of a good answer."""
MESSAGE_FIELDS = ("role", "content", "thinking", "weight", "tool_calls", "tool_call_id", "name")
"""Fields of a message that a layout can name the key of."""
KNOWN_ROLES = {**{role: role for role in ROLES}, **OTHER_ROLES}
"""Names of roles, each with our name."""
_SIDES = {
    **dict.fromkeys(("instruction", "prompt"), "the prompt"),
    **dict.fromkeys(("output", "response", "completion"), "the answer"),
    "chosen": "the chosen answer",
    "rejected": "the rejected answer",
}
"""Names of columns that tell what is in them; `question` and `answer` do not: a question may be what is generated."""


@dataclass(frozen=True)
class Layout:
    """The places of a row's fields in the records of a source.

    Attributes:
        format: A key of `formats.recognition.FORMATS`; empty to recognise it.
        keys: Keys of a record, by the field of `RECORD_FIELDS`.
        message_keys: Keys of a message, by the field of `MESSAGE_FIELDS`.
        roles: Our names of declared roles, by their names in the source.
        trained: Our names of the roles that are trained on; None for the assistant, unless a flag differs.
        drop_system: Whether system messages are left out.
        joined: Whether chunks of text are one text, without a blank line between them.
        templates: The user's message with an input and without one, `{instruction} {input}`.
        system: The system prompt of records without one.
        roles_in: Where the trainer's configuration declares the names of roles, in words; empty without one. It
            decides no row, and is not recorded.
    """

    format: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    message_keys: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    trained: frozenset[str] | None = None
    drop_system: bool = False
    joined: bool = False
    templates: tuple[str, str] | None = None
    system: str = ""
    roles_in: str = field(default="", compare=False)

    def role(self, name: Any) -> str | None:
        """Return our name of a role, or None if it is unknown."""
        return self._known_roles.get(name) if isinstance(name, str) else None

    @cached_property
    def _known_roles(self) -> Mapping[str, str]:
        return {**KNOWN_ROLES, **self.roles}

    @property
    def exchanged(self) -> str:
        """What is declared under the name of its counterpart, and the counterpart under its name; empty without any."""
        declared = [(_SIDES.get(name), key, _SIDES.get(key)) for name, key in self.keys.items()]
        declared += [(ours, name, KNOWN_ROLES.get(name)) for name, ours in self.roles.items()]
        crossed = {(read_as, own): name for read_as, name, own in declared if read_as and own and read_as != own}
        both = [f"{name!r} as {read_as}" for (read_as, own), name in crossed.items() if (own, read_as) in crossed]
        return ", ".join(both)

    def to_json(self) -> dict[str, Any]:
        """Return the declared parts that are read, except the format, as plain JSON data."""
        # a declaration may name fields that no row has
        keys = {name: key for name, key in self.keys.items() if name in RECORD_FIELDS}
        message_keys = {name: key for name, key in self.message_keys.items() if name in MESSAGE_FIELDS}
        parts = {"keys": keys, "message_keys": message_keys, "roles": dict(self.roles)}
        parts |= {name: getattr(self, name) for name in ("drop_system", "joined", "templates", "system")}
        trained = {} if self.trained is None else {"trained": sorted(self.trained)}
        return {name: value for name, value in parts.items() if value} | trained

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Layout:
        """Return the layout that `to_json` wrote, of a format."""
        values = dict(data)
        if "trained" in values:
            values["trained"] = frozenset(values["trained"])
        if "templates" in values:
            first, second = values["templates"]
            values["templates"] = (first, second)
        return cls(name, **values)
