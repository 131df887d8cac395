"""Hostile and broken servers: each ends in an error of our own, in time, and the key is written nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import re
import shutil
import socketserver
import ssl
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_server import CRASH, FORCED, Behaviour, has_calls, serving, two_users

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main, serve_check
from pytest_mistral_lora.errors import InputError, NoAnswerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.addresses import require_url
from pytest_mistral_lora.records.asking_limits import AT_ONCE
from pytest_mistral_lora.serving import client as clients
from pytest_mistral_lora.serving.answers import chat_answer, streamed_answer
from pytest_mistral_lora.serving.client import KEY, Answer, ServerClient

Give = Callable[[str], tuple[int, bytes] | None]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


def ask(url: str, path: str = "/v1/models", seconds: float = 10) -> Answer:
    async def once() -> Answer:
        async with ServerClient(require_url(url), seconds) as client:
            return await client.get(path)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("127.0.0.1:8080", "no address of a server"),
        ("https://a..b", "no address of a server"),
        (f"https://{'a' * 70}.com", "no address of a server"),
        ("https://xn--zzzzzz\N{EURO SIGN}.com", "no address of a server"),
        ("ftp://127.0.0.1", "no address of a server"),
        ("http://example.org", "http to another machine"),
        ("http://127.0.0.1.example.org", "http to another machine"),
        ("http://user:secret@127.0.0.1", "a password in the address"),
    ],
)
def test_an_address_that_is_not_asked(url: str, found: str) -> None:
    with pytest.raises(InputError, match=found) as error:
        require_url(url)
    assert "secret" not in str(error.value)


def test_an_address_that_is_asked() -> None:
    for url in ("http://127.0.0.1:8080/", "http://localhost:1", "http://[::1]:1", "https://example.org/llm"):
        assert require_url(url) == url.rstrip("/")
    with pytest.raises(InputError) as error:
        require_url("localhost:8080")
    assert error.value.expected == "http://localhost:8080"


def test_a_server_that_does_not_answer_in_time(oracle: Oracle) -> None:
    def hang(path: str) -> None:
        time.sleep(3)

    start = time.monotonic()
    with serving(Behaviour(oracle, answer=hang)) as url, pytest.raises(InputError, match=r"no answer in 0\.5 s"):
        ask(url, seconds=0.5)
    assert time.monotonic() - start < 30


def test_an_answer_without_end_is_cut(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_LARGEST", 1 << 16)
    behaviour = Behaviour(oracle, answer=lambda path: (200, b"x" * (1 << 20)))
    with serving(behaviour) as url, pytest.raises(InputError, match="the answer is larger than"):
        ask(url)


def packed(layers: int) -> bytes:
    """Return 64 MB of zeros, packed again and again."""
    body = bytes(64 << 20)
    for _ in range(layers):
        body = gzip.compress(body)
    return body


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", lambda: packed(1)),
        ("gzip, gzip, gzip", lambda: packed(3)),
        ("deflate", lambda: zlib.compress(b'{"data": []}')),
        ("br", lambda: b"x"),
        ("zstd", lambda: b"x"),
    ],
)
def test_an_answer_that_is_packed_is_refused_and_not_unpacked(
    encoding: str, pack: Callable[[], bytes], oracle: Oracle
) -> None:
    body = pack()
    behaviour = Behaviour(oracle, answer=lambda path: (200, body), headers={"Content-Encoding": encoding})
    with serving(behaviour) as url:
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=rf"the answer is packed \({encoding}\), and identity was asked for"):
                ask(url)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
    [(_, headers, _)] = behaviour.seen
    assert headers.get("accept-encoding", headers.get("Accept-Encoding")) == "identity"


def test_cookies_of_a_server_are_not_sent_back(oracle: Oracle) -> None:
    async def twice(url: str) -> None:
        async with ServerClient(require_url(url), 10) as client:
            await client.get("/v1/models")
            await client.get("/v1/models")

    behaviour = Behaviour(oracle, headers={"Set-Cookie": "a=b"})
    with serving(behaviour) as url:
        asyncio.run(twice(url))
    assert len(behaviour.seen) == 2
    assert not any(name.lower() == "cookie" for _, headers, _ in behaviour.seen for name in headers)


@pytest.mark.parametrize(
    ("status", "pause"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        pytest.param(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", marks=pytest.mark.slow),
        pytest.param(b"", b"HTTP/1.1 100 Continue\r\n\r\n", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_never_ends_its_answers_is_asked_four_requests_at_most(
    status: bytes, pause: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bytes] = []

    class Trickling(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline())
            with suppress(OSError):
                self.wfile.write(status)
                for _ in range(40):
                    self.wfile.write(pause)
                    time.sleep(0.1)

    monkeypatch.setattr(clients, "SECONDS", 0.5)
    start = time.monotonic()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Trickling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        code, out = run_check(f"http://127.0.0.1:{server.server_address[1]}", capsys, kind="vllm")
        server.shutdown()
    assert (code, "no answer in 0.5 s" in out) == (1, True), out
    assert len(asked) <= clients.MOST_LATE
    assert time.monotonic() - start < 20


def test_late_answers_in_a_row_end_the_run_and_one_that_comes_begins_the_count_again(oracle: Oracle) -> None:
    async def many(url: str, paths: list[str]) -> list[str]:
        async with ServerClient(require_url(url), 0.3) as client:
            # one after another
            asked = [await asyncio.gather(client.get(path), return_exceptions=True) for path in paths]
        return [type(answer).__name__ for [answer] in asked]

    behaviour = Behaviour(oracle, answer=lambda path: time.sleep(1) if path == "/late" else (200, b"{}"))
    with serving(behaviour) as url:
        assert set(asyncio.run(many(url, ["/late"] * 9))) == {"NoAnswerError"}
        assert len(behaviour.seen) == clients.MOST_LATE
        mixed = asyncio.run(many(url, ["/late", "/late", "/late", "/now"] * 2))
    assert mixed == ["NoAnswerError", "NoAnswerError", "NoAnswerError", "Answer"] * 2


class KeepingHandler(BaseHTTPRequestHandler):
    """Keeps its connections open, as servers of models do."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def answering(handler: type[KeepingHandler]) -> Iterator[str]:
    """Answer by a handler until the end of the block, and yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("dropped", "found"),
    [
        ((2,), "200"),
        ((2, 3), "200"),
        ((2, 3, 4), "RemoteProtocolError"),
        ((1,), "RemoteProtocolError"),
    ],
)
def test_a_request_whose_connection_the_server_closes_is_sent_again(dropped: tuple[int, ...], found: str) -> None:
    seen: list[str] = []

    class Dropping(KeepingHandler):
        def do_GET(self) -> None:
            # a server that closes an idle connection does not see the request
            seen.append(self.path)
            self.close_connection = len(seen) in dropped
            if not self.close_connection:
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

    async def ask_twice(url: str) -> str:
        async with ServerClient(url, 10) as client:
            try:
                await client.get("/v1/models")
                return str((await client.get("/v1/models")).status)
            except InputError as error:
                return error.found

    with answering(Dropping) as url:
        assert found in asyncio.run(ask_twice(url)).split()
    # nothing is sent again to a server that has never answered
    assert len(seen) == (1 if 1 in dropped else 2 + min(len(dropped), 2))


def test_an_answer_that_ends_in_its_middle_is_not_asked_for_again() -> None:
    seen: list[str] = []

    class Breaking(KeepingHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "9" if len(seen) > 1 else "2")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = len(seen) > 1

    async def ask_twice(url: str) -> None:
        async with ServerClient(url, 10) as client:
            await client.get("/v1/models")
            with pytest.raises(InputError, match="RemoteProtocolError peer closed"):
                await client.get("/v1/models")

    with answering(Breaking) as url:
        asyncio.run(ask_twice(url))
    assert len(seen) == 2


def test_a_redirect_is_not_followed(oracle: Oracle) -> None:
    with serving(Behaviour(oracle)) as other:
        behaviour = Behaviour(oracle, answer=lambda path: (302, f"{other}/v1/models".encode()))
        with serving(behaviour) as url:
            assert ask(url).status == 302


def test_a_busy_server_is_asked_again(oracle: Oracle) -> None:
    seen: list[str] = []

    def busy_once(path: str) -> tuple[int, bytes] | None:
        seen.append(path)
        return (503, b"{}") if len(seen) == 1 else None

    with serving(Behaviour(oracle, answer=busy_once)) as url:
        assert ask(url).is_ok
    assert len(seen) == 2


@pytest.mark.parametrize(("status", "body"), [(401, b"{}"), (403, b"no")])
def test_a_refused_key_names_the_variable(status: int, body: bytes, oracle: Oracle) -> None:
    with serving(Behaviour(oracle, answer=lambda path: (status, body))) as url, pytest.raises(InputError, match=KEY):
        ask(url)


@pytest.mark.parametrize(("key", "asks"), [("", "asks for a key"), ("wrong", "refuses the key")])
def test_a_missing_key_and_a_wrong_one_are_told_apart(
    key: str, asks: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, key)
    behaviour = Behaviour(oracle, answer=lambda path: (401, b"{}"))
    with serving(behaviour) as url, pytest.raises(InputError, match=asks):
        ask(url)


def test_the_line_break_of_a_file_ends_a_key_and_is_no_part_of_it(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "s3cr3t\n")
    behaviour = Behaviour(oracle, answer=lambda path: (200, b'["s3cr3t"]'))
    with serving(behaviour) as url:
        assert ask(url).text == '["***"]'
    [(_, headers, _)] = behaviour.seen
    assert headers.get("authorization", headers.get("Authorization")) == "Bearer s3cr3t"


@pytest.mark.parametrize("key", ["s3c\nr3t", "s3cr3té"])
def test_a_key_that_no_request_can_have_is_an_error_that_does_not_print_it(
    key: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, key)
    behaviour = Behaviour(oracle)
    with serving(behaviour) as url:
        code, out = run_check(url, capsys)
    assert (code, "no request can have" in out, "r3t" in out, "s3c" in out) == (1, True, False, False), out
    assert not behaviour.seen


def test_https_to_a_server_without_a_certificate_names_the_way_out(oracle: Oracle) -> None:
    with serving(Behaviour(oracle)) as url, pytest.raises(InputError, match="no secure connection") as plain:
        ask(url.replace("http:", "https:"))
    assert "write http://" in plain.value.next_step


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_the_other_scheme_and_a_certificate_that_nobody_trusts_name_the_way_out(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = "req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=me"
    made += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *made.split()], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with serving(Behaviour(oracle), context) as url:
        with pytest.raises(InputError, match="the connection failed") as reset:
            ask(url)
        assert "write https://" in reset.value.next_step
        secure = url.replace("http:", "https:")
        with pytest.raises(InputError, match="its certificate is not trusted") as unknown:
            ask(secure)
        assert "SSL_CERT_FILE" in unknown.value.next_step
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        assert ask(secure).is_ok


def test_a_server_that_ends_in_the_middle_is_not_waited_for_row_by_row(
    oracle: Oracle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", counted)
    ended: list[str] = []

    async def send(self: ServerClient, method: str, path: str, data: Any) -> Answer:
        if path == "/apply-template" or ended:
            ended.append(path)
            raise httpx.ConnectError("connection refused")
        return await real(self, method, path, data)

    real = ServerClient._send
    monkeypatch.setattr(ServerClient, "_send", send)
    with serving(Behaviour(oracle)) as url:
        code, out = run_check(url, capsys)
    assert (code, "no server answers there any more" in out) == (1, True), out
    # nothing is judged of rows that were not answered
    assert "no row was answered" in out
    assert len(waited) <= 3 * AT_ONCE


@pytest.fixture(scope="module")
def one_row(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The options for a row in place of the packaged ones, for what each request has."""
    rows = tmp_path_factory.mktemp("rows") / "one.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')
    return "--rows", str(rows)


