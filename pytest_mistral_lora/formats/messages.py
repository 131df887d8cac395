"""Convert one conversation of any layout to the messages of a row: roles, content, thinking, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import ROLES, Place, kind_of
from pytest_mistral_lora.chat.formats import CALL, CONTENT, FLAGS, MEDIA_PARTS, OTHER_ROLES, THINKING
from pytest_mistral_lora.chat.reading import loads_strict
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.report import RowChanges
from pytest_mistral_lora.formats.tool_calls import ToolCalls, from_json

KNOWN_ROLES = {**{role: role for role in ROLES}, **OTHER_ROLES}
"""Names of roles, each with ours."""

_CHUNKS = {"input_text": "text", "output_text": "text", "reasoning": "thinking", None: "text"}
_ORDER = ("role", "content", "tool_calls", "tool_call_id", "name", "weight")


class Conversation:
    """The messages of one row in the making.

    Attributes:
        messages: The messages so far.
    """

    def __init__(self, layout: Layout, noted: RowChanges, origin: str, *, padded: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self._layout, self._noted, self._origin, self._padded = layout, noted, origin, padded
        self._calls = ToolCalls(noted, padded=padded)
        self._known = {**KNOWN_ROLES, **layout.roles}

    def add_all(self, items: Any, key: str, *, weight: int | None = None) -> None:
        """Add the messages of a list.

        Args:
            items: The list.
            key: Its key in the record, for errors.
            weight: The weight of answers without a flag.

        Raises:
            RowError: If a message cannot be converted.
        """
        place = Place(self._origin, key or "messages")
        items = from_json(items, self._noted, place)
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise place.error(f"is {kind_of(items)}", "a list of messages")
        self._calls.reserve_ids(items)
        roles = [self._role_of(item, place / index) for index, item in enumerate(items)]
        for index, (item, role) in enumerate(zip(items, roles, strict=True)):
            last_result = roles[index + 1 : index + 2] != ["tool"]
            if role == "system" and self._layout.drop_system:
                self._noted.changed("system-dropped")
            else:
                self._add(dict(item), role, place / index, weight, last_result)

    def _role_of(self, item: Any, place: Place) -> str:
        if not isinstance(item, Mapping):
            raise place.error(f"is {kind_of(item)}", "a message: an object with a role and a content")
        key = self._layout.message_keys.get("role") or ("from" if item.get("role") is None else "role")
        given = item.get(key)
        role = self._ours(given)
        if role is None:
            found = repr(given) if given is not None else "is missing"
            step = "Declare it: `tags` of LLaMA-Factory's dataset_info.json, or `roles` of Axolotl's datasets."
            names = ", ".join([*ROLES, *self._layout.roles, "human, gpt, observation, function_call"])
            raise (place / key).error(found, f"one of {names}", step)
        for other in {"role", "from"} - {key}:
            if self._ours(item.get(other)) not in (None, role):
                raise (place / other).error(f"{item[other]!r}, and `{key}` is {given!r}", "one role")
        if role != given and role != CALL:
            self._noted.changed("roles", f"{given} is {role}")
        return role

    def _ours(self, role: Any) -> str | None:
        return self._known.get(role) if isinstance(role, str) else None

    def _add(self, item: dict[str, Any], role: str, place: Place, weight: int | None, last_result: bool) -> None:
        message: dict[str, Any] = {"role": "assistant" if role == CALL else role}
        for ours, theirs in self._layout.message_keys.items():
            if ours in _ORDER[2:5] and theirs in item:
                item[ours] = item.pop(theirs)
        for key in dict.fromkeys((self._layout.message_keys.get("role", "role"), "role", "from")):
            if self._ours(item.get(key)):
                del item[key]
        self._drop_empty(item)
        content, called = self._content(item, message["role"], place)
        if role == CALL:
            content, called = None, from_json(content, self._noted, place)
            if not called:
                raise place.error("has no tool call", 'JSON of {"name": …, "arguments": …}')
        if "function_call" in item:
            called = from_json(item.pop("function_call"), self._noted, place / "function_call")
            self._noted.changed("function-call")
        native = from_json(item.pop("tool_calls", None), self._noted, place / "tool_calls")
        if native or called is not None:
            self._calls.open = []
            message["tool_calls"] = [
                *(self._calls.read(native, place / "tool_calls") if native else ()),
                *(self._calls.read(called, place) if called is not None else ()),
            ]
        thoughts = self._thoughts(item)
        if thoughts and isinstance(content, str | list | None):
            rest = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
            content = [{"type": "thinking", "thinking": text} for text in thoughts] + list(rest)
        if content is not None or ("content" in item and not (self._padded and "tool_calls" in message)):
            message["content"] = content
        item.pop("content", None)
        self._weigh(message, item, place, weight)
        if message["role"] == "tool":
            call_id, name = item.pop("tool_call_id", None), item.pop("name", None)
            if call_id is None and last_result and len(self._calls.open) > 1:
                self._split(message.get("content"), place)
                self._leave_out({**item, **({} if name is None else {"name": name})})
                return
            message["tool_call_id"] = self._calls.answered(call_id, name, place)
            message |= {} if name is None else {"name": name}
        self._leave_out(item)
        self.messages.append({key: message[key] for key in _ORDER if key in message})

    def _drop_empty(self, item: dict[str, Any]) -> None:
        """Remove the keys that tables and servers pad messages with; a content that is null may be a call's."""
        declared = self._layout.message_keys.get("content", "content")
        padded = [key for key, value in item.items() if value is None and key != "content"]
        padded += [key for key in item if item[key] in ("", []) and key not in (*CONTENT, declared)]
        # Mistral's own default
        padded += ["prefix"] if item.get("prefix") is False else []
        for key in padded:
            del item[key]
            self._noted.changed("null-keys")

    def _content(self, item: dict[str, Any], role: str, place: Place) -> tuple[Any, Any]:
        """Return the content, and the tool calls among its chunks or None; the key `content` stays if it was there."""
        declared = self._layout.message_keys.get("content")
        key = declared or next((key for key in CONTENT if item.get(key) is not None), "content")
        value = item.get(key)
        if key != "content":
            item.pop(key, None)
            if key == "text":
                self._noted.changed("content-key")
        if isinstance(refusal := item.pop("refusal", None), str):
            if value:
                self._noted.lost("refusals")
            else:
                value = refusal
                self._noted.changed("refusals")
        if isinstance(value, Sequence) and not isinstance(value, str):
            objects = [one for one in value if not isinstance(one, str)]
            if all(isinstance(one, Mapping) and ("type" in one or "text" in one) for one in objects):
                return self._chunks(value, place / key)
        if role == "tool" and isinstance(value, Mapping | Sequence) and not isinstance(value, str):
            self._noted.changed("result-text")
            value = json.dumps(value, ensure_ascii=False)
        return value, None

    def _chunks(self, chunks: Sequence[Any], place: Place) -> tuple[Any, Any]:
        found: list[dict[str, Any]] = []
        calls: list[Any] = []
        joined = self._layout.joined
        for index, given in enumerate(chunks):
            chunk = {"type": "text", "text": given} if isinstance(given, str) else dict(given)
            if any(chunk.pop(key, None) is not None for key in ("train", "weight")):
                self._noted.lost("part-weights")
            chunk = {key: value for key, value in chunk.items() if value is not None}
            kind = chunk.get("type")
            ours = _CHUNKS.get(kind, kind) if isinstance(kind, str | None) else None
            if ours in MEDIA_PARTS:
                self._noted.lost("media", str(kind))
                continue
            if ours not in ("text", "thinking", "tool_call"):
                found.append(chunk)  # the check of the row names it
                continue
            key = ours if ours in chunk else next((key for key in CONTENT if key in chunk), "")
            value, read = chunk.get(key), {"type", key}
            if ours == "tool_call":
                calls.append(from_json(value, self._noted, place / index))
            elif ours == "thinking":
                closed = {"closed": chunk["closed"]} if "closed" in chunk else {}
                found.append({"type": ours, ours: _joined_text(value), **closed})
                read |= closed.keys()
            else:
                joined = joined or key != ours
                found.append({"type": ours, ours: value})
            for other in chunk.keys() - read:
                self._noted.lost("message-keys", other)
        if joined and all(chunk["type"] == "text" and isinstance(chunk.get("text"), str) for chunk in found):
            # the trainers that have such chunks put one behind the other, without a blank line
            self._noted.changed("chunks")
            text = "".join(chunk["text"] for chunk in found)
            return text if text or not calls else None, calls or None
        if found != list(chunks):
            self._noted.changed("chunks")
        return found if found or not calls else None, calls or None

    def _thoughts(self, item: dict[str, Any]) -> list[str]:
        keys = [key for key in (self._layout.message_keys.get("thinking"), *THINKING) if key in item]
        texts = [item.pop(key) for key in keys if isinstance(item[key], str)]
        if texts:
            self._noted.changed("thinking")
        # two servers' names for one text
        return list(dict.fromkeys(texts))

    def _split(self, content: Any, place: Place) -> None:
        """Add a result for each open call, from the one result that lists them."""
        try:
            results = loads_strict(content) if isinstance(content, str) else None
        except ValueError:
            results = None
        if not isinstance(results, list) or len(results) != len(self._calls.open):
            found = f"one result for {len(self._calls.open)} calls"
            raise place.error(found, "a result for each call, or a list of them")
        self._noted.changed("results-split")
        for (call_id, _), result in zip(self._calls.open, results, strict=True):
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            self.messages.append({"role": "tool", "content": text, "tool_call_id": call_id})
        self._calls.open = []

    def _weigh(self, message: dict[str, Any], item: dict[str, Any], place: Place, weight: int | None) -> None:
        """Turn flags of training into the weight of an answer."""
        declared = self._layout.message_keys.get("weight", "")
        found: set[float] = set()
        for key, trains in {**({declared: 1} if declared else {}), **FLAGS}.items():
            value = item.pop(key, None)
            if value is None:
                continue
            if not isinstance(value, bool | int | float):
                raise (place / key).error(repr(value), "true, false or a number")
            if key != "weight" or type(value) is not int:
                self._noted.changed("weights", key if trains else f"{key}, of which true is 0")
            found.add(float(value if trains else not value))
        if len(found) > 1:
            raise place.error("flags of training that contradict each other", "one of them")
        trained, is_answer = self._layout.trained, message["role"] == "assistant"
        if not is_answer:
            if any(found) or (not found and message["role"] in (trained or ())):
                self._noted.lost("trained-prompts")
        elif found:
            value = found.pop()
            if value not in (0, 1):
                self._noted.lost("weights", f"{value:g}")
            message["weight"] = int(bool(value))
        elif trained is not None and "assistant" not in trained:
            message["weight"] = 0
            self._noted.changed("untrained-roles")
        elif weight is not None:
            message["weight"] = weight
            self._noted.changed("prompt-weights")

    def _leave_out(self, item: Mapping[str, Any]) -> None:
        for key in item:
            kind = "media" if key in MEDIA_PARTS else "names" if key == "name" else "message-keys"
            self._noted.lost(kind, key)


def _joined_text(thinking: Any) -> Any:
    """Return thinking as one text, which Mistral's API has as a list of text chunks; any other value as it is."""
    chunks = thinking if isinstance(thinking, list | tuple) else ()
    texts = [one["text"] for one in chunks if isinstance(one, Mapping) and one.keys() == {"type", "text"}]
    is_text = len(texts) == len(chunks) and all(isinstance(one, str) for one in texts)
    return "".join(texts) if chunks and is_text else thinking
