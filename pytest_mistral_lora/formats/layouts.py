"""The layout of records: the keys that hold the fields of a row, recognised, declared or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.foreign_fields import CALL, MEDIA, OTHER_ROLES
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

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

    def role(self, name: Any) -> str | None:
        """Return our name of a role, or None if it is unknown."""
        return self._known_roles.get(name) if isinstance(name, str) else None

    @cached_property
    def _known_roles(self) -> Mapping[str, str]:
        return {**KNOWN_ROLES, **self.roles}

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


_LLAMAFACTORY_COLUMNS = {
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output"},
    "sharegpt": {"messages": "conversations"},
}
_COLUMN_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "mark"}
_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", CALL),
    "system_tag": ("system", "system"),
}
_AXOLOTL_NO_ROWS = ("completion", "pretrain", "input_output", "stepwise_supervised", "_synthetic")
_AXOLOTL_ROLES = {"human": "user", "gpt": "assistant"}


def llamafactory_layout(entry: Mapping[str, Any], place: Place) -> Layout:
    """Return the layout of an entry of `dataset_info.json` as `DatasetAttr.join` of LLaMA-Factory reads it.

    Raises:
        InputError: If the entry declares no response.
    """
    family = "alpaca" if entry.get("formatting", "alpaca") == "alpaca" else "sharegpt"
    columns = entry.get("columns")
    keys = dict(_LLAMAFACTORY_COLUMNS[family])
    if columns is not None:
        # beside declared columns, an undeclared one is missing, and not the default
        keys = {**dict.fromkeys(("instruction", "input", "output", "history", "messages", "system", "tools"), "")}
        keys |= {_COLUMN_NAMES.get(name, name): column for name, column in columns.items() if column}
    else:
        keys |= {"history": "", "system": "", "tools": ""}
    if family == "alpaca" and not (keys.get("output") or entry.get("ranking")):
        raise InputError(
            "no response is declared: a text without turns", place=place, expected="columns with a response"
        )
    if entry.get("ranking"):
        keys |= {"prompt": keys.get("instruction" if family == "alpaca" else "messages", "")}
        keys |= {name: keys.get(name) or name for name in ("chosen", "rejected")}
    tags = entry.get("tags")
    named = {tag: (tags.get(tag) if tags is not None else default) for tag, (default, _) in _TAGS.items()}
    role, content = ("from", "value") if tags is None else (tags.get("role_tag"), tags.get("content_tag"))
    is_chat = family == "sharegpt"
    return Layout(
        "preference" if entry.get("ranking") else family,
        keys,
        {"role": role, "content": content} if is_chat and role and content else {},
        {given: _TAGS[tag][1] for tag, given in named.items() if given} if is_chat else {},
        joined=True,
    )


def axolotl_layout(entry: Mapping[str, Any], place: Place, *, is_preference: bool) -> Layout:
    """Return the layout of an entry of Axolotl's `datasets`.

    Args:
        entry: The entry.
        place: Its place.
        is_preference: Whether the configuration trains on preference pairs (`rl`).

    Raises:
        InputError: If its type has no turns, or is not known.
    """
    kind = entry.get("type") or "chat_template"
    if isinstance(kind, Mapping):
        return Layout(
            "alpaca",
            {
                "instruction": kind.get("field_instruction") or "instruction",
                "input": kind.get("field_input") or "input",
                "output": kind.get("field_output") or "output",
                "system": kind.get("field_system") or "system",
                "history": "",
            },
            # Axolotl's defaults, with their spaces
            templates=(kind.get("format") or "{instruction} {input} ", kind.get("no_input_format") or "{instruction} "),
            system=kind.get("system_prompt") or "",
        )
    family = str(kind).partition(".")[0].partition(":")[0]
    if family in _AXOLOTL_NO_ROWS:
        raise InputError(f"type {kind}: a text without turns", place=place, expected="chat_template or alpaca")
    if family == "alpaca_chat" and str(kind).endswith("load_qa"):
        return Layout("prompt-completion", {"prompt": "question", "completion": "answer"})
    if family in ("alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher"):
        output = "response" if family == "gpteacher" else "output"
        return Layout("alpaca", {"instruction": "instruction", "input": "input", "output": output, "history": ""})
    if is_preference or family in ("chat_template", "sharegpt", "messages"):
        return _axolotl_messages(entry, family, is_preference=is_preference)
    known = "chat_template, alpaca, alpaca_chat.load_qa, gpteacher or fields of your own"
    raise InputError(f"type {kind!r}", place=place, expected=known)


def _axolotl_messages(entry: Mapping[str, Any], family: str, *, is_preference: bool) -> Layout:
    """Return the layout of an entry with lists of messages, and its names of their fields."""
    mapped = dict(entry.get("message_property_mappings") or {})
    role = mapped.pop("role", None) or entry.get("message_field_role")
    content = mapped.pop("content", None) or entry.get("message_field_content")
    thinking = entry.get("field_thinking") or mapped.pop("reasoning_content", None)
    weight = entry.get("message_field_training")
    given = {"role": role, "content": content, "thinking": thinking, "weight": weight}
    roles = {name: ours for ours, names in (entry.get("roles") or {}).items() for name in names}
    trained = entry.get("roles_to_train")
    messages = entry.get("field_messages") or ("conversations" if family == "sharegpt" else "messages")
    keys = {"messages": messages}
    keys |= {name: entry[f"field_{name}"] for name in ("system", "tools") if entry.get(f"field_{name}")}
    if is_preference:
        keys |= {"prompt": messages, "chosen": entry.get("field_chosen") or "chosen"}
        keys |= {"rejected": entry.get("field_rejected") or "rejected"}
    if trained is not None:
        trained = frozenset(roles.get(name, _AXOLOTL_ROLES.get(name, name)) for name in trained)
    return Layout(
        "preference" if is_preference else "messages",
        keys,
        {ours: theirs for ours, theirs in {**mapped, **given}.items() if theirs},
        roles,
        trained=trained,
        drop_system=bool(entry.get("drop_system_message")),
        joined=True,
    )
