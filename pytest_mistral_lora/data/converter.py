"""Convert one record of a known format to a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import Place, kind_of, refuse_near_misses
from pytest_mistral_lora.chat.formats import FORMATS, Recognised, recognise
from pytest_mistral_lora.data.containers import Record
from pytest_mistral_lora.data.messages import RECORD_FIELDS, Conversation, Layout
from pytest_mistral_lora.data.report import RowChanges
from pytest_mistral_lora.data.tool_calls import convert_tools, from_json, has_padding
from pytest_mistral_lora.errors import RowError

_DEFAULT_KEYS = {
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "history": "history"},
    "prompt-completion": {"prompt": "prompt", "completion": "completion"},
    "preference": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}
_COLUMNS = {"system": ("system", "system_prompt"), "tools": ("tools", "functions", "available_tools")}
_MEDIA = RECORD_FIELDS[-6:]
_MARKS = ("label", "kto_tag")


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
        self.place, self.layout, self.noted = record.place, layout, noted
        value = record.value
        recognised = recognise(value)
        if not isinstance(value, Mapping):
            if recognised is None:
                raise RowError(f"a record is {kind_of(value)}", place=record.place, expected="an object")
            value, recognised = {"messages": value}, Recognised("messages", "", {"messages": "messages"})
        own = recognised.keys if recognised is not None and recognised.name == layout.format else {}
        if recognised is not None and recognised.name != layout.format and not layout.keys:
            expected = f"{FORMATS[layout.format]}, as the file's first rows are"
            raise RowError(f"this is {recognised.title}", place=record.place, expected=expected)
        self.keys: dict[str, str] = {**(own or _DEFAULT_KEYS[layout.format]), **layout.keys}
        self.data = {key: one for key, one in value.items() if one is not None}
        if len(self.data) < len(value):
            noted.changed("null-keys")
        messages = self.data.get(self.keys.get("messages", ""))
        # a table pads its own columns, but not the JSON that one holds as text
        self.padded = (padded and not isinstance(messages, str)) or has_padding(messages)
        self.turns = Conversation(layout, noted, record.place, padded=self.padded)

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
        for key in {self.layout.keys.get("mark", ""), *_MARKS} & self.data.keys():
            # a column of CSV holds text
            if self.data[key] is False or self.data[key] in ("false", "False"):
                self.noted.lost("unwanted", key)
                return None
        declared = {self.layout.keys.get(name, "") for name in _MEDIA}
        for key in self.data.keys() & ({*_MEDIA} | declared):
            if self.data.pop(key) not in ("", []):
                self.noted.lost("media", key)
        messages = self._with_system(self.turns.messages)
        if self.data.get("only_last") in (True, False, "true", "false") and self.data.pop("only_last") in (
            True,
            "true",
        ):
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

    def _conversation(self) -> None:
        key = self.keys["messages"]
        if key not in self.data:
            raise Place(self.place, key).error("is missing", "a list of messages")
        self.turns.add_all(self.data.pop(key), key)

    def _instruction(self) -> None:
        history = from_json(self.data.pop(self.keys.get("history", ""), None), self.noted, Place(self.place, "history"))
        for index, pair in enumerate(history or ()):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise Place(self.place, f"history[{index}]").error(repr(pair), "a pair: a prompt and its answer")
            self.noted.changed("history")
            self._side(f"history[{index}]", pair[0], "user")
            self._side(f"history[{index}]", pair[1], "assistant")
        self._side(self.keys["instruction"], self._joined("instruction"), "user")
        key = self.keys["output"]
        self._side(key, self.data.pop(key, None), "assistant")

    def _joined(self, first: str) -> str:
        """Return instruction and input as one text."""
        key, below = self.keys[first], self.keys.get("input", "")
        present = self.data.keys() & {key}
        texts = {name: self.data.pop(name, "") for name in (key, below) if name}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise Place(self.place, name).error(f"is {kind_of(text)}", "a string")
        instruction, given = texts[key], texts.get(below, "")
        if not (instruction or given) and key not in present:
            # a declared key that the record has not: an empty question would be trained on
            raise Place(self.place, key).error("is missing", "a text")
        if self.layout.templates is not None:
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
        self._side(prompt, self.data.pop(prompt, None), "user", weight=0)
        answer = self.data.pop(completion, None)
        if isinstance(answer, str) and answer[:1] == " " and answer[1:2] not in ("", " "):
            # OpenAI's advice for a text that is put behind the prompt; a turn has markers between them
            answer = answer[1:]
            self.noted.changed("completion-space")
        self._side(completion, answer, "assistant")

    def _preference(self) -> None:
        chosen, prompt = self.data.pop(self.keys["chosen"], None), self.keys.get("prompt", "")
        self.data.pop(self.keys["rejected"], None)
        self.noted.lost("rejected")
        self.noted.changed("chosen")
        given = self._joined("prompt") if self.keys.get("input") else self.data.get(prompt)
        self.data.pop(prompt, None)
        # whether a chosen conversation has its prompt in it
        is_whole = False
        if isinstance(chosen, Sequence) and not isinstance(chosen, str):
            turns = (one for one in chosen if isinstance(one, Mapping))
            first = next((one for one in turns if one.get("role", one.get("from")) in ("user", "human")), None)
            is_whole = first is not None and (
                given is None or (isinstance(given, str) and given in (first.get("content"), first.get("value")))
            )
        if given is None and not is_whole:
            found = "a chosen answer without its prompt"
            raise Place(self.place, self.keys["chosen"]).error(found, "`prompt`, or a chosen conversation")
        if not is_whole:
            self._side(prompt, given, "user", weight=0)
        self._side(self.keys["chosen"], chosen, "assistant")

    def _side(self, key: str, value: Any, role: str, *, weight: int | None = None) -> None:
        """Add a prompt or an answer: a text, a message, a list of messages, or a request with messages."""
        if isinstance(value, str) and value.lstrip().startswith("[{") and recognise({"messages": value}):
            value = from_json(value, self.noted, Place(self.place, key))
        if isinstance(value, Mapping) and "messages" in value:
            self.data = {**{name: one for name, one in value.items() if name != "messages"}, **self.data}
            value = value["messages"]
        if value is None or value == []:
            raise Place(self.place, key).error("is missing" if value is None else "is empty", "a text or messages")
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        elif isinstance(value, Mapping):
            value = [value]
        self.turns.add_all(value, key, weight=weight)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        text = self._column("system") or self.layout.system
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

    def _column(self, name: str) -> Any:
        keys = [self.layout.keys[name]] if name in self.layout.keys else _COLUMNS[name]
        found = [self.data.pop(key) for key in keys if key in self.data]
        return next((one for one in found if one not in ("", [])), None)

    def _tools(self) -> list[Any] | None:
        if "functions" in self.data:
            self.noted.changed("function-call")
        return convert_tools(self._column("tools"), self.noted, Place(self.place, "tools"), padded=self.padded)

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
