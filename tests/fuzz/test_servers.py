"""A hostile server: each run ends in time, with a finding or an error of our own, without the key, and not green by it.

Each case is a seed: the kind of server, and how it answers each request. The sound answers are those of mistral-common
in the forms of llama.cpp, vLLM and the others; a case changes some of them. A longer run:
`MISTRAL_LORA_FUZZ_SECONDS=600 pytest tests/fuzz/test_servers.py -s`.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import os
import random
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS
from golden_answers import golden_answers, write_golden_answers
from local_server import Behaviour

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.encoded.row_faults import other_oracles
from pytest_mistral_lora.serving import client, replay, servers
from pytest_mistral_lora.serving.client import KEY

FIRST_SEED = int(os.environ.get("MISTRAL_LORA_FUZZ_SEED", "0"))
SECRET = 'hostile/s3cr3t"key-0123'
LATE = 0.7
"""Limit of a request of the client, in seconds."""
LONGEST = 30.0
"""Longest time of one run: four requests in a row that are late end it, and what is slow is in the machine."""
MOST_MEMORY = 1 << 30
KINDS = ("llamacpp", "vllm", "openai", "sglang", "ollama", "auto")
FORMATS = ("text", "json", "github")
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    {"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]},
]
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
"""Characters that a terminal, or a reader's eye, would obey."""

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m \u202eevil\u2066 \u200f::error::x\n::stop-commands::y\n</pre><script>"
NUMBERS = [
    -1,
    5,
    True,
    0,
    1.5,
    10**9,
    10**30,
    10**400,
    -(10**400),
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    2**31 - 1,
    2**63,
]
VALUES: list[Any] = [
    *(None, True, False, *NUMBERS),
    *("", "x", "1", HOSTILE, "\ud800", SECRET, "a" * 100_000, "[INST]", "</s>", "force_tool_names"),
    *([], {}, [[]], [None], [{}], [1.5], ["1"], [True], [10**30], [-1], {"": {"": []}}, list(range(100_000))),
    *({"message": SECRET + HOSTILE}, [HOSTILE, SECRET], {SECRET: SECRET}, {"error": {"message": [SECRET]}}),
]


def spelled(random_: random.Random) -> str:
    """Return the key as a server may echo it."""
    ways: list[Callable[[str], str]] = [
        str,
        lambda key: json.dumps(key)[1:-1],
        lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
        lambda key: "".join(f"\\u{ord(letter):04x}" for letter in key),
        lambda key: urllib.parse.quote(key, safe=""),
        html.escape,
        lambda key: "".join(f"&#{ord(letter)};" for letter in key),
        lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
        lambda key: key.encode().hex(),
        lambda key: "\u200b".join(key),
        lambda key: "\n".join(key),
        str.upper,
    ]
    return random_.choice(ways)(SECRET)


