"""A server of the tests on the loopback: it answers as llama.cpp, vLLM or OpenAI do, with ids of mistral-common.

Its model knows the prompts of golden transcripts, and answers any other prompt with another text. Its faults are those
that a test names: an answer that hangs, is no JSON, leads elsewhere, or has other ids.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

from pytest_mistral_lora.chat.completions import MalformedCallError, read_calls
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.transcripts import Transcript

Ids = tuple[int, ...]
Message = dict[str, Any]
_ENCODING = threading.Lock()


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        oracle: Its tokenizer.
        prompt: Changes the ids of a prompt that is fed; the second argument is the request.
        preview: Changes the ids of a prompt that is previewed.
        answer: Answers a path in place of the server: with a status and a body; None for its own answer.
        refuses: Whether a request is refused.
        refusal: The status and the words for it.
        golden: The answers of its adapter.
        completion: Changes the ids of an answer; the second argument is the request.
        logprob: Changes the log-probability of a token, by its place.
        base: The answers of its base; None for others than those of the adapter.
        scale: The scale of its adapter; None if none is loaded.
        shows_ids: Whether a chat shows the ids of its answer.
        reads_calls: Whether it reads tool calls in an answer.
        named: The name that it reads in a call; empty for that of the answer.
        longest: The most tokens of the answer to a chat; 0 for those that the request asks for.
        models: The models that it lists.
        version: Its version, or its build as llama.cpp reports it.
        headers: Headers of each answer.
        seen: The requests: path, headers and data.
    """

    oracle: Oracle
    prompt: Callable[[Ids, dict[str, Any]], Ids] = lambda ids, _: ids
    preview: Callable[[Ids, dict[str, Any]], Ids] | None = None
    answer: Callable[[str], tuple[int, bytes] | None] = lambda _: None
    refuses: Callable[[dict[str, Any]], bool] = lambda _: False
    refusal: tuple[int, str] = (400, "Conversation roles must alternate")
    golden: Sequence[Transcript] = ()
    completion: Callable[[Ids, dict[str, Any]], Ids] = lambda ids, _: ids
    logprob: Callable[[float, int], float] = lambda value, _: value
    base: Sequence[Transcript] = ()
    scale: float | None = 1.0
    shows_ids: bool = True
    reads_calls: bool = True
    named: str = ""
    longest: int = 0
    models: Sequence[dict[str, str]] = ({"id": "tiny"},)
    version: str = "0.0-test"
    headers: Mapping[str, str] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def ids(self, data: dict[str, Any]) -> Ids:
        """Return the ids of a chat request."""
        row = {"messages": [*data["messages"], {"role": "assistant", "content": "x"}]}
        # requests come in threads, and an oracle traces one conversation at a time
        with _ENCODING:
            return self.oracle.encode_prompt(row | ({"tools": data["tools"]} if "tools" in data else {}))

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the status and the JSON of an answer; bytes are the events of a stream."""
        if path == "/v1/models":
            return 200, {"data": list(self.models)}
        if path in ("/props", "/version"):
            return 200, {"build_info": self.version, "version": self.version, "model_ftype": "all F32"}
        if path == "/lora-adapters":
            return 200, [] if self.scale is None else [{"id": 0, "path": "lora.gguf", "scale": self.scale}]
        if path == "/tokenize":
            # its rendered prompts are ids; any other text is encoded without control tokens
            is_ids = data["parse_special"]
            with _ENCODING:
                return 200, {
                    "tokens": json.loads(data["content"]) if is_ids else self.oracle.encode_text(data["content"])
                }
        if path == "/completion":
            return 200, self._completed(tuple(data["prompt"]), data)
        if path == "/v1/completions":
            ids, values, _ = self._answer(tuple(data["prompt"]), data)
            choice = {"token_ids": ids, "text": self._text(ids), "logprobs": {"token_logprobs": values}}
            return 200, {"choices": [choice | {"finish_reason": "stop"}]}
        if self.refuses(data):
            return self.refusal[0], {"error": {"code": self.refusal[0], "message": self.refusal[1]}}
        try:
            ids = self.ids(data)
        except OracleRejection as error:
            return 400, {"error": {"message": error.found}}
        if path == "/apply-template":
            # the text of this server is its ids
            return 200, {"prompt": json.dumps((self.preview or self.prompt)(ids, data))}
        answer = self.chat_answer(self.prompt(ids, data), data)
        if not data.get("stream"):
            return 200, answer
        [choice] = answer["choices"]
        return 200, b"".join(events({**choice["message"], "finish_reason": choice["finish_reason"]}))

    def _answer(self, prompt: Ids, data: dict[str, Any]) -> tuple[list[int], list[float], bool]:
        """Return the ids of an answer and their log-probabilities, and whether the model ended it."""
        alone = data.get("model") == "base" or any(one["scale"] == 0 for one in data.get("lora", []))
        known = self.base if alone else self.golden
        found = next((one for one in known if one.prompt_ids == prompt), None)
        with _ENCODING:
            other = self.oracle.encode_text("Something else")
        ids, values = (found.completion_ids, found.logprobs) if found else ((*other, 2), (-3.0,) * (len(other) + 1))
        said, ids = ids, self.completion(ids, data)
        # a token that the model would not say has a value of its own
        values = tuple(values[at] if token in said[at : at + 1] else -3.0 - token % 7 for at, token in enumerate(ids))
        values = tuple(self.logprob(value, at) for at, value in enumerate(values))
        limit = data.get("max_tokens", data.get("n_predict", 64))
        return list(ids[:limit]), list(values[:limit]), len(ids) <= limit

    def _text(self, ids: Sequence[int]) -> str:
        with _ENCODING:
            return self.oracle.decode([one for one in ids if 0 <= one < self.oracle.vocab_size])

    def _listed(self, ids: Sequence[int], values: Sequence[float]) -> list[dict[str, Any]]:
        shown = [{"id": one} if self.shows_ids else {} for one in ids]
        return [
            {**shown[at], "token": f" {self._text([one])}", "logprob": values[at], "top_logprobs": []}
            for at, one in enumerate(ids)
        ]

    def _completed(self, prompt: Ids, data: dict[str, Any]) -> dict[str, Any]:
        ids, values, ended = self._answer(prompt, data)
        listed = self._listed(ids, values)
        stop = "eos" if ended else "limit"
        return {"tokens": ids, "content": self._text(ids), "stop_type": stop, "completion_probabilities": listed}

    def chat_answer(self, fed: Ids, data: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a chat request whose prompt has some ids."""
        ids, values, ended = self._answer(fed, data)
        ended = ended and (not self.longest or len(ids) < self.longest)
        calls: list[dict[str, Any]] = []
        if self.reads_calls and data.get("tools") and data.get("tool_choice") != "none":
            try:
                with _ENCODING:
                    read = read_calls(ids, self.oracle)
            except MalformedCallError:
                read = []
            calls = [
                {"function": {"name": self.named or one.name, "arguments": json.dumps(one.arguments)}} for one in read
            ]
        text = self._text(ids)
        message = {"content": "", "tool_calls": calls} if calls else {"content": text}
        choice: dict[str, Any] = {"message": message, "finish_reason": "stop" if ended else "length"}
        if data.get("logprobs"):
            choice["logprobs"] = {"content": self._listed(ids, values)}
        shown = {"prompt_token_ids": fed} if data.get("return_token_ids") else {}
        choice |= {"token_ids": ids} if data.get("return_token_ids") else {}
        usage = {"prompt_tokens": len(fed), "completion_tokens": len(ids)}
        return {"usage": usage, **shown, "choices": [choice]}


