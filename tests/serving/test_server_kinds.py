"""A server without a name is recognised by its endpoints, on the command line and under pytest, with one's own rows."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_server import Behaviour, free_port, serving

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.server_target import NOT_ASKED, ServerChoice
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving import servers

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
VERSIONS = {
    "/props": {"build_info": "b11549-8b3f1c2", "model_ftype": "all F32"},
    "/version": {"version": "0.32.0"},
    "/server_info": {"version": "0.5.23"},
    "/api/version": {"version": "0.40.0"},
    "/api/tags": {"models": [{"name": "tiny:latest"}]},
    "/v1/models": {"data": [{"id": "tiny"}]},
}
Check = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@pytest.fixture
def check(oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check a server that has some endpoints alone, by its bare address."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")

    def judge(*paths: str, answer: Callable[[str], tuple[int, bytes] | None] = lambda _: None) -> tuple[int, str]:
        def only(path: str) -> tuple[int, bytes] | None:
            if given := answer(path):
                return given
            if path in VERSIONS:
                return (200, json.dumps(VERSIONS[path]).encode()) if path in paths else (404, b"not found")
            return None

        with serving(Behaviour(oracle, answer=only)) as url:
            code = main(["serve-check", url, "--tokenizer", "spm-v3", "--rows", str(tmp_path / "rows.jsonl")])
        return code, "".join(capsys.readouterr())

    return judge


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["/props", "/v1/models"], r"llama\.cpp b11549-8b3f1c2, model tiny: .* preview; .* /props"),
        (["/version", "/v1/models"], r"vLLM 0\.32\.0, model tiny: .* ids; .* /version"),
        (["/server_info", "/v1/models"], r"SGLang 0\.5\.23, model tiny: .* count; .* /server_info"),
        (["/v1/models"], r"OpenAI's API, model tiny: .* count; .* /v1/models"),
    ],
)
def test_a_bare_address_is_asked_as_the_kind_that_it_is_recognised_as(
    paths: list[str], says: str, check: Check
) -> None:
    code, out = check(*paths)
    assert re.search(says, out), out
    # an SGLang that hides the ids, as one before 0.5.13 does
    assert code == 0, out


def test_a_kind_is_recognised_whose_requests_the_server_does_not_answer(check: Check) -> None:
    _, out = check("/api/version", "/v1/models", "/api/tags")
    assert ("Ollama 0.40.0" in out, "recognised by /api/version" in out) == (True, True), out


@pytest.mark.parametrize(("kind", "code"), [("vllm", 1), ("llamacpp", 0), ("openai", 0)])
def test_a_server_that_was_named_as_another_kind_is_a_finding_that_names_its_own(
    kind: str, code: int, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    # a llama.cpp of a Python wheel, which has no build to report
    build = json.dumps({"build_info": "b0-unknown", "model_ftype": "all F32"}).encode()
    answers = {"/props": (200, build), **dict.fromkeys(["/version", "/server_info"], (404, b"not found"))}
    with serving(Behaviour(oracle, answer=answers.get)) as url:
        words = ["serve-check", f"{kind}={url}", "--tokenizer", "spm-v3", "--rows", str(tmp_path / "rows.jsonl")]
        assert main(words) == code
    out = capsys.readouterr().out
    found = "it is llama.cpp, recognised by /props, and was named as vLLM"
    assert (found in out, f"llamacpp={url}" in out, "ML901" in out) == (bool(code),) * 3, out


def test_an_endpoint_that_hangs_or_is_forbidden_leaves_the_others(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "SECONDS", 0.5)

    def strange(path: str) -> tuple[int, bytes] | None:
        if path == "/props":
            time.sleep(1.5)
        # a page, a list and an object are no versions
        pages = {"/version": (200, b"<html>"), "/server_info": (403, b"no")}
        return pages.get(path, (200, b"[1]") if path == "/api/version" else None)

    code, out = check("/v1/models", answer=strange)
    assert (code, "recognised by /v1/models" in out) == (0, True), out


@pytest.mark.parametrize("kind", ["", pytest.param("llamacpp=", marks=pytest.mark.slow)])
def test_a_server_that_loads_its_model_is_one_finding_and_no_server_of_openai_s_kind(
    kind: str, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    # as llama.cpp does: it lists its model from the start
    loads = b'{"error": {"message": "Loading model", "code": 503}}'
    with serving(Behaviour(oracle, answer=lambda path: None if path == "/v1/models" else (503, loads))) as url:
        code = main(["serve-check", f"{kind}{url}", "--tokenizer", "spm-v3"])
    out = capsys.readouterr().out
    assert (code, out.count("ML901 ")) == (1, 1), out
    assert "(HTTP 503: Loading model)" in out
    assert "Wait until it is ready" in out


@pytest.mark.parametrize(
    ("body", "call", "rules", "says"),
    [
        (b"Internal Server Error", "abcdefghi", ["ML919"], "which is in the log of the server"),
        (b"oops", "abcdefghi", ["ML919"], "the request fails: HTTP 500: oops"),
        # what mistral-common refuses may fail, and where nothing else was asked, nothing is judged
        (b"Internal Server Error", "short", [], "each request failed, of messages that mistral-common refuses"),
        (b"oops", "short", [], "each request failed, of messages that mistral-common refuses"),
    ],
)
def test_a_status_500_is_a_failure_of_the_request_and_no_pass(
    body: bytes,
    call: str,
    rules: list[str],
    says: str,
    oracle: Oracle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # as `transformers serve` answers a row that its template refuses; mistral-common refuses the short id, too
    weather = {"id": call, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        ROW["messages"][0],
        {"role": "assistant", "tool_calls": [weather]},
        {"role": "tool", "tool_call_id": call, "content": "1"},
        ROW["messages"][1],
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    paths = dict.fromkeys(VERSIONS, (404, b"not found")) | {"/v1/chat/completions": (500, body)}
    del paths["/v1/models"]
    with serving(Behaviour(oracle, answer=paths.get)) as url:
        words = ["serve-check", f"openai={url}", "--tokenizer", "spm-v3", "--rows", str(tmp_path / "rows.jsonl")]
        code = main([*words, "--output-format", "json"])
    out = "".join(capsys.readouterr())
    assert (code, sorted(set(re.findall('"rule": "(ML[0-9]+)"', out)))) == (1, rules), out
    assert says in out


def test_what_is_no_server_of_a_known_kind_is_one_finding_that_names_the_way_out(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = check()
    assert (code, out.count("ML901 ")) == (1, 1), out
    assert "HTTP 404" in out
    assert "Name its kind, NAME=URL" in out
    code = main(["serve-check", f"http://127.0.0.1:{free_port()}", "--tokenizer", "spm-v3"])
    out = "".join(capsys.readouterr())
    assert (code, "no server answers there" in out, "Start the server" in out) == (1, True, True), out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:1/a?b=c", ("auto", "http://127.0.0.1:1/a?b=c", "", "")),
        ("auto:bf16=https://example.org/", ("auto", "https://example.org", "", "bf16")),
        ("llamacpp@11549:fp32=http://127.0.0.1:1", ("llamacpp", "http://127.0.0.1:1", "11549", "fp32")),
        # as OpenAI's clients have it
        ("http://127.0.0.1:1/v1/", ("auto", "http://127.0.0.1:1", "", "")),
        ("vllm=https://example.org/llm/v1", ("vllm", "https://example.org/llm", "", "")),
        ("openai=http://127.0.0.1:1/v1/chat/completions", ("openai", "http://127.0.0.1:1", "", "")),
    ],
)
def test_a_server_is_named_by_kind_version_and_precision(text: str, expected: tuple[str, ...]) -> None:
    chosen = ServerChoice.parse(text)
    assert (chosen.kind, chosen.url, chosen.version, chosen.precision) == expected
    # as a command to copy names it
    assert ServerChoice.parse(str(chosen)) == chosen


@pytest.mark.parametrize("text", ["llamacpp", "127.0.0.1:8080", "llamacpp="])
def test_a_name_without_an_address_is_none(text: str) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        ServerChoice.parse(text)


def test_pytest_asks_rows_of_one_s_own_at_a_bare_address(
    oracle: Oracle, run_pytest: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    (tmp_path / "own rows.jsonl").write_text(json.dumps(ROW) + "\n")
    words = ("--mistral-golden", "--mistral-tokenizer=spm-v3", "--mistral-server-rows=own rows.jsonl")
    with serving(Behaviour(oracle)) as url:
        found = run_pytest(*words, f"--mistral-server={url}", "-k", "server")
    found.stdout.fnmatch_lines(["*recognised by /props*", "*1 of 1 prompts have the ids*"])
    assert found.ret == 0
    with serving(Behaviour(oracle, prompt=lambda ids, _: (1, *ids))) as url:
        failed = run_pytest(*words, f"--mistral-server={url}", "-k", "prompts")
        failed.assert_outcomes(failed=1)
        rerun = next(line for line in failed.outlines if line.startswith("rerun:"))
        again = run_pytest(*shlex.split(rerun)[2:])
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["*row*BOS is there 2 times*"])


def test_rows_of_which_none_can_be_asked_are_no_pass(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with serving(Behaviour(oracle)) as url:
        code = main(["serve-check", url, "--tokenizer", "spm-v3", "--rows", str(rows)])
    out = "".join(capsys.readouterr())
    assert (code, "no row to ask: " in out, "Look at them: mistral-lora check" in out) == (1, True, True), out
    rows.write_text("")
    with serving(Behaviour(oracle)) as url:
        code = main(["serve-check", url, "--tokenizer", "spm-v3", "--rows", str(rows)])
    out = "".join(capsys.readouterr())
    assert (code, "no row to ask: the file has no rows" in out, "Start the server" in out) == (1, True, False), out


def test_rows_that_are_not_asked_are_counted_in_the_summary(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    for more, count in (("", 0), ('no JSON\n{"messages": [{"role": "user", "content": "Hi"}]}\n', 2)):
        rows.write_text(json.dumps(ROW) + "\n" + more)
        with serving(Behaviour(oracle)) as url:
            code = main(["serve-check", url, "--tokenizer", "spm-v3", "--rows", str(rows)])
        out = "".join(capsys.readouterr())
        assert (code, f"{NOT_ASKED}: {count} rows" in out, "not asked" in out) == (0, bool(count), bool(count)), out


def test_a_tokenizer_that_does_not_load_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["serve-check", f"http://127.0.0.1:{free_port()}", "--tokenizer", "nowhere"])
    out = "".join(capsys.readouterr())
    assert (code, "nowhere: no such" in out, "ML901" in out) == (2, True, False), out
