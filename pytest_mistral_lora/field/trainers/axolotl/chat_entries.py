"""Entries of `datasets` whose rows are chats: the families of their types, and their names of roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT_TYPES = ("chat_template", "sharegpt", "messages")
"""The families of types whose rows are lists of messages."""
_ROLES = {"human": "user", "gpt": "assistant"}


def family_of(kind: Any) -> str:
    """Return the family of a type without fields of its own, such as `alpaca` of `alpaca.load_concise`."""
    return str(kind or "chat_template").partition(".")[0].partition(":")[0]


def is_chat_type(kind: Any) -> bool:
    """Return whether the rows of a type are lists of messages; without a type, they are ids."""
    return isinstance(kind, str) and family_of(kind) in CHAT_TYPES


def roles_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return our names of the roles that an entry declares, by their names in its rows; empty if it declares none."""
    declared = entry.get("roles")
    named = declared.items() if isinstance(declared, Mapping) else ()
    return {name: ours for ours, names in named if isinstance(names, list) for name in names if isinstance(name, str)}


def trained_roles(entry: Mapping[str, Any]) -> frozenset[str] | None:
    """Return our names of the roles that an entry trains on; None if it does not tell."""
    trained, roles = entry.get("roles_to_train"), roles_of(entry)
    if trained is None:
        return None
    names = [str(name) for name in trained] if isinstance(trained, list) else [str(trained)]
    return frozenset(roles.get(name, _ROLES.get(name, name)) for name in names)
