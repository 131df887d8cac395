"""A server of the tests on the loopback: it answers as llama.cpp, vLLM or OpenAI do, with ids of mistral-common.

Its faults are those that a test names: an answer that hangs, is no JSON, leads elsewhere, or has other ids.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import OracleRejection

Ids = tuple[int, ...]
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
        seen: The requests: path, headers and data.
    """

    oracle: Oracle
    prompt: Callable[[Ids, dict[str, Any]], Ids] = lambda ids, _: ids
    preview: Callable[[Ids, dict[str, Any]], Ids] | None = None
    answer: Callable[[str], tuple[int, bytes] | None] = lambda _: None
    refuses: Callable[[dict[str, Any]], bool] = lambda _: False
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def ids(self, data: dict[str, Any]) -> Ids:
        """Return the ids of a chat request."""
        row = {"messages": [*data["messages"], {"role": "assistant", "content": "x"}]}
        # requests come in threads, and an oracle traces one conversation at a time
        with _ENCODING:
            return self.oracle.encode_prompt(row | ({"tools": data["tools"]} if "tools" in data else {}))

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        if path in ("/props", "/version"):
            return 200, {"build_info": "b1-test", "version": "0.0-test"}
        if path == "/tokenize":
            return 200, {"tokens": json.loads(data["content"])}
        if self.refuses(data):
            return 400, {"error": {"message": "Conversation roles must alternate"}}
        try:
            ids = self.ids(data)
        except OracleRejection as error:
            return 400, {"error": {"message": error.found}}
        if path == "/apply-template":
            # the text of this server is its ids
            return 200, {"prompt": json.dumps((self.preview or self.prompt)(ids, data))}
        fed = self.prompt(ids, data)
        shown = {"prompt_token_ids": fed} if data.get("return_token_ids") else {}
        return 200, {"usage": {"prompt_tokens": len(fed)}, **shown, "choices": [{"message": {"content": "x"}}]}


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """Serve until the end of the block, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            data = json.loads(self.rfile.read(length)) if length else None
            behaviour.seen.append((self.path, dict(self.headers), data))
            given = behaviour.answer(self.path)
            if given is None:
                status, value = behaviour.respond(self.path, data)
                given = status, json.dumps(value).encode()
            self.send_response(given[0])
            if 300 <= given[0] < 400:
                self.send_header("Location", given[1].decode())
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