def run_check(url: str, capsys: pytest.CaptureFixture[str], *options: str, kind: str = "llamacpp") -> tuple[int, str]:
    code = main(["serve-check", f"{kind}={url}", "--tokenizer", "spm-v3", *options])
    return code, "".join(capsys.readouterr())


def test_the_key_is_sent_and_written_nowhere(
    oracle: Oracle, one_row: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, "s3cr3t-key")

    def echo(path: str) -> tuple[int, bytes] | None:
        return (400, b'{"error": {"message": "bad key s3cr3t-key"}}') if path == "/apply-template" else None

    behaviour = Behaviour(oracle, answer=echo)
    with serving(behaviour) as url:
        for form in ("text", "json", "github"):
            code, out = run_check(url, capsys, "--output-format", form, *one_row)
            assert code == 1
            assert "s3cr3t" not in out
            assert "bad key ***" in out
    assert {headers.get("authorization", headers.get("Authorization")) for _, headers, _ in behaviour.seen} == {
        "Bearer s3cr3t-key"
    }


ECHOED = (
    # a JSON decoder undoes the escapes
    b'{"error": {"message": "bad key \\u0073\\u0033cr3t\\/key"}}',
    # not JSON
    b"bad key s3cr3t/key",
    # cut where a part of the key would be left
    b"bad key " + b"x" * 285 + b" s3cr3t/key",
    b"bad key " + b"x" * 19_984 + b" s3cr3t/key" + b"y" * 9_000,
    b'{"error": {"message": "bad key ' + b"x" * 19_988 + b"s3cr3t/key" + b"y" * 9_000 + b'"}}',
)


