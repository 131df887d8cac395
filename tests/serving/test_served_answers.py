"""Answers whose ids are known, through llama.cpp itself and through servers that change them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import answer_server
import pytest
from answer_server import AnswerServer, Change, Relay, in_streams, nothing
from derived_tekken import write_derived
from gguf_files import write_gguf
from golden_answers import transcript_of
from llamacpp_process import BUILD, converted_model, needs_llamacpp, served
from local_server import serving
from planted_faults import OF_ANSWERS, assert_found, with_stop
from sampling import sampled
from test_server_export import command, option, write_adapter

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance import server_target
from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.answer.deviations import named_deviation
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.llamacpp.server import LLAMACPP
from pytest_mistral_lora.field.servers.vllm.server import VLLM
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.records.probe import ANSWERS, said_answers
from pytest_mistral_lora.serving.server import SpokenAnswer
from pytest_mistral_lora.serving.servers import SERVERS
from pytest_mistral_lora.training.export import servers
from pytest_mistral_lora.training.export.servers import PROBE_MODEL, ServerFiles, export_for_server

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
NAMES = (
    "plain",
    "leading-spaces",
    "trailing-line-break",
    "emoji",
    "spelled-call-tools",
    "call",
    "call-other-order",
    "call-float",
    "calls-of-two-tools",
    "thinking",
)
FEW = tuple(answer for answer in known_answers() if answer.name in NAMES)
OF_LLAMACPP = {"call-other-order": "ML922", "spelled-call-tools": "ML924"}
"""What build 11549 changes for the worse, with the rule: arguments by its grammar, and letters that spell a marker."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return write_tiny_base(folder / "tiny", write_derived("derived-v13-thinking", folder, words=2000))


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return Oracle(base / "tekken.json")


@pytest.fixture(scope="module")
def probe(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerFiles:
    """The export of a probe that says a few known answers."""
    with pytest.MonkeyPatch.context() as patch:
        # all of them take minutes
        patch.setattr(servers, "known_answers", lambda: FEW)
        return export_for_server(base, LLAMACPP.load_exporter(), tmp_path_factory.mktemp("to") / "probe", is_probe=True)


@pytest.fixture(scope="module")
def llamacpp(probe: ServerFiles, oracle: Oracle) -> Iterator[str]:
    file = probe.folder / "model.gguf"
    with served(write_gguf(file, *converted_model(probe.folder / PROBE_MODEL, oracle))) as (_, address):
        yield address


def judged(url: str, oracle: Oracle, *, kind: str = "llamacpp", **given: Any) -> dict[str, Result]:
    given = {"version": BUILD, "given": (parse_row(ROW),), "given_answers": FEW, **given}
    target = ServerTarget("served", judge=Target("own", oracle.path), kind=kind, url=url, asks_answers=True, **given)
    return {case: judge() for case, judge in AnswerChecks(target).cases().items()}


def broken(results: dict[str, Result]) -> dict[str, str]:
    """Return the answers with findings, each with the rules."""
    found: dict[str, set[str]] = {}
    for finding in (finding for result in results.values() for finding in result.findings):
        found.setdefault(finding.found.partition(":")[0], set()).add(finding.rule)
    return {name: " ".join(sorted(rules)) for name, rules in found.items()}


def test_a_probe_says_each_answer_by_ids_and_moves_with_its_folder(probe: ServerFiles, oracle: Oracle) -> None:
    record = json.loads((probe.folder / ANSWERS).read_text())
    assert record["tokenizer"]["sha256"] == oracle.sha256
    assert {answer["name"] for answer in record["answers"]} == set(NAMES) == said_answers(probe.folder)
    assert min(answer["margin"] for answer in record["answers"]) >= 4
    [plain] = [answer for answer in record["answers"] if answer["name"] == "plain"]
    assert tuple(plain["answer_ids"]) == FEW[0].answer_ids(oracle)
    # the link is within the export
    weights = probe.folder / "model" / "model.safetensors"
    assert weights.samefile(probe.folder / PROBE_MODEL / "model.safetensors")
    assert not weights.readlink().is_absolute()
    assert probe.check.endswith(" --answers")
    assert probe.check in (probe.folder / "README.md").read_text()
    assert f"says {len(NAMES)} known answers" in probe.remarks[0]


def test_a_probe_for_vllm_is_served_with_the_flags_of_the_adapter_that_it_stands_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "known_answers", lambda: FEW[:1])
    adapter = write_adapter(tmp_path / "tuned", base)
    export_for_server(adapter, VLLM.load_exporter(), tmp_path / "adapter")
    probe = export_for_server(adapter, VLLM.load_exporter(), tmp_path / "probe", is_probe=True)
    of_adapter, of_probe = (command(tmp_path / name / "serve.sh") for name in ("adapter", "probe"))
    assert of_probe[:3] == ["vllm", "serve", PROBE_MODEL]
    assert (option(of_probe, "--served-model-name"), "--enable-lora" in of_probe) == ("tuned", False)
    for name in ("--tokenizer-mode", "--tool-call-parser", "--reasoning-parser", "--dtype", "--generation-config"):
        assert option(of_probe, name) == option(of_adapter, name)
    assert said_answers(probe.folder) == {"plain"}
    assert (probe.folder / "requirements.txt").is_file()


