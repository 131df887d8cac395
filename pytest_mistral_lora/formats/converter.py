"""Convert one record of a known format to a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import Place, kind_of, refuse_near_misses
from pytest_mistral_lora.chat.formats import FORMATS, MEDIA, Recognised, recognise
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.containers import Record
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.messages import Conversation
from pytest_mistral_lora.formats.report import RowChanges
from pytest_mistral_lora.formats.tool_calls import convert_tools, from_json, has_padding

_DEFAULT_KEYS = {
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "history": "history"},
    "prompt-completion": {"prompt": "prompt", "completion": "completion"},
    "preference": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}
_COLUMNS = {"system": ("system", "system_prompt"), "tools": ("tools", "functions", "available_tools")}
_MARKS = ("label", "kto_tag")
_REJECTED = ("rejected_response", "rejected_messages")
"""Keys of ms-swift for the worse answer, beside messages that end with the better one."""


class RecordConverter:
    """The conversion of one record.

    Args:
        record: The record.
        layout: Its layout; `format` is known.
        noted: Notes the changes and losses.
        padded: Whether absent keys are null, as in a table of Arrow.

    Raises:
        RowError: If the record is of another format.
    """

    def __init__(self, record: Record, layout: Layout, noted: RowChanges, padded: bool) -> None:
        self.place: str = record.place
        self.layout: Layout = layout
        self.noted: RowChanges = noted
        value = record.value
        recognised = recognise(value)
        if not isinstance(value, Mapping):
            if recognised is None:
                raise RowError(f"a record is {kind_of(value)}", place=record.place, expected="an object")
            value, recognised = {"messages": value}, Recognised("messages", "", {"messages": "messages"})
        own = recognised.keys if recognised is not None and recognised.name == layout.format else {}
        if recognised is not None and recognised.name != layout.format and not layout.keys:
            expected = f"{FORMATS[layout.format]}, as you declared or as the file's first rows are"
            raise RowError(f"this is {recognised.title}", place=record.place, expected=expected)
        keys = {**(own or _DEFAULT_KEYS[layout.format]), **layout.keys}
        # a declaration without a field names an empty key; the column of pandas' index has one, too
        self.keys: dict[str, str] = {name: key for name, key in keys.items() if key}
        self.data: dict[str, Any] = {key: one for key, one in value.items() if one is not None}
        if len(self.data) < len(value):
            noted.changed("null-keys")
        messages = self.data.get(self.keys["messages"]) if "messages" in self.keys else None
        # a table pads its own columns, but not the JSON that one holds as text
        self.padded: bool = (padded and not isinstance(messages, str)) or has_padding(messages)
        self.turns: Conversation = Conversation(layout, noted, record.place, padded=self.padded)

    def row(self) -> dict[str, Any] | None:
        """Return the row as plain data, or None for a record whose answer is marked as bad.

        Raises:
            RowError: With the field and the value, if the record cannot be converted.
        """
        {
            "messages": self._conversation,
            "sharegpt": self._conversation,
            "alpaca": self._instruction,
            "prompt-completion": self._completion,
            "preference": self._preference,
        }[self.layout.format]()
        if self._is_marked_as_bad():
            return None
        declared = {self.keys[name] for name in MEDIA if name in self.keys}
        for kind, keys in (("media", {*MEDIA} | declared), ("rejected", {*_REJECTED})):
            for key in self.data.keys() & keys:
                if self.data.pop(key) not in ("", []):
                    self.noted.lost(kind, key)
        messages = self._with_system(self.turns.messages)
        only_last = _flag(self.data.get("only_last"))
        if only_last is not None:
            del self.data["only_last"]
        if only_last:
            self.noted.changed("only-last")
            for message in [one for one in messages if one["role"] == "assistant"][:-1]:
                message["weight"] = 0
        answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
        if answers and len(answers) == len(messages):
            raise Place(self.place, "messages").error("answers without a question", "a user or system message before")
        for index in answers:
            content = messages[index].get("content")
            if isinstance(content, str) and not content.strip(" ") and "tool_calls" not in messages[index]:
                found, expected = "an empty answer", "a text: no tokenizer of Mistral's encodes an answer without one"
                raise Place(self.place, f"messages[{index}].content").error(found, expected)
        if answers and answers[-1] < len(messages) - 1:
            self.noted.lost("last-prompt")
            messages = messages[: answers[-1] + 1]
        tools = self._tools()
        return {"messages": messages, **({"tools": tools} if tools else {}), **self._rest()}

    def _is_marked_as_bad(self) -> bool:
        declared = self.keys.get("mark", "")
        for key in self.data.keys() & {declared, *_MARKS} - {""}:
            flag = _flag(self.data[key])
            if flag is None and key == declared:
                raise Place(self.place, key).error(repr(self.data[key]), "true or false")
            # 0 may be a class of the user's own, but beside a prompt and its completion it is KTO's mark
            is_word = str(self.data[key]).lower() == "false"
            if flag is False and (is_word or key == declared or self.layout.format == "prompt-completion"):
                self.noted.lost("unwanted", key)
                return True
        return False

    def _take(self, name: str) -> Any:
        """Remove the value of a field from the record and return it; None if there is none."""
        return self.data.pop(self.keys[name], None) if name in self.keys else None

    def _conversation(self) -> None:
        key = self.keys.get("messages", "messages")
        if key not in self.data:
            raise Place(self.place, key).error("is missing", "a list of messages")
        self.turns.add_all(self.data.pop(key), key)

    def _instruction(self) -> None:
        history = from_json(self._take("history"), self.noted, Place(self.place, "history"))
        if not isinstance(history, Sequence | None) or isinstance(history, str):
            raise Place(self.place, "history").error(f"is {kind_of(history)}", "a list of pairs")
        for index, pair in enumerate(history or ()):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise Place(self.place, f"history[{index}]").error(repr(pair), "a pair: a prompt and its answer")
            self.noted.changed("history")
            self._side(f"history[{index}]", pair[0], "user")
            self._side(f"history[{index}]", pair[1], "assistant")
        self._side(self.keys.get("instruction", "instruction"), self._joined("instruction"), "user")
        self._side(self.keys.get("output", "output"), self._take("output"), "assistant")

    def _joined(self, first: str) -> str:
        """Return instruction and input as one text."""
        is_there = self.keys.get(first) in self.data
        texts = {name: self._take(name) for name in (first, "input")}
        for name, text in texts.items():
            if not isinstance(text, str | None):
                raise Place(self.place, self.keys[name]).error(f"is {kind_of(text)}", "a string")
        instruction, given = texts[first] or "", texts["input"] or ""
        if not (instruction or given or is_there):
            # a declared key that the record has not: an empty question would be trained on
            raise Place(self.place, self.keys.get(first, first)).error("is missing", "a text")
        if self.layout.templates is not None and (instruction + given).strip():
            self.noted.changed("input", "the declared format")
            # not str.format: a declaration must not reach the attributes of an object
            template = self.layout.templates[0 if given else 1]
            return template.replace("{instruction}", instruction).replace("{input}", given)
        if instruction and given:
            self.noted.changed("input", "two lines")
        return "\n".join(filter(None, (instruction, given)))

    def _completion(self) -> None:
        prompt, completion = self.keys["prompt"], self.keys["completion"]
        self.noted.changed("turns", f"{prompt}/{completion}")
        answer = self._take("completion")
        if isinstance(answer, str) and answer[:1] == " " and answer[1:2] not in ("", " "):
            # OpenAI's advice for a text that is put behind the prompt; a turn has markers between them
            answer = answer[1:]
            self.noted.changed("completion-space")
        self._side(prompt, self._take("prompt"), "user", weight=0)
        self._answer(completion, answer)

    def _preference(self) -> None:
        chosen = self._take("chosen")
        self._take("rejected")
        self.noted.lost("rejected")
        self.noted.changed("chosen")
        prompt = self.keys.get("prompt", "prompt")
        given = self._joined("prompt") if "input" in self.keys else self._take("prompt")
        if given is not None:
            self._side(prompt, given, "user", weight=0)
        self._answer(self.keys["chosen"], chosen)

    def _answer(self, key: str, value: Any) -> None:
        """Add the answer to the prompt that is there: a text, or a conversation that may have the prompt in it.

        Raises:
            RowError: If the conversation begins with another question than the prompt.
        """
        prompt = list(self.turns.messages)
        self._side(key, value, "assistant")
        answer = self.turns.messages[len(prompt) :]
        roles = [one["role"] for one in answer if one["role"] != "system"]
        if not prompt and roles[:1] == ["assistant"]:
            raise Place(self.place, key).error(
                "a chosen answer without its prompt", "`prompt`, or a chosen conversation"
            )
        texts, asked = ([(one["role"], one.get("content")) for one in part] for part in (answer, prompt))
        # a prompt that is a text is the first question, behind the conversation's own system prompt or greeting
        first = next((index for index, (role, _) in enumerate(texts) if role == "user"), 0)
        start = next((one for one in (0, first) if asked and texts[one : one + len(asked)] == asked), None)
        if start is not None:
            self.turns.messages = [*answer[:start], *prompt, *answer[start + len(prompt) :]]
        elif asked and asked[-1][0] == "user" and roles[:1] == ["user"]:
            expected = "the answer alone, or the prompt and its answer"
            raise Place(self.place, key).error("begins with another question than the prompt", expected)

    def _side(self, key: str, value: Any, role: str, *, weight: int | None = None) -> None:
        """Add a prompt or an answer: a text, a message, a list of messages, or a request with messages."""
        if isinstance(value, str) and value.lstrip().startswith("[{") and recognise({"messages": value}):
            value = from_json(value, self.noted, Place(self.place, key))
        if isinstance(value, Mapping) and "messages" in value:
            for name in (value.keys() & self.data.keys()) - {"messages"}:
                if value[name] != self.data[name]:
                    self.noted.lost("keys", f"{key}.{name}")
            self.data = {**{name: one for name, one in value.items() if name != "messages"}, **self.data}
            value = value["messages"]
        # trainers encode an empty question without a word, and train on an answer to nothing
        is_empty = value == [] or (role == "user" and isinstance(value, str) and not value.strip())
        if value is None or is_empty:
            raise Place(self.place, key).error("is missing" if value is None else "is empty", "a text or messages")
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        elif isinstance(value, Mapping):
            value = [value]
        self.turns.add_all(value, key, weight=weight)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        text = self._column("system", "system") or self.layout.system
        if not isinstance(text, str):
            raise Place(self.place, "system").error(f"is {kind_of(text)}", "a string")
        if not text or self.layout.drop_system:
            return messages
        if messages and messages[0]["role"] == "system":
            if messages[0].get("content") != text:
                self.noted.lost("system")
            return messages
        self.noted.changed("system")
        return [{"role": "system", "content": text}, *messages]

    def _column(self, name: str, lost: str) -> Any:
        """Remove a column from the record and return it; another one of the same meaning is a loss of this kind."""
        keys = [self.layout.keys[name]] if name in self.layout.keys else _COLUMNS[name]
        found = {key: self.data.pop(key) for key in keys if key and key in self.data}
        values = {key: one for key, one in found.items() if one not in ("", [])}
        first = next(iter(values.values()), None)
        for key, value in values.items():
            if value != first:
                self.noted.lost(lost, key)
        return first

    def _tools(self) -> list[Any] | None:
        if "functions" in self.data:
            self.noted.changed("function-call")
        return convert_tools(self._column("tools", "keys"), self.noted, Place(self.place, "tools"), padded=self.padded)

    def _rest(self) -> dict[str, Any]:
        """Return the user's own keys, which change no token, as far as a row can have them."""
        kept = {}
        for key, value in self.data.items():
            try:
                refuse_near_misses({key: value}, "")
                json.dumps(value, allow_nan=False)
            except (RowError, TypeError, ValueError):
                self.noted.lost("keys", str(key))
                continue
            if key in ("messages", "tools"):
                self.noted.lost("keys", key)
            else:
                kept[key] = value
        return kept


def _flag(value: Any) -> bool | None:
    """Return the truth of a field, which a column of CSV holds as text; None if it has none."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower())
    return bool(value) if value in (True, False) else None