def events(message: Message, size: int = 3) -> Iterator[bytes]:
    """Yield the events of a stream with a message, its texts in parts of a few characters."""

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        data = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        return f"data: {json.dumps(data)}\n\n".encode()

    def parts(text: str) -> Sequence[str]:
        return [text[start : start + size] for start in range(0, len(text), size)]

    yield event({"role": "assistant", "content": None})
    for name in ("reasoning_content", "content"):
        yield from (event({name: part}) for part in parts(message.get(name) or ""))
    for index, call in enumerate(message.get("tool_calls") or ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield event({"tool_calls": [{"index": index, "id": call.get("id"), "function": {"name": name}}]})
        for part in parts(arguments):
            yield event({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
    yield event({}, message["finish_reason"])
    yield b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'
    yield b"data: [DONE]\n\n"


CRASH = (
    "Unable to generate parser for this template. Automatic parser generation failed: \n------------\nWhile executing "
    "CallExpression at line 248, column 18 in source:\n...{{ render_content(message['content']) }}...\n   ^\n"
    "Error: Not enough arguments provided to 'render_content'"
)
"""The words of llama.cpp (build 11549) for a macro that is called with too few arguments."""

FORCED = "GrammarFactory.get_lark_from_jinja() missing 1 required positional argument: 'force_tool_names'"
"""The words of vLLM 0.32.0 beside mistral-common 1.13.1."""


def has_calls(data: dict[str, Any]) -> bool:
    """Whether a message of a request has a tool call."""
    return any(message.get("tool_calls") for message in data["messages"])


def two_users(data: dict[str, Any]) -> bool:
    """Whether a request has two messages of the user in a row."""
    roles = [message["role"] for message in data["messages"]]
    return any(pair == ("user", "user") for pair in pairwise(roles))


def space_for_an_empty_text(ids: Ids, data: dict[str, Any]) -> Ids:
    """Put a space behind each [INST] without a text, as templates of SentencePiece tokenizers do (ids of `spm-v3`)."""
    space, begin, end = 29473, 3, 4
    found: list[int] = []
    for one, behind in zip(ids, (*ids[1:], 0), strict=True):
        found += [one, space] if one == begin and behind in (space, end) else [one]
    return tuple(found)


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


@contextmanager
def serving(behaviour: Behaviour, secure: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve until the end of the block, by TLS if a context is given, and yield the address with `http`."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            data = json.loads(self.rfile.read(length)) if length else None
            behaviour.seen.append((self.path, dict(self.headers), data))
            given = behaviour.answer(self.path)
            is_stream = False
            if given is None:
                status, value = behaviour.respond(self.path, data)
                is_stream = isinstance(value, bytes)
                given = status, value if is_stream else json.dumps(value).encode()
            self.send_response(given[0])
            if is_stream:
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            if 300 <= given[0] < 400:
                self.send_header("Location", given[1].decode())
            for name, text in behaviour.headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(given[1])))
            self.end_headers()
            # the client may have had enough
            try:
                self.wfile.write(given[1])
            except OSError:
                self.close_connection = True

        do_GET = do_POST = _handle  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if secure is not None:
        server.socket = secure.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
