"""`mistral-lora doctor`: a fault for each bad installation, none for a good one, and no token in the output."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from check_outcomes import outcome_of
from huggingface_hub import constants
from packaging.specifiers import SpecifierSet

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.cli.doctor import fault_lines
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.session import opened_session
from pytest_mistral_lora.environment import (
    InstallationFault,
    installed_versions,
    known_cause_lines,
    library_states,
    present_faults,
)
from pytest_mistral_lora.environment.machine import cpu_device, hub_answer, torch_build
from pytest_mistral_lora.programs.facts import Symptom, fact, facts

ROOT = Path(__file__).parents[1]
SOUND = {"transformers": "5.24.0", "mistral-common": "1.13.1", "peft": "0.21.2"}
"""Versions whose combination has no known fault."""
OF_SERVERS = [known for known in facts() if known.program.kind == "server" and known.can_explain]

MUTANTS = [
    ({"transformers": "5.0.0"}, "merges-by-id"),
    ({"transformers": "5.23.0"}, "merges-by-id"),
    ({"peft": "0.17.1"}, "peft-imports-a-removed-class"),
    ({"peft": "0.17.1", "transformers": "4.57.6"}, "unsupported-peft"),
    ({"transformers": "4.56.2"}, "unsupported-transformers"),
    ({"sentencepiece": ""}, "unsupported-sentencepiece"),
    ({"gguf": "0.1.0"}, "unsupported-gguf"),
    ({"vllm": "0.32.0", "mistral-common": "1.13.0"}, "served-grammar"),
]


def present(changes: dict[str, str], torch_error: str = "") -> dict[str, InstallationFault]:
    """Return each fault of this environment with other versions, by id; an empty version is not installed."""
    versions = installed_versions() | SOUND | changes
    installed = {name: version for name, version in versions.items() if version}
    found = present_faults(installed, list(library_states(installed)), torch_error)
    assert [one.severity for one in found] == sorted(one.severity for one in found)
    return {one.id: one for one in found}


def faults(changes: dict[str, str]) -> dict[str, str]:
    """Return the severity of each fault of this environment with other versions."""
    return {name: fault.severity for name, fault in present(changes).items()}


def test_of_two_distributions_the_one_that_python_imports_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("5.24.0", "5.23.0"):  # the one that is found first comes last
        folder = tmp_path / version / f"Transformers-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Transformers\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / version)
    assert installed_versions.__wrapped__()["transformers"] == "5.23.0"


@pytest.mark.of_field
@pytest.mark.parametrize(("changes", "fault"), MUTANTS)
def test_a_bad_version_is_one_fault(changes: dict[str, str], fault: str) -> None:
    assert [name for name, severity in faults(changes).items() if severity == "error"] == [fault]


@pytest.mark.of_field
@pytest.mark.parametrize("changes", [{}, {"transformers": "4.57.1"}, {"transformers": "5.25.0.dev0"}, {"gguf": ""}])
def test_a_good_installation_has_notes_at_most(changes: dict[str, str]) -> None:
    assert set(faults(changes).values()) == {"note"}


@pytest.mark.of_field
def test_a_note_is_of_its_versions_alone() -> None:
    # only what uses a template that mistral-common generates has the fault, and nothing here does under such a version
    assert faults({"mistral-common": "1.12.0"})["template-writes-html"] == "note"
    assert {"tekken-first", "regex-warns-of-sound-files", "legacy-adds-a-space"} <= faults({}).keys()
    # a server's environment is another one, of which nothing is known here
    of_mistral_common = {"grammar-refuses-call-ids", "fim-suffix-cut"}
    notes = {"regex-without-a-warning", "decoding-cleans-spaces", "combined-rslora", *of_mistral_common}
    assert set(faults({"transformers": "4.57.1"})) == notes | {fault.id for fault in OF_SERVERS}
    assert faults({})["served-grammar"] == "note"


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("changes", "fault", "remark"),
    [
        ({"transformers": "5.31.0"}, "tekken-first", "seen with 5.24.0, you run 5.31.0: not checked"),
        ({"peft": "0.22.0"}, "combined-rslora", "seen with 0.21.2, you run 0.22.0: not checked"),
        (
            {"vllm": "0.33.0", "mistral-common": "1.13.1"},
            "served-grammar",
            "vllm: seen with 0.32.0, you run 0.33.0: not checked",
        ),
        ({"vllm": "0.32.1"}, "served-letters-as-markers", "seen with 0.32.0, you run 0.32.1: not checked"),
        ({"vllm": "0.31.0"}, "served-letters-as-markers", ""),
        ({}, "tekken-first", ""),
    ],
)
def test_a_fault_of_a_newer_program_is_a_note_that_is_not_checked(
    changes: dict[str, str], fault: str, remark: str
) -> None:
    found = present(changes)[fault]
    assert (found.severity, found.remark) == ("note", remark)
    assert (f"  {remark}" in fault_lines(found)) is bool(remark)


@pytest.mark.of_field
def test_a_fault_that_has_ended_is_not_there() -> None:
    assert "merges-by-id" in present({"transformers": "5.23.1"})
    assert "merges-by-id" not in present({"transformers": "5.24.0.dev0"})


def test_every_known_fault_has_a_mutant_or_is_a_note() -> None:
    assert {one.id for one in facts() if one.severity == "error"} <= {fault for _, fault in MUTANTS}


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("rules", "changes", "found"),
    [
        (
            {"ML004", "ML101"},
            {"transformers": "5.23.0"},
            ["known of transformers 5.23.0 (ML004): "],
        ),
        ({"ML004"}, {"mistral-common": "1.12.0"}, ["known of mistral-common 1.12.0 (ML004): "]),
        ({"ML101"}, {"transformers": "5.23.0"}, []),
        ({"ML004"}, {}, []),
        (set(), {"transformers": "5.23.0"}, []),
    ],
)
def test_findings_name_the_known_fault_that_can_be_their_cause(
    rules: set[str], changes: dict[str, str], found: list[str]
) -> None:
    lines = known_cause_lines([Symptom(rule, "x") for rule in rules], SOUND | changes)
    assert [line.startswith(begin) for line, begin in zip(lines, found, strict=True)] == [True] * len(found)
    assert all("Change: pip install '" in line for line in lines)


@pytest.mark.of_field
def test_the_words_of_a_server_name_the_known_fault_whatever_is_installed_here() -> None:
    says = "HTTP 400: GrammarFactory.get_lark_from_jinja() missing 1 required positional argument: 'force_tool_names'"

    def lines(rule: str, found: str) -> list[str]:
        return known_cause_lines([Symptom(rule, found)], SOUND)

    [line] = lines("ML919", f"single: the request fails: {says}")
    assert line.startswith("known of vllm ==0.32.0, mistral-common >=1.13 (ML919): ")
    assert ": pip install 'vllm==0.32.0' 'mistral-common==1.12.0'" in line
    assert lines("ML919", "single: the request fails: HTTP 500: oops") == []
    assert lines("ML907", says) == []


def test_rules_of_known_faults_are_rules() -> None:
    assert {rule for one in facts() for rule in one.rules} <= RULES.keys()


def test_checks_of_known_faults_are_checks_of_answers() -> None:
    cases = {case for rule in RULES.of("answer") for case in rule.cases}
    assert {case for known in facts() for case in known.checks} <= cases


def test_the_exit_code_is_that_of_the_installed_versions(capsys: pytest.CaptureFixture[str]) -> None:
    bad = SpecifierSet(">=5.0,<5.24").contains(installed_versions()["transformers"], prereleases=True)
    assert main(["doctor", "--json"]) == int(bad)
    data = json.loads(capsys.readouterr().out)
    assert data["exit_status"] == int(bad)
    assert {one["name"]: one["state"] for one in data["libraries"]}["mistral-common"] == "ok"
    assert data["torch"]["devices"][-1]["name"].startswith("cpu ")
    assert main(["doctor"]) == int(bad)
    text = capsys.readouterr().out
    assert f" transformers     {installed_versions()['transformers']} " in text
    assert text.splitlines()[-1].startswith("1 fault, " if bad else "0 faults, ")


def test_a_torch_that_cannot_be_imported_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert "libcudart.so.12" in torch_build().error
    assert main(["doctor"]) == 1
    assert "FAULT torch-cannot-be-imported\n  libcudart.so.12" in capsys.readouterr().out


def test_without_torch_the_extra_is_named_and_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not torch_build().version
    main(["doctor"])
    assert "pip install 'pytest-mistral-lora[train]'" in capsys.readouterr().out


def test_a_cpu_computes_in_bf16_if_it_has_the_instructions() -> None:
    assert cpu_device(frozenset({"avx512f", "amx_bf16"})).precisions == ("fp32", "bf16")
    plain = cpu_device(frozenset({"avx512f"}))
    assert plain.precisions == ("fp32",)
    assert "slower" in plain.advice


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A server in place of the Hub, and the headers of every request that it got."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.headers)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_if_you_ask_for_it_without_the_token(
    hub: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor"])
    assert hub == []
    main(["doctor", "--hub"])
    text = capsys.readouterr().out
    assert "answers: yes, in " in text
    assert "token: there (HF_TOKEN), not shown" in text
    assert ["Authorization" in headers for headers in hub] == [False]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["doctor", "--hub", "--json"])
    text += (printed := capsys.readouterr().out)
    assert json.loads(printed)["hub"]["reachable"] == "not asked: HF_HUB_OFFLINE is set"
    assert len(hub) == 1
    assert "hf_secret" not in text


def test_a_hub_that_is_not_there_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    code = main(["doctor"])
    assert main(["doctor", "--hub"]) == code
    text = capsys.readouterr().out
    assert "answers: no: " in text
    assert "token: none" in text


@pytest.mark.parametrize("endpoint", ["localhost:8080", "http://[::1", "http://a b", ""])
def test_an_endpoint_that_is_no_address_is_told(endpoint: str) -> None:
    assert hub_answer(endpoint).startswith("no: ")


def test_a_server_of_another_protocol_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 ready\r\n")

        thread = Thread(target=greet)
        thread.start()
        assert hub_answer(f"http://127.0.0.1:{server.getsockname()[1]}") == "no: 220 ready"
        thread.join()


@pytest.mark.of_field
def test_the_page_shows_a_fault_as_it_is_printed() -> None:
    fault = present({"transformers": "5.23.0"})["merges-by-id"]
    assert "\n".join(fault_lines(fault)) in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def known_faults_of(*outcomes: CheckOutcome) -> list[str]:
    with opened_session([]) as session:
        for outcome in outcomes:
            session.take(outcome)
        return session.known_faults()


def server_outcome(target: str, proof: str) -> CheckOutcome:
    return outcome_of(f"{target}::server::reachable", facts={"server of": proof})


def answer_outcome(target: str, case: str, found: str) -> CheckOutcome:
    return outcome_of(f"{target}::answer::{case}", Finding("ML919", found))


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("proof", "case", "found", "fault"),
    [
        ("llama.cpp b11549, model m", "decoding", "call: calls weather", "served-arguments-replaced"),
        ("llama.cpp 11549 (as named), model m", "decoding", "calls-of-one-tool: x", "served-arguments-replaced"),
        # a server that reports no version may be it
        ("llama.cpp, model m", "decoding", "text-call: x", "served-arguments-replaced"),
        ("llama.cpp b11549, model m", "decoding", "json-schema: x", "served-json-in-a-fence"),
        ("llama.cpp b11549, model m", "answered", "call: HTTP 500: peg-native", "served-call-ids-in-another-order"),
        ("llama.cpp b11549, model m", "answered", "single: 'render_content'", "served-template-without-an-argument"),
        ("vLLM 0.32.0, model m", "calls", "call: calls weatheranswer001({})", "served-call-ids-in-names"),
        ("vLLM 0.32.0, model m", "spelled", "spelled-call: x", "served-letters-as-markers"),
        ("llama.cpp b11548, model m", "decoding", "call: calls weather", None),
        ("vLLM 0.31.0, model m", "spelled", "spelled-call: x", None),
        ("llama.cpp b11549, model m", "spelled", "spelled-call: x", None),
        ("llama.cpp b11549, model m", "calls", "call: calls weather", None),
    ],
)
def test_a_red_server_names_the_faults_of_its_version(proof: str, case: str, found: str, fault: str | None) -> None:
    other = server_outcome("b", "llama.cpp b1, model m")
    lines = known_faults_of(server_outcome("a", proof), answer_outcome("a", case, found), other)
    expected = [fact(fault).symptom] if fault else []
    assert [line.partition("): ")[2].partition(". Change: ")[0] for line in lines] == expected


@pytest.mark.of_field
def test_a_replay_names_the_fault_of_a_grammar_that_refuses_the_ids_of_calls() -> None:
    for token, count in (("[CALL_ID]", 1), ("[ARGS]", 0)):
        finding = Finding("ML909", f"row-0001: answered 'weather', because the grammar refuses {token}")
        replayed = outcome_of("a::server::by-messages", finding)
        lines = known_faults_of(server_outcome("a", "vLLM 0.32.0, model m"), replayed)
        assert [fact("served-call-ids-in-names").symptom in line for line in lines] == [True] * count


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("proof", "case", "found", "remark"),
    [
        ("llama.cpp b11550, model m", "decoding", "call: x", "seen with 11549, you run b11550: not checked"),
        ("vLLM 0.33.0, model m", "spelled", "spelled-call: x", "seen with 0.32.0, you run 0.33.0: not checked"),
    ],
)
def test_the_fault_of_a_newer_server_is_named_and_not_checked(proof: str, case: str, found: str, remark: str) -> None:
    [line] = known_faults_of(server_outcome("a", proof), answer_outcome("a", case, found))
    assert f"; {remark}. Change: " in line


def test_the_fault_of_one_server_is_not_that_of_another() -> None:
    outcomes = [
        server_outcome("a", "llama.cpp b11549, model m"),
        server_outcome("b", "vLLM 0.32.0, model m"),
        answer_outcome("b", "decoding", "call: calls weather"),
    ]
    assert known_faults_of(*outcomes) == []


def test_doctor_lists_the_faults_of_servers_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for known in OF_SERVERS:
        assert sum(known.id in line for line in lines) == 1


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("name", "value"), [("HF_HOME", "~nobody-here/x"), ("HOME", "~"), ("MISTRAL_LORA_CACHE", "~nobody-here")]
)
@pytest.mark.parametrize(("words", "code"), [(["doctor"], 0), (["check", "rows.jsonl"], 0), (["runner", "list"], 2)])
def test_a_home_folder_that_nobody_has_is_named_and_stops_only_what_needs_it(
    name: str,
    value: str,
    words: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in ("HF_HOME", "MISTRAL_LORA_CACHE", "CI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = [*words, "--tokenizer", "spm-v3"] if words[0] == "check" else words
    monkeypatch.setattr("pytest_mistral_lora.environment.faults.facts", lambda: ())
    assert main(words) == code
    output = "".join(capsys.readouterr())
    assert words[0] == "check" or "home folder" in output


@pytest.mark.parametrize("value", ["http://[::1", "http://127.0.0.1:x", "http://127.0.0.1:99999"])
def test_an_endpoint_that_is_no_address_is_bad_input(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    for words in (["doctor"], ["check", "spm-v3"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: HF_ENDPOINT: {value!r} is not an address")