@needs_llamacpp
def test_llamacpp_changes_what_it_is_known_to_change_and_nothing_else(llamacpp: str, oracle: Oracle) -> None:
    results = judged(llamacpp, oracle)
    assert broken(results) == OF_LLAMACPP
    [[_, summary]] = results["answered"].facts
    assert re.search("8 of 10 .*whole.*, 8 of 10 .*stream; 10 .*probe.* by ids", summary)
    assert re.search(r"known of llama\.cpp 11549: leading-white-space \(1\)", summary)
    [replaced] = results["decoding"].findings
    assert replaced.expected == 'calls weather({"days": 4, "city": "Bern"})'
    # a version of which nothing is known
    older = judged(llamacpp, oracle, version="8672")
    assert broken(older) == OF_LLAMACPP | {"leading-spaces": "ML923"}
    assert "(leading-white-space) that is not known" in older["text"].findings[0].found


@needs_llamacpp
@pytest.mark.parametrize(
    ("change", "adds"),
    [
        pytest.param(nothing, {}, marks=pytest.mark.slow),
        pytest.param(answer_server.stripped, {"trailing-line-break": "ML923"}, marks=pytest.mark.slow),
        pytest.param(
            answer_server.calls_as_text,
            dict.fromkeys(("call", "call-float", "calls-of-two-tools"), "ML925"),
            marks=pytest.mark.slow,
        ),
        (in_streams(answer_server.split_characters), {"emoji": "ML926 ML931"}),
        (answer_server.numbers_as_text, {"call-float": "ML927"}),
        pytest.param(answer_server.one_id, {"calls-of-two-tools": "ML928"}, marks=pytest.mark.slow),
        pytest.param(answer_server.no_thinking, {"thinking": "ML929"}, marks=pytest.mark.slow),
        pytest.param(
            answer_server.always_stop,
            dict.fromkeys(("call", "call-float", "calls-of-two-tools"), "ML930"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["nothing", "text", "control", "stream", "calls", "call-ids", "thinking", "finish"],
)
def test_a_relay_that_changes_the_answers_of_llamacpp_is_found(
    change: Change, adds: dict[str, str], llamacpp: str, oracle: Oracle
) -> None:
    relay = Relay(oracle, upstream=llamacpp, change=change)
    with serving(relay) as url:
        found = broken(judged(url, oracle))
    assert {name: rules for name, rules in found.items() if name not in OF_LLAMACPP} == adds
    assert found.keys() >= OF_LLAMACPP.keys()
    assert relay.passed.count(answer_server.CHAT) >= 2 * len(NAMES)


@needs_llamacpp
def test_what_llamacpp_makes_of_recorded_ids_is_no_change_of_a_message(
    llamacpp: str, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # white space is left out at the beginning of a text, and thoughts and calls are taken out
    right = [answer for answer in FEW if answer.name not in OF_LLAMACPP]
    for known in right:
        ids = known.prompt_ids(oracle), known.answer_ids(oracle)
        transcript_of(oracle, known.name, known.row, *ids).write(tmp_path)
    rows = tmp_path.with_name("one.jsonl")
    rows.write_text(json.dumps(ROW) + "\n")
    words = ["--tokenizer", str(oracle.path), "--rows", str(rows), "--golden", str(tmp_path)]
    # the recorded log-probabilities are not those of this model
    assert main(["serve-check", f"llamacpp@{BUILD}:q4={llamacpp}", *words]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{len(right)} exact of {len(right)}") == 2, out
    assert f"as a stream {len(right)} of {len(right)}" in out


@needs_llamacpp
def test_a_relay_that_refuses_requests_is_found(llamacpp: str, oracle: Oracle) -> None:
    def has_two_tools(request: dict[str, Any]) -> bool:
        return len(request.get("tools", ())) == 2

    with serving(Relay(oracle, upstream=llamacpp, refuses=has_two_tools)) as url:
        assert broken(judged(url, oracle)) == OF_LLAMACPP | {"calls-of-two-tools": "ML921"}


@needs_llamacpp
def test_a_request_forces_the_answers_on_any_model(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    with served(write_gguf(tmp_path / "model.gguf", *converted_model(base, oracle))) as (_, address):
        results = judged(address, oracle)
    # the grammar is not asked: the answer is given, and not generated
    assert broken(results) == {}
    [[_, summary]] = results["answered"].facts
    assert re.search("9 of 9 .*; 9 forced", summary)
    assert "spelled-call-tools" in results["answered"].not_checked
    assert "whole and as a stream" in results["same"].not_checked


@pytest.mark.parametrize(
    ("part", "said", "served", "has_calls", "kind", "name"),
    [
        ("text", "  a", "a", False, "tekken", "leading-white-space"),
        ("text", "a", " a", False, "spm", "first-space"),
        ("text", "a", " a", False, "tekken", None),
        ("text", "a\n", "a", True, "tekken", "line-breaks-before-call"),
        ("text", "a\n", "a", False, "tekken", None),
        ("thinking", "a\n", "a", False, "tekken", "thought-edges"),
        ("text", "a", "a", False, "tekken", None),
        ("text", "  a", " a", False, "tekken", None),
    ],
)
def test_a_deviation_is_named_by_the_text_that_it_predicts(
    part: str, said: str, served: str, has_calls: bool, kind: str, name: str | None
) -> None:
    found = named_deviation(part, said, served, has_calls=has_calls, kind=kind)
    assert (found.id if found else None) == name


@pytest.fixture
def check(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROW) + "\n")

    def run(server: AnswerServer, kind: str, *words: str) -> tuple[int, str]:
        asked = ["--tokenizer", str(base), "--rows", str(tmp_path / "one.jsonl"), *words]
        with serving(server) as url:
            code = main(["serve-check", f"{kind}={url}", *asked])
        return code, "".join(capsys.readouterr())

    return run


def test_answers_are_asked_for_with_the_option_alone(check: Any, oracle: Oracle) -> None:
    server = AnswerServer(Oracle(oracle.path))
    assert "answers of" not in check(server, "vllm")[1]
    code, out = check(server, "vllm", "--answers")
    assert code == 0, out
    count = sum(answer.fits(oracle) for answer in known_answers())
    assert re.search(f"{count} of {count} .*whole.*, {count} of {count} .*stream; {count} .*probe", out)


def test_the_known_answers_of_a_slow_server_end_together(
    check: Any, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request would end in time, and all of them would take hours."""

    def slow(path: str) -> None:
        if path == answer_server.CHAT:
            time.sleep(0.5)

    monkeypatch.setattr(server_target, "ANSWERS_SECONDS", 1.0)
    code, out = check(AnswerServer(Oracle(oracle.path), answer=slow), "vllm", "--answers")
    count = sum(answer.fits(oracle) for answer in known_answers())
    assert code == 1, out
    assert re.search(rf"ML921 .*\b\d+ of {count} .* 1 seconds", out), out


def test_a_server_that_cannot_be_asked_by_ids_is_judged_by_the_record_of_its_probe(
    check: Any, probe: ServerFiles, oracle: Oracle
) -> None:
    server = AnswerServer(Oracle(oracle.path))
    code, out = check(server, "openai", "--answers")
    assert (code, "no answer could be forced" in out) == (0, True), out
    code, out = check(server, "openai", "--probe", str(probe.folder))
    assert code == 0, out
    assert f"{len(NAMES)} of {len(NAMES)} as a stream; {len(NAMES)} generated by a probe" in out
    server.change = answer_server.always_stop
    code, out = check(server, "openai", "--probe", str(probe.folder))
    assert (code, "ML930 " in out) == (1, True), out


def test_pytest_asks_for_the_answers_with_the_option_alone(
    base: Path, oracle: Oracle, run_pytest: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROW) + "\n")
    server = AnswerServer(Oracle(oracle.path), change=answer_server.always_stop)
    with serving(server) as url:
        named = (f"--mistral-server=vllm={url}", f"--mistral-tokenizer={base}", "--mistral-server-rows=one.jsonl")
        words = ("--mistral-golden", *named, "-k", "::answer::finish or ::answer::answered")
        run_pytest(*words).assert_outcomes()
        found = run_pytest(*words, "--mistral-server-answers")
        found.assert_outcomes(passed=1, failed=1)
        found.stdout.fnmatch_lines(["*ML930*whole and streamed: finish_reason 'stop'*"])
        rerun = next(line for line in found.outlines if line.startswith("rerun:"))
    assert "--mistral-server-answers" in rerun


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        # as llama.cpp ends a stream whose grammar refuses a token
        (200, b'data: {"error": {"message": "got exception", "code": 500}}\n\n', "in the stream: got exception"),
        (200, b'error: {"message": "got exception"}\n\n', "in the stream: got exception"),
        (200, b'data: {"text": "Paris."}\n\n', "choices is missing"),
        (200, b"data: {oops\n\n", "no JSON"),
        (200, {"choices": [{"message": {"content": "Paris."}}]}, "no stream"),
        (500, {"error": {"message": "got exception"}}, "the request fails: HTTP 500: got exception"),
    ],
)
def test_a_stream_without_an_answer_is_a_finding(status: int, body: Any, says: str, oracle: Oracle) -> None:
    class Streaming(AnswerServer):
        def respond(self, path: str, data: Any) -> tuple[int, Any]:
            return (status, body) if data and data.get("stream") else super().respond(path, data)

    with serving(Streaming(Oracle(oracle.path))) as url:
        results = judged(url, oracle, kind="vllm", given_answers=FEW[:1])
    [finding] = [finding for result in results.values() for finding in result.findings]
    assert (finding.rule, says in finding.found) == ("ML921", True), finding.found


def test_a_grammar_of_ids_that_vllm_does_not_enforce_is_not_checked(oracle: Oracle) -> None:
    """With a parser of thinking, vLLM 0.32 ignores a grammar until the model has thought."""

    class Unplanted(AnswerServer):
        def _answer(self, prompt: Any, data: dict[str, Any]) -> Any:
            return [100, 2], [-0.1, -0.1], True

    def other_ids(message: dict[str, Any], request: dict[str, Any]) -> None:
        message["ids"] = [100, 2]

    for change, reason in ((other_ids, "does not hold its model to the grammar"), (nothing, "")):
        server = Unplanted(Oracle(oracle.path), change=change)
        with serving(server) as url:
            answered = judged(url, oracle, kind="vllm")["answered"]
        assert answered.findings == ()
        assert reason in answered.not_checked
        grammars = [data["structured_outputs"]["grammar"] for _, _, data in server.seen if data and "stream" in data]
        ids = " ".join(f"<[{token}]>" for token in FEW[0].answer_ids(oracle)[:-1])
        assert f"start: {ids}" in grammars


def test_the_grammar_of_ids_takes_the_answer_alone(oracle: Oracle) -> None:
    llguidance = pytest.importorskip("llguidance")
    from mistral_common.guidance.tokenizer import from_mistral_tokenizer
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = from_mistral_tokenizer(MistralTokenizer.from_file(str(oracle.path)))
    for answer in FEW:
        ids = answer.answer_ids(oracle)
        request = SERVERS["vllm"].forced_request({}, SpokenAnswer(answer.row, ids, oracle))
        assert request is not None
        grammar = request["structured_outputs"]["grammar"]
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        assert matcher.try_consume_tokens(list(ids[:-1])) == len(ids) - 1, answer.name
        assert matcher.is_accepting()
        assert llguidance.LLMatcher(tokenizer, grammar).try_consume_tokens([ids[0] + 1]) == 0


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_a_limit_is_not_taken_for_a_grammar(kind: str, oracle: Oracle) -> None:
    server = AnswerServer(Oracle(oracle.path), change=answer_server.limited)
    few = tuple(answer for answer in FEW if answer.name in ("plain", "emoji", "call"))
    with serving(server) as url:
        results = judged(url, oracle, kind=kind, given_answers=few, probe_answers=frozenset(NAMES))
    assert broken(results) == dict.fromkeys(("plain", "emoji", "call"), "ML930")
    found = results["finish"].findings[0]
    assert (found.expected, "finish_reason 'length'" in found.found) == ("stop", True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "ollama", "--probe"], "no probe is known for Ollama"),
        (["--to", "trl", "--probe"], "--probe only applies to servers, not to trl"),
    ],
)
def test_a_probe_is_for_servers_that_one_is_known_for(
    words: list[str], says: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["export", str(base), *words, "--output", str(tmp_path / "to")])
    assert (code, says in capsys.readouterr().err) == (2, True)


def test_a_folder_without_the_record_of_a_probe_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no record of a probe"):
        said_answers(tmp_path)
    (tmp_path / ANSWERS).write_text("[]")
    with pytest.raises(InputError, match="not a record of a probe"):
        said_answers(tmp_path)


def cut(parts: list[bytes]) -> list[bytes]:
    """End a stream in its middle."""
    return parts[: len(parts) // 2]


def without_reasons(parts: list[bytes]) -> list[bytes]:
    """Leave the finish_reason out of a stream."""
    return [re.sub(rb'"finish_reason": "\w+"', b'"finish_reason": null', part) for part in parts]


def without_some(parts: list[bytes]) -> list[bytes]:
    """Lose each fourth part of the texts."""
    kept = [part for number, part in enumerate(parts) if number % 4 != 2 or b'"content": "' not in part]
    return kept


def without_white_space(parts: list[bytes]) -> list[bytes]:
    """Strip the text of each part of a stream."""
    stripped = []
    for part in parts:
        event = json.loads(part[6:]) if part.startswith(b"data: {") else {}
        for choice in event.get("choices", ()):
            if choice["delta"].get("content"):
                choice["delta"]["content"] = choice["delta"]["content"].strip()
        stripped.append(b"data: " + json.dumps(event).encode() + b"\n\n" if event else part)
    return stripped


def harmless(parts: list[bytes]) -> list[bytes]:
    """Put comments between the events, end lines as HTTP does, and leave the last event out."""
    return [b": ping\r\n\r\n" + part.replace(b"\n", b"\r\n") for part in parts if b"[DONE]" not in part]


def chunks(message: dict[str, Any]) -> None:
    """Put the texts of a message into a list of parts, as Mistral's own API has those of thinking models."""
    thought, text = message.pop("reasoning_content", None), message.get("content")
    parts: list[dict[str, Any]] = []
    parts += [{"type": "thinking", "thinking": [{"type": "text", "text": thought}]}] if thought else []
    parts += [{"type": "text", "text": text}] if text else []
    message["content"] = parts or None


def as_chunks(message: dict[str, Any], request: dict[str, Any]) -> None:
    """Send a whole answer in parts; those of a stream are changed in its events."""
    if not request.get("stream"):
        chunks(message)


def events_of_chunks(parts: list[bytes]) -> list[bytes]:
    """Send the texts of each event as a list of parts."""

    def changed(part: bytes) -> bytes:
        event = part.removeprefix(b"data: ").strip()
        if not event.startswith(b"{"):
            return part
        data = json.loads(event)
        for choice in data["choices"]:
            chunks(choice["delta"])
        return f"data: {json.dumps(data)}\n\n".encode()

    return [changed(part) for part in parts]


LONG = "a long way " * 40
LONG_ANSWERS = {
    "plain": ({"content": f"{LONG}home."}, "ML923"),
    "thinking": (
        {"content": [{"type": "thinking", "thinking": f"{LONG}home."}, {"type": "text", "text": "Yes."}]},
        "ML929",
    ),
    "call": (
        {
            "tool_calls": [
                {"id": "callcall1", "function": {"name": "weather", "arguments": {"a": LONG, "city": "home."}}}
            ]
        },
        "ML927",
    ),
}
"""Answers whose last word is far behind their beginning, and the rule of that word."""


def homeless(message: dict[str, Any], request: dict[str, Any]) -> None:
    """Change the last word of each part."""
    for key in ("content", "reasoning_content"):
        message[key] = message[key].replace("home.", "none.")
    for call in message["tool_calls"]:
        # another form of the same JSON is no fault
        arguments = json.loads(call["function"]["arguments"].replace("home.", "none."))
        call["function"]["arguments"] = json.dumps(arguments, separators=(",", ":"))


@pytest.mark.parametrize("name", LONG_ANSWERS)
def test_a_finding_shows_where_two_long_messages_differ(name: str, oracle: Oracle) -> None:
    [known] = [answer for answer in FEW if answer.name == name]
    turn, rule = LONG_ANSWERS[name]
    row = known.row.to_json()
    row["messages"] = [*row["messages"][:-1], {"role": "assistant", **turn}]
    few = (replace(known, row=parse_row(row)),)
    for change, rules in ((homeless, {rule}), (in_streams(homeless), {rule, "ML931"})):
        with serving(AnswerServer(Oracle(oracle.path), change=change, known=few)) as url:
            results = judged(url, oracle, kind="vllm", given_answers=few)
        findings = {finding.rule: finding for result in results.values() for finding in result.findings}
        assert findings.keys() == rules, findings
        for finding in findings.values():
            assert "way none." in finding.found or '"none."' in finding.found, finding.text()
            assert "way home." in finding.expected or '"home."' in finding.expected, finding.text()
            assert len(finding.found) < 300


RELAYS: dict[str, dict[str, Any]] = {
    "stream-cut": {"stream": cut},
    "stream-no-reason": {"stream": without_reasons},
    "stream-parts-lost": {"stream": without_some},
    "stream-white-space": {"stream": without_white_space},
    "stream-harmless": {"stream": harmless},
    "answers-in-parts": {"change": as_chunks, "stream": events_of_chunks},
    "answers-stop": {"asks": with_stop},
    "answers-limit": {"asks": lambda request: {**request, "max_tokens": 2}},
}


@needs_llamacpp
@pytest.mark.parametrize("name", sampled(RELAYS, ("stream-cut", "stream-harmless", "answers-limit")))
def test_what_a_relay_does_to_an_answer_has_one_cause(name: str, llamacpp: str, oracle: Oracle) -> None:
    plain = tuple(answer for answer in FEW if answer.name in ("plain", "trailing-line-break", "call", "thinking"))
    with serving(Relay(oracle, upstream=llamacpp, **RELAYS[name])) as url:
        results = judged(url, oracle, given_answers=plain)
    assert_only_found(name, results)


def assert_only_found(name: str, results: dict[str, Result]) -> None:
    """Assert that a planted fault is found by its rules, and by no other."""
    findings = [finding for result in results.values() for finding in result.findings]
    text = "\n".join(finding.text() for finding in findings)
    assert {finding.rule for finding in findings} == OF_ANSWERS[name].rules, text
    assert_found(name, text)


PARSERS = {
    # `--reasoning-format none`
    "thoughts-as-text": {"reasoning_format": 0},
    "no-parser": {"force_pure_content_parser": True},
}


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_that_is_switched_off_is_found(name: str, probe: ServerFiles, llamacpp: str, oracle: Oracle) -> None:
    few = tuple(answer for answer in FEW if answer.name in ("plain", "call", "thinking"))
    assert broken(judged(llamacpp, oracle, given_answers=few)) == {}
    with served(probe.folder / "model.gguf", set=PARSERS[name]) as (_, address):
        results = judged(address, oracle, given_answers=few)
    assert_only_found(name, results)


@needs_llamacpp
def test_a_default_that_changes_an_answer_is_found_without_transcripts(
    llamacpp: str, probe: ServerFiles, oracle: Oracle
) -> None:
    few = tuple(answer for answer in FEW if answer.name in ("plain", "leading-spaces", "thinking"))
    with served(probe.folder / "model.gguf", set={"sampling.penalty_repeat": 5.0}) as (_, address):
        [finding, *_] = judged(address, oracle, given_answers=few)["decoding"].findings
    assert "asked with the temperature 0 alone" in finding.found
    assert "A default of the server changes the answer" in finding.fix
    assert judged(llamacpp, oracle, given_answers=few)["decoding"].findings == ()