def shows_key(text: str) -> str:
    """Return the part of a text that has the key, as it is or in a spelling that is undone; empty if none has."""
    known = (SECRET, SECRET.encode().hex(), base64.b64encode(f"Bearer {SECRET}".encode()).decode()[10:-4])
    undone = [text, html.unescape(text), urllib.parse.unquote(text), re.sub(r"\\(.)", r"\1", text)]
    undone.append(re.sub(r"\\+u00([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text))
    for one in (*undone, *(re.sub(r"[\s\u200b\\]", "", one) for one in undone)):
        for secret in known:
            if (at := one.lower().find(secret.lower())) >= 0:
                return one[max(0, at - 80) : at + 120]
    return ""


def changed(value: Any, random_: random.Random) -> Any:
    """Return a JSON value with something in it replaced, removed or repeated."""
    if isinstance(value, dict) and value and random_.random() < 0.95:
        key = random_.choice(list(value))
        if random_.random() < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: changed(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.9:
        at = random_.randrange(len(value))
        if random_.random() < 0.1:
            return value[:at] * random_.choice([0, 2, 100])
        return [*value[:at], changed(value[at], random_), *value[at + 1 :]]
    if random_.random() < 0.15:
        return spelled(random_)
    is_number = isinstance(value, int | float)
    return random_.choice(NUMBERS if is_number and random_.random() < 0.6 else VALUES)


KEYS = (
    *("data", "id", "parent", "model_ftype", "build_info", "version", "path", "scale", "prompt", "tokens", "content"),
    *("stop_type", "completion_probabilities", "logprob", "token", "top_logprobs", "choices", "message", "tool_calls"),
    *("finish_reason", "logprobs", "token_ids", "prompt_token_ids", "usage", "prompt_tokens", "completion_tokens"),
    *("text", "token_logprobs", "models", "name", "arguments", "function", "prompt_eval_count", "done_reason"),
    *("tokenize_response", "_debug_info", "rendered_template", "error"),
)
"""The names of the fields that a client reads."""


def planted(value: Any, key: str, bad: Any) -> tuple[Any, bool]:
    """Return a JSON value with another one wherever a key has one, and whether it was found."""
    if isinstance(value, dict):
        inner = {name: (bad, True) if name == key else planted(one, key, bad) for name, one in value.items()}
        return {name: one for name, (one, _) in inner.items()}, any(found for _, found in inner.values())
    if isinstance(value, list):
        items = [planted(one, key, bad) for one in value]
        return [one for one, _ in items], any(found for _, found in items)
    return value, False


def keys_of(value: Any) -> Iterator[str]:
    """Yield each key of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(inner)


def with_planted(value: Any, random_: random.Random) -> Any:
    """Return an answer in which a field has another value; one that has no such field gets it beside others."""
    present = sorted(set(keys_of(value)))
    key = random_.choice(present if present and random_.random() < 0.7 else KEYS)
    others = [spelled(random_), "5", [5], [[5]], {"5": 5}, None, []]
    bad = random_.choice(random_.choice([NUMBERS, others, VALUES]))
    value, is_there = planted(value, key, bad)
    homes = [value]
    while not is_there and isinstance(homes[-1], dict | list) and homes[-1]:
        homes.append(random_.choice([*(homes[-1].values() if isinstance(homes[-1], dict) else homes[-1])]))
    inner = [home for home in homes if isinstance(home, dict)]
    if not is_there and inner:
        random_.choice(inner)[key] = bad
    return value


BODIES: list[Callable[[bytes], bytes]] = [
    *(
        (lambda body, text=text: text)
        for text in (b"", b"{}", b"[]", b"null", b"NaN", b"-Infinity", b"7", b'"x"', b"\xff\xfe")
    ),
    lambda body: body[: len(body) // 2],
    lambda body: b"\xef\xbb\xbf" + body,
    lambda body: b"[" * 100_000,
    lambda body: b"[" * 900 + b"]" * 900,
    lambda body: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    lambda body: b'{"choices": [' + b"9" * 5_000 + b"]}",
    lambda body: b'{"data": [' + b"{}," * 500_000 + b"{}]}",
    lambda body: b'{"tokens": [' + b"1," * 2_000_000 + b"1]}",
    lambda body: b'{"tokens": [' + b"1000," * 200_000 + b"1]}",
    lambda body: b" " * 9_000_000 + body,
    lambda body: json.dumps({"error": {"message": HOSTILE + SECRET, "type": SECRET}}).encode(),
    lambda body: f"<html>{HOSTILE} Bearer {SECRET}</html>".encode(),
    lambda body: body + body,
]


def zipped(body: bytes, layers: int, random_: random.Random) -> tuple[bytes, str]:
    """Return a body in layers of packing, and the header that names them."""
    names = []
    for _ in range(layers):
        name = random_.choice(["gzip", "deflate"])
        body = gzip.compress(body) if name == "gzip" else zlib.compress(body)
        names.append(name)
    return body, ", ".join(names)


@dataclass
class Hostile:
    """A server of one seed.

    Attributes:
        behaviour: The sound answers.
        random: Decides every change.
        share: The share of requests that are answered otherwise.
        tricks: What is done to them.
        only: The one endpoint that is answered otherwise; empty for all.
        done: The tricks that were used.
    """

    behaviour: Behaviour
    random: random.Random
    share: float
    tricks: list[str]
    only: str
    done: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the sound answer of an endpoint."""
        ids = None
        if path == "/api/tags":
            return 200, {"models": [{"name": "tiny:latest"}]}
        if path in ("/server_info", "/api/version"):
            return 200, {"version": "0.0-test"}
        if path == "/api/chat":
            answer = {"message": {"role": "assistant", "content": "x"}, "done_reason": "stop"}
            return 200, {**answer, "prompt_eval_count": len(self.behaviour.ids(data))}
        status, answer = self.behaviour.respond(path, data)
        if isinstance(data, dict) and data.get("return_prompt_token_ids"):
            ids = list(self.behaviour.ids(data))
            answer["choices"][0]["prompt_token_ids"] = ids
        return status, answer

    def write(self, path: str, data: Any, connection: socket.socket) -> None:
        """Answer a request."""
        with self.lock:
            try:
                status, value = self.respond(path, data)
            except (KeyError, TypeError, AttributeError, ValueError):
                # a request that was made of a hostile answer
                status, value = 400, {"error": {"message": "bad request"}}
            is_chosen = self.only in ("", path) and self.random.random() < self.share
            trick = self.random.choice(self.tricks) if is_chosen else "none"
            self.done[trick] += 1
            writes = list(self.parts(trick, status, value))
        for part, pause in writes:
            connection.sendall(part)
            time.sleep(pause)
        if trick in ("endless", "trickle", "interim", "headers"):
            self.go_on(trick, connection)

    def parts(self, trick: str, status: int, value: Any) -> Iterator[tuple[bytes, float]]:
        """Yield what is sent, each part with the seconds to wait behind it."""
        random_, more, length = self.random, "", None
        if trick == "value":
            for _ in range(random_.choice([1, 1, 2, 5])):
                value = changed(value, random_)
        elif trick == "planted":
            value = with_planted(value, random_)
        body = json.dumps(value).encode("utf-8", "backslashreplace")
        if trick == "body":
            body = random_.choice(BODIES)(body)
        elif trick == "status":
            status = random_.choice(
                [100, 101, 204, 206, 301, 302, 308, 400, 401, 404, 418, 422, 500, 501, 502, 503, 599, 999]
            )
            body = random_.choice(
                [body, json.dumps({"error": {"message": HOSTILE + spelled(random_)}}).encode(), b"oops"]
            )
            place = random_.choice(["/", "http://127.0.0.1:9/", "//evil.example/", "\\x1b[2J"])
            more = f"Location: {place}\r\n"
        elif trick == "packed":
            body, name = zipped(b"0" * 20_000_000 if random_.random() < 0.5 else body, random_.randint(1, 4), random_)
            more = f"Content-Encoding: {random_.choice([name, 'br', 'zstd', 'gzip, gzip', 'identity', 'x' * 500])}\r\n"
        elif trick == "length":
            length = random_.choice([0, 1, len(body) - 1, len(body) + 5, 10**18, -1, 10**400])
        elif trick == "chunked":
            size = random_.choice([b"zz", b"ffffffffffffffffffff", b"-1", b"%x" % (len(body) + 7), b"%x" % len(body)])
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            yield head + size + b"\r\n" + body + b"\r\n0\r\n\r\n", 0
            return
        elif trick == "line":
            lines = [
                b"\x00" * 100,
                b"HTTP/9.9 x\r\n\r\n",
                b"HTTP/1.1\r\n\r\n",
                b"SSH-2.0-x\r\n",
                b"\r\n" * 1000,
                b"HTTP/1.1 200 " + b"a" * 200_000,
            ]
            yield random_.choice(lines), 0
            return
        elif trick == "cookies":
            more = "".join(f"Set-Cookie: a{number}={'x' * 900}; Domain=127.0.0.1\r\n" for number in range(50))
        elif trick == "early":
            return
        elif trick in ("endless", "trickle", "interim", "headers"):
            if trick in ("endless", "trickle"):
                yield b"HTTP/1.1 200 OK\r\n\r\n", 0
            elif trick == "headers":
                yield b"HTTP/1.1 200 OK\r\n", 0
            return
        head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body) if length is None else length}\r\n{more}\r\n"
        yield head.encode("latin-1", "replace") + body, 0

    def go_on(self, trick: str, connection: socket.socket) -> None:
        """Send without an end, until the client has had enough."""
        part, pause = {
            "endless": (b"1" * 65_536, 0.0),
            "trickle": (b" ", 0.1),
            "interim": (b"HTTP/1.1 100 Continue\r\n\r\n", 0.0001),
            "headers": (b"x: y\r\n", 0.0001),
        }[trick]
        end = time.monotonic() + 5 * LATE
        while time.monotonic() < end:
            connection.sendall(part)
            time.sleep(pause)


@contextmanager
def hostile_server(hostile: Hostile) -> Iterator[str]:
    """Serve until the end of the block, and yield the address."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = 10

        def handle(self) -> None:
            with suppress(OSError, ValueError):
                first = self.rfile.readline(65_537).split()
                length = 0
                while (line := self.rfile.readline(65_537)) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                data = json.loads(self.rfile.read(length)) if length else None
                hostile.write(first[1].decode(), data, self.connection)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Print nothing."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(timeout=10)


TRICKS = (
    *("value",) * 6,
    *("planted",) * 8,
    *("body",) * 4,
    "status",
    "status",
    "packed",
    "length",
    "chunked",
    "line",
    "cookies",
    "early",
)
ENDPOINTS = {
    "llamacpp": ("/v1/models", "/props", "/lora-adapters", "/apply-template", "/tokenize", "/completion"),
    "vllm": ("/v1/models", "/version", "/v1/chat/completions", "/v1/completions"),
    "openai": ("/v1/models", "/v1/chat/completions"),
    "sglang": ("/v1/models", "/server_info", "/v1/chat/completions"),
    "ollama": ("/api/tags", "/api/version", "/api/chat"),
    "auto": ("/props", "/version", "/server_info", "/api/version", "/v1/models"),
}
SLOW = ("endless", "trickle", "interim", "headers")


class Fuzz:
    """Runs the cases, and counts them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._oracle = Oracle(shipped_tokenizer("spm-v3"))
        self._folder, self._capsys = folder, capsys
        self._answers = write_golden_answers(self._oracle, folder / "answers")
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        self.codes: Counter[int] = Counter()
        self.tricks: Counter[str] = Counter()
        self.slowest, self.largest = 0.0, 0

    def case(self, seed: int) -> None:
        """Judge one hostile server, and check what the user gets."""
        random_ = random.Random(seed)
        kind, form = random_.choice(KINDS), random_.choice(FORMATS)
        tricks = [random_.choice(SLOW)] if random_.random() < 0.05 else random_.sample(TRICKS, random_.randint(1, 4))
        models = [{"id": "base"}, {"id": "answers", "parent": "base"}] if kind == "vllm" else [{"id": "tiny"}]
        behaviour = Behaviour(self._oracle, golden=golden_answers(self._oracle), models=models)
        only = random_.choice(["", *ENDPOINTS[kind]])
        share = random_.choice([0.5, 1.0] if only else [0.1, 0.4, 1.0])
        hostile = Hostile(behaviour, random_, share, tricks, only)
        report, page = self._folder / "report.json", self._folder / "report.html"
        words = ["--tokenizer", "spm-v3", "--rows", str(self._folder / "rows.jsonl"), "--output-format", form]
        words += ["--report", str(report), "--report", str(page)]
        words += ["--golden", str(self._answers)] if random_.random() < 0.6 else []
        self._capsys.readouterr()
        before = memory("VmRSS") if reset_peak() else 0
        start, cpu = time.monotonic(), time.process_time()
        with hostile_server(hostile) as url:
            code = main(["serve-check", f"{kind}={url}", *words])
        seconds = time.monotonic() - start
        out = "".join(self._capsys.readouterr())
        note = f"seed {seed}: {kind}, {form}, {tricks} at {only or 'all'}, exit {code}, {seconds:.1f} s"
        grown = memory("VmHWM") - before if before else 0
        assert grown < MOST_MEMORY, f"{note}: {grown >> 20} MiB more memory"
        assert code in (0, 1, 2), note
        assert "Traceback" not in out, f"{note}\n{out}"
        # the client and the server of the test are this process; on the clock they may wait for a busy machine
        assert time.process_time() - cpu < LONGEST, note
        assert seconds < 5 * LONGEST, note
        texts = {"output": out} | {file.name: file.read_text() for file in (report, page) if file.is_file()}
        for name, text in texts.items():
            seen = shows_key(text)
            assert not seen, f"{note}: the key is in {name}: {seen}"
        if form == "text":
            assert not OBEYED.search(out), f"{note}: {OBEYED.search(out)}\n{out!r}"
        data = json.loads(texts["report.json"])
        outcomes = {one["case"]: one["outcome"] for one in data["checks"]}
        judged = ("prompts", "counts", "refusals")
        assert code != 0 or any(outcomes.get(name) == "passed" for name in judged), f"{note}\n{out}"
        self.codes[code] += 1
        self.tricks.update(hostile.done)
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, grown)
        for file in (report, page):
            file.unlink(missing_ok=True)


def reset_peak() -> bool:
    """Set the peak of this process's memory to what it has now; return False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(name: str) -> int:
    """Return a value of this process's memory in bytes: `VmRSS`, or the peak `VmHWM`."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_a_hostile_server_is_judged_in_bounds_and_never_green_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    for module in (client, replay, servers):
        monkeypatch.setattr(module, "SECONDS", LATE)
    fuzz = Fuzz(tmp_path, capsys)
    # the tokenizers that prompts of another one are compared with
    assert [*other_oracles(Oracle(shipped_tokenizer("spm-v3")))]
    fuzz.case(FIRST_SEED)
    end, seed = time.monotonic() + SECONDS, FIRST_SEED + 1
    while time.monotonic() < end:
        fuzz.case(seed)
        seed += 1
    with capsys.disabled():
        if SECONDS >= 60:
            counts = f"{seed - FIRST_SEED} servers, exits {dict(fuzz.codes)}, answers {dict(fuzz.tricks)}"
            sys.stdout.write(f"\n{counts}; {fuzz.slowest:.1f} s at most, {fuzz.largest >> 20} MiB more memory\n")
    assert fuzz.codes[1] > 0
