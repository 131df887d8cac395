"""Servers of known answers: one that says them by itself, and a relay in front of a real one. Both can change answers.

A message of these servers has the keys `content`, `reasoning_content`, `tool_calls`, `finish_reason` and `ids`.
"""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from local_server import Behaviour, Ids, Message, events

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.records.known_answers import KnownAnswer, known_answers
from pytest_mistral_lora.serving.forced_answers import request_of

Change = Callable[[Message, dict[str, Any]], None]
"""Changes a message that is sent in answer to a request."""

CHAT = "/v1/chat/completions"


def nothing(message: Message, request: dict[str, Any]) -> None:
    """Change nothing."""


def question(request: dict[str, Any]) -> str:
    """Return the key of a request: its messages."""
    return json.dumps(request["messages"], sort_keys=True)


@dataclass
class AnswerServer(Behaviour):
    """A server whose model says the known answers, and which gives a client mistral-common's message.

    Attributes:
        change: Changes each message.
        stream: Changes the events of a stream.
        known: The answers that it knows.
    """

    change: Change = nothing
    stream: Callable[[list[bytes]], list[bytes]] = lambda parts: parts
    known: Sequence[KnownAnswer] = field(default_factory=known_answers)

    def __post_init__(self) -> None:
        # before any request: an oracle traces one conversation at a time, and requests come in threads
        fitting = [answer for answer in self.known if answer.fits(self.oracle)]
        self._messages = {question(request_of(answer)): message_of(answer, self.oracle) for answer in fitting}
        self._said: dict[Ids, Ids] = {
            answer.prompt_ids(self.oracle): answer.answer_ids(self.oracle) for answer in fitting
        }

    def _answer(self, prompt: Ids, data: dict[str, Any]) -> tuple[list[int], list[float], bool]:
        if prompt not in self._said:
            return super()._answer(prompt, data)
        ids = list(self._said[prompt])
        return ids, [-0.1] * len(ids), True

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the status and the JSON of an answer, or the events of a stream."""
        if path != CHAT or question(data) not in self._messages or self.refuses(data):
            return super().respond(path, data)
        message = copy.deepcopy(self._messages[question(data)])
        self.change(message, data)
        return 200, b"".join(self.stream([*events(message)])) if data.get("stream") else completion(message, data)


@dataclass
class Relay(Behaviour):
    """A relay in front of a real server, which changes what that server answers to a chat.

    Attributes:
        upstream: The address of the real server.
        change: Changes each message.
        asks: Changes each chat request before it is passed on.
        stream: Changes the events of a stream.
        seconds: Longest wait for the real server.
    """

    upstream: str = ""
    change: Change = nothing
    asks: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: request
    stream: Callable[[list[bytes]], list[bytes]] = lambda parts: parts
    seconds: float = 60
    passed: list[str] = field(default_factory=list)

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the answer of the real server; that to a chat, changed."""
        if path == CHAT and self.refuses(data):
            return self.refusal[0], {"error": {"message": self.refusal[1]}}
        asked = self.asks(data) if path == CHAT else data
        body = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(self.upstream + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                content: bytes = answer.read()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        self.passed.append(path)
        if path != CHAT:
            return 200, json.loads(content)
        if data.get("stream"):
            message = joined(content)
            self.change(message, data)
            return 200, b"".join(self.stream([*events(message)]))
        answered = json.loads(content)
        choice = answered["choices"][0]
        message = {"content": "", "tool_calls": [], **choice["message"], "finish_reason": choice["finish_reason"]}
        self.change(message, data)
        choice["finish_reason"] = message.pop("finish_reason")
        choice["message"] = message
        return 200, answered


def message_of(known: KnownAnswer, oracle: Oracle) -> Message:
    """Return the message of a known answer."""
    said, ids = known.message(oracle), known.answer_ids(oracle)
    calls = []
    for number, call in enumerate(said.calls):
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        calls.append({"id": call.id or f"call{number:05}", "type": "function", "function": function})
    finish = "tool_calls" if calls else "stop"
    parts = {"content": said.text, "reasoning_content": said.thinking, "tool_calls": calls}
    return {**parts, "finish_reason": finish, "ids": list(ids)}


def completion(message: Message, request: dict[str, Any]) -> dict[str, Any]:
    """Return the whole answer with a message, and its ids as llama.cpp and vLLM show them."""
    ids = message["ids"]
    choice: dict[str, Any] = {
        "message": {key: message[key] for key in ("content", "reasoning_content", "tool_calls")},
        "finish_reason": message["finish_reason"],
    }
    if request.get("logprobs"):
        choice["logprobs"] = {"content": [{"id": token, "token": "", "logprob": -0.1} for token in ids]}
    if request.get("return_token_ids"):
        choice["token_ids"] = ids
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": len(ids)}}


def joined(content: bytes) -> Message:
    """Return the message of a stream."""
    message: Message = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    for line in content.decode().splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        for choice in json.loads(line[6:])["choices"]:
            delta = choice["delta"]
            message["finish_reason"] = choice.get("finish_reason") or message["finish_reason"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for part in delta.get("tool_calls") or ():
                if part["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": "", "function": {"name": "", "arguments": ""}})
                call, function = message["tool_calls"][part["index"]], part.get("function") or {}
                call["id"] = call["id"] or part.get("id") or ""
                call["function"]["name"] += function.get("name") or ""
                call["function"]["arguments"] += function.get("arguments") or ""
    return message


def required(request: dict[str, Any]) -> bool:
    """Whether a request requires a call."""
    return request.get("tool_choice") == "required"


def other_city(message: Message, request: dict[str, Any]) -> None:
    """Have a call of the tool with another city, in ids and in the message, as a grammar of the arguments does."""
    for call in message["tool_calls"]:
        call["function"]["arguments"] = call["function"]["arguments"].replace("Oslo", "Graz")
        if "Graz" in call["function"]["arguments"] and message.get("ids"):
            message["ids"] = [*message["ids"][:-2], 100, message["ids"][-1]]


def stripped(message: Message, request: dict[str, Any]) -> None:
    """Strip the text."""
    message["content"] = (message["content"] or "").strip()


def letters_as_call(message: Message, request: dict[str, Any]) -> None:
    """Read the letters of a marker in a text as a call of what follows."""
    before, marker, after = (message["content"] or "").partition("[TOOL_CALLS]")
    if marker:
        call = {"id": "call00000", "function": {"name": after.strip() or "none", "arguments": "{}"}}
        message |= {"content": before.rstrip(), "tool_calls": [call], "finish_reason": "tool_calls"}


def calls_as_text(message: Message, request: dict[str, Any]) -> None:
    """Leave calls in the text, with their markers."""
    spelled = [f"[TOOL_CALLS]{call['function']['name']}[ARGS]{{}}" for call in message["tool_calls"]]
    if spelled:
        text = (message["content"] or "") + "".join(spelled)
        message |= {"content": text, "tool_calls": [], "finish_reason": "stop"}


def split_characters(message: Message, request: dict[str, Any]) -> None:
    """Decode a character of several tokens token by token."""
    for name in ("content", "reasoning_content"):
        text = message.get(name) or ""
        message[name] = "".join("\ufffd\ufffd" if ord(letter) > 0xFFFF else letter for letter in text)


def numbers_as_text(message: Message, request: dict[str, Any]) -> None:
    """Make a text of each number in the arguments of a call."""
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        as_text = {name: str(value) if type(value) in (int, float) else value for name, value in arguments.items()}
        call["function"]["arguments"] = json.dumps(as_text, ensure_ascii=False)


def one_id(message: Message, request: dict[str, Any]) -> None:
    """Give each call the same id."""
    for call in message["tool_calls"]:
        call["id"] = "callcall1"


def masked(message: Message, request: dict[str, Any]) -> None:
    """Mask a word, as a filter of contents does."""
    message["content"] = (message["content"] or "").replace("Paris", "****")


def with_entities(message: Message, request: dict[str, Any]) -> None:
    """Write a space as HTML does."""
    message["content"] = (message["content"] or "").replace(" ", "&nbsp;")


def with_prefix(message: Message, request: dict[str, Any]) -> None:
    """Put a name before each text."""
    message["content"] = f"AI: {message['content'] or ''}"


def without_calls(message: Message, request: dict[str, Any]) -> None:
    """Drop the calls."""
    message["tool_calls"] = []


def no_thinking(message: Message, request: dict[str, Any]) -> None:
    """Drop the thought."""
    message["reasoning_content"] = ""


def always_stop(message: Message, request: dict[str, Any]) -> None:
    """End each answer with `stop`."""
    message["finish_reason"] = "stop"


def limited(message: Message, request: dict[str, Any]) -> None:
    """End the answer after two tokens, as a limit of a proxy does."""
    text = message["content"][:2]
    parts = {"content": text, "reasoning_content": "", "tool_calls": [], "ids": message["ids"][:2]}
    message |= {**parts, "finish_reason": "length"}


def in_streams(change: Change) -> Change:
    """Return a change of streams alone."""

    def change_stream(message: Message, request: dict[str, Any]) -> None:
        if request.get("stream"):
            change(message, request)

    return change_stream