@pytest.mark.parametrize("answer", ECHOED)
def test_a_key_that_is_echoed_is_found_after_decoding_and_before_cutting(
    answer: bytes, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is hidden where an answer is read: what follows never has it."""
    monkeypatch.setenv(KEY, "s3cr3t/key")
    with serving(Behaviour(oracle, answer=lambda path: (400, answer))) as url:
        read = ask(url)
    assert "bad key" in read.error
    assert not re.search("s3c|cr3t", read.error)


@pytest.mark.parametrize("path", ["/apply-template", "/v1/models"])
def test_a_key_that_is_echoed_is_in_no_output(
    path: str,
    oracle: Oracle,
    one_row: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(KEY, "s3cr3t/key")
    files = [tmp_path / "report.json", tmp_path / "report.html"]
    options = [word for file in files for word in ("--report", str(file))]
    behaviour = Behaviour(oracle, answer=lambda asked: (400, ECHOED[0]) if asked == path else None)
    with serving(behaviour) as url:
        for form in ("text", "json", "github"):
            code, out = run_check(url, capsys, "--output-format", form, *one_row, *options)
            assert (code, "bad key" in out) == (1, True), out
            assert not re.search("s3c|cr3t", "".join([out, *(file.read_text() for file in files)]))


@pytest.mark.parametrize("path", [pytest.param("/v1/models", marks=pytest.mark.slow), "/props"])
def test_what_a_server_says_of_itself_is_shown_without_control_characters_and_bounded(
    path: str, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;owned\x07\x9b31m\rML902 \u202eevil\u2066\n::error::x" + "long " * 100
    said = {"/v1/models": {"data": [{"id": hostile}]}, "/props": {"build_info": hostile * 100, "model_ftype": hostile}}
    body = json.dumps(said[path]).encode()
    with serving(Behaviour(oracle, answer=lambda asked: (200, body) if asked == path else None)) as url:
        _, out = run_check(url, capsys)
    assert "owned" in out
    assert not set("\x1b\x07\x9b\r\u202e\u2066") & set(out)
    assert "\n::error" not in out
    assert max(map(len, out.splitlines())) < 4_000


def test_a_prompt_that_no_row_can_have_is_a_finding(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')
    with serving(Behaviour(oracle, prompt=lambda ids, _: (*ids, *[5] * 70_000))) as url:
        code, out = run_check(url, capsys, "--rows", str(rows), kind="vllm")
    assert (code, "a prompt of 70,004 tokens or characters for a row of" in out) == (1, True), out


def test_rows_that_fail_for_one_cause_are_one_finding_beside_those_of_another(
    oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(oracle, refuses=has_calls, refusal=(500, CRASH))) as url:
        code, out = run_check(url, capsys)
    assert (code, len(re.findall("^ML919 ", out, re.MULTILINE)), "ML907" in out) == (1, 1, False), out
    assert re.search(r"and [0-9]+ more like it", out)
    assert "HTTP 500: Unable to generate parser" in out
    assert "--chat-template-file template.jinja" in out

    def refused(data: dict[str, Any]) -> bool:
        return two_users(data) or has_calls(data)

    with serving(Behaviour(oracle, refuses=refused, refusal=(400, "Error: Jinja Exception: not at line 248"))) as url:
        code, out = run_check(url, capsys)
    assert (code, len(re.findall("^ML907 ", out, re.MULTILINE)), "ML919" in out) == (1, 1, False), out


def test_a_failure_that_is_known_names_the_versions_that_work(
    oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(oracle, refuses=lambda _: True, refusal=(400, FORCED))) as url:
        code, out = run_check(url, capsys, kind="vllm")
    assert (code, len(re.findall("^ML919 ", out, re.MULTILINE)), "ML907" in out) == (1, 1, False), out
    assert "HTTP 400: GrammarFactory.get_lark_from_jinja() missing" in out
    assert "vllm ==0.32.0, mistral-common >=1.13 (ML919): " in out
    assert "pip install 'vllm==0.32.0' 'mistral-common==1.12.0'" in out
    # no template mends it
    assert "--chat-template" not in out


def test_a_server_of_mistral_common_s_prompts_is_green(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    behaviour = Behaviour(oracle)
    with serving(behaviour) as url:
        for kind, proof in (("llamacpp", "preview"), ("vllm", "ids"), ("openai", "count")):
            code, out = run_check(url, capsys, kind=kind)
            assert code == 0, out
            assert f"proof by {proof}" in out
    # a server that hides its ids is never a pass on ids
    assert "does not show the ids of a prompt" in out
    # one greedy token a row, and no weights
    chats: list[Any] = [data for path, _, data in behaviour.seen if path == "/v1/chat/completions"]
    assert all(data["max_tokens"] == 1 and data["temperature"] == 0 for data in chats)
    assert not any("weight" in message for data in chats for message in data["messages"])
    # vLLM refuses a call whose arguments are an object
    calls = [call for data in chats for one in data["messages"] for call in one.get("tool_calls", ())]
    assert calls
    assert all(isinstance(call["function"]["arguments"], str) for call in calls)


def test_the_rows_and_the_model_of_the_user_are_asked(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')
    behaviour = Behaviour(oracle)
    with serving(behaviour) as url:
        code, out = run_check(url, capsys, "--rows", str(rows), kind="vllm")
        assert (code, "1 of 1 prompts have the ids" in out) == (0, True)
        code, out = run_check(url, capsys, "--model", "tuned")
    assert code == 1
    assert "the model 'tuned' is not served" in out
    assert "one of: tiny" in out


def test_a_kind_that_is_unknown_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_check("http://127.0.0.1:1", capsys, kind="lmstudio")
    assert code == 2
    assert "expected one of llamacpp, vllm, sglang, ollama, openai" in out


def test_the_events_of_a_stream_end_with_a_line_and_no_other_separator() -> None:
    lines = [
        'data: {"text": "a\u2028b\x85c"}',
        ": a comment",
        "id: 7",
        'error: {"message": "no"}',
        "data: [DONE]",
        "data: 1",
    ]
    found = ['{"text": "a\u2028b\x85c"}', '{"error":  {"message": "no"}}']
    assert [event.strip() for event in clients._events("\r\n\r\n".join(lines))] == found


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_to_come_back_later_is_waited_for(form: str, oracle: Oracle) -> None:
    given = iter([(429, b'{"error": {"message": "slow down"}}')] * 2)
    header = "0.3" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    behaviour = Behaviour(oracle, answer=lambda path: next(given, None), headers={"Retry-After": header})
    start = time.monotonic()
    with serving(behaviour) as url:
        assert ask(url).is_ok
    assert (len(behaviour.seen), 0.3 <= time.monotonic() - start < 20) == (3, True)


def test_a_server_that_stays_busy_is_called_busy_and_its_words_are_shown(oracle: Oracle) -> None:
    busy = (429, b'{"error": {"message": "slow down"}}')
    behaviour = Behaviour(oracle, answer=lambda path: busy, headers={"Retry-After": "3600"})
    with serving(behaviour) as url, pytest.raises(NoAnswerError, match="Retry-After 3600 s: slow down"):
        ask(url)
    assert len(behaviour.seen) == 1


@pytest.mark.parametrize("is_all", [True, False], ids=["all", "of-versions"])
@pytest.mark.parametrize("kind", ["", "llamacpp="])
def test_a_server_that_is_too_busy_to_be_recognised_is_called_busy(
    is_all: bool, kind: str, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = (429, b'{"error": {"message": "slow down"}}')
    # without the endpoints that show its kind, any server looks like one of OpenAI's kind
    behaviour = Behaviour(
        oracle,
        answer=lambda path: busy if is_all or path in ("/version", "/props", "/api/version") else None,
        headers={"Retry-After": "90"},
    )
    with serving(behaviour) as url:
        code = main(["serve-check", f"{kind}{url}", "--tokenizer", "spm-v3"])
    printed = capsys.readouterr()
    out = printed.out + printed.err
    assert code == 1, out
    assert "ML901" in out
    assert "the server is busy (HTTP 429, Retry-After 90 s: slow down)" in out
    assert "Ask again when the server has less to do" in out


def test_the_content_of_an_answer_may_be_a_list_of_parts(oracle: Oracle) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "It is"}, {"type": "text", "text": " Paris."}]},
        {"type": "text", "text": "Paris"},
        {"type": "text", "text": "."},
    ]
    body = {"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}
    answer = chat_answer(Answer(200, body, ""), Place.of("url"))
    assert (answer.text, answer.thinking) == ("Paris.", "It is Paris.")
    events = [{"choices": [{"delta": {"content": [part]}}]} for part in parts]
    answer = streamed_answer(Answer(200, events, "", is_whole=False), Place.of("url"))
    assert (answer.text, answer.thinking, answer.is_whole) == ("Paris.", "It is Paris.", False)


def test_a_slow_check_says_how_far_it_is_in_a_log(
    oracle: Oracle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_check, "LOG_SECONDS", 0.2)

    def slowly(path: str) -> None:
        time.sleep(0.1 if path == "/v1/chat/completions" else 0)

    with serving(Behaviour(oracle, answer=slowly)) as url:
        assert main(["serve-check", f"openai={url}", "--tokenizer", "spm-v3", "--at-once", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("asking ")]
    form = rf"asking {re.escape(url)}: (\d+ of \d+ rows|no answer yet) after \d+ s"
    assert len(lines) >= 3
    assert all(re.fullmatch(form, line) for line in lines), lines


def test_the_limit_of_a_request_is_the_user_s(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    def late(path: str) -> None:
        time.sleep(1.5 if path == "/v1/chat/completions" else 0)

    with serving(Behaviour(oracle, answer=late)) as url:
        words = ["serve-check", f"openai={url}", "--tokenizer", "spm-v3"]
        assert main([*words, "--request-seconds", "1"]) == 1
    out = capsys.readouterr().out
    assert "no answer in 1 s" in out
    assert "give each request more time: --request-seconds 600" in out


def test_a_call_in_many_parts_is_joined_once() -> None:
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": "x" * 2000}}
    part = {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "x" * 2000}}]}}]}
    first = {"choices": [{"delta": {"tool_calls": [call]}}]}
    start = time.process_time()
    [joined] = streamed_answer(Answer(200, [first, *[part] * 20_000], ""), Place.of("stream")).calls
    assert time.process_time() - start < 5
    assert (joined.id, joined.name, joined.arguments == "x" * 2000 * 20_001) == ("abcdefghi", "f", True)
