"""The fixes of findings about a server: in the options of its kind if that is known, else in general words."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden_answers import golden_answers, write_golden_answers
from local_server import Behaviour, Ids, serving

from pytest_mistral_lora.assertions import assert_served_as_trained
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.answer.comparison import stop_words
from pytest_mistral_lora.conformance.finding import RULES, Finding, with_paths
from pytest_mistral_lora.conformance.server.changed_messages import FedPrompt, changed_messages
from pytest_mistral_lora.conformance.server.chat_causes import _FIXES
from pytest_mistral_lora.conformance.server_target import ParsersTarget, ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import EntryPointError
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.serving.servers import SERVERS

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
OPTIONS = {"vllm": "--tokenizer-mode mistral", "llamacpp": "--override-kv"}
Judged = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


def with_a_space(ids: Ids, _: Any) -> Ids:
    """Put a space behind the first marker (ids of `spm-v3`)."""
    return (*ids[:2], 29473, *ids[2:])


@pytest.fixture
def judged(oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Judged:
    """Return a function that checks a server, and returns its findings."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")

    def judge(kind: str, *more: str, **behaviour: Any) -> list[dict[str, Any]]:
        with serving(Behaviour(oracle, **behaviour)) as url:
            given = [f"{kind}={url}" if kind else url, "--tokenizer", "spm-v3", "--rows", str(rows), *more]
            assert main(["serve-check", *given, "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        return [finding for check in report["checks"] for finding in check["findings"]]

    return judge


@pytest.mark.parametrize("kind", [*OPTIONS, "", "openai"])
def test_a_finding_has_the_option_of_the_kind_of_server_and_no_other(kind: str, judged: Judged) -> None:
    version = {"version": "0.32.0"} if kind == "vllm" else {}
    (found,) = judged(kind, prompt=with_a_space, **version)
    # a server whose kind is recognised is this one
    known = kind or "llamacpp"
    assert found["rule"] == ("ML904" if kind == "openai" else "ML902")
    assert [name for name, option in OPTIONS.items() if option in found["fix"]] == [known] * (known in OPTIONS)
    if kind == "openai":
        assert found["fix"] == RULES["ML904"].fix


def with_a_system_prompt(ids: Ids, _: Any) -> Ids:
    """Put the ids of `Be kind.` and a blank line before the text of the user (ids of `spm-v3`)."""
    kind = Oracle(shipped_tokenizer("spm-v3")).encode_prompt(
        {"messages": [{"role": "system", "content": "Be kind."}, *ROW["messages"]]}
    )
    return kind if len(kind) > len(ids) else ids


def without_the_start(ids: Ids, _: Any) -> Ids:
    """Cut a prompt to its last tokens."""
    return ids[-2:]


def with_another_text(ids: Ids, _: Any) -> Ids:
    """Put the ids of another text between the markers (ids of `spm-v3`)."""
    return (*ids[:2], *Oracle(shipped_tokenizer("spm-v3")).encode_text("Good bye"), *ids[-1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_a_system_prompt, "the system prompt that each chat gets"),
        (without_the_start, "what cuts each prompt"),
        (with_another_text, "the texts are not those that were sent"),
    ],
)
def test_what_a_gateway_does_to_a_prompt_has_its_own_fix_where_the_fed_ids_are_shown(
    change: Any, words: str, judged: Judged
) -> None:
    [found] = judged("vllm", prompt=change, version="0.32.0")
    assert (found["rule"], words in found["fix"], "Ask vLLM itself" in found["fix"]) == ("ML902", True, True), found
    # a preview passes no gateway: the file or its template is the cause
    found = next(one for one in judged("llamacpp", preview=change, prompt=change) if one["rule"] == "ML902")
    assert "mistral-lora check FILE.gguf" in found["fix"]


@pytest.mark.parametrize(
    "words",
    [
        "temperature must be in [0, 2], got 9.0.",
        "min_tokens must be less than or equal to max_tokens=1, got 5.",
        "max_tokens must be at least 1, got 0.",
    ],
)
def test_a_setting_that_a_server_refuses_is_no_template(words: str, judged: Judged) -> None:
    [found] = judged("vllm", refuses=lambda data: True, refusal=(400, words), version="0.32.0")
    assert (found["rule"], "refuses a setting of the request" in found["fix"]) == ("ML907", True), found
    # of messages the template is the cause
    [found] = judged("vllm", refuses=lambda data: True, version="0.32.0")
    assert (found["rule"], "template.jinja" in found["fix"]) == ("ML907", True), found


@pytest.mark.parametrize(("more", "is_system"), [(2, False), (3, True)])
def test_too_few_tokens_are_no_system_message(more: int, is_system: bool) -> None:
    # from version 7 on it has two markers and a text
    oracle = Oracle(shipped_tokenizer("spm-v7"))
    row = parse_row(ROW)
    row = replace(row, messages=row.messages[:1])
    found = changed_messages([FedPrompt(row, 4, 4 + more)], oracle)
    assert found is not None
    assert (found.is_told, "as of a system message" in found.words) == (is_system, is_system), found.words


@pytest.mark.parametrize(
    ("text", "rest", "is_stop"),
    [
        ("Paris", ". It is large.", True),
        # a full stop would have ended it before, and a longer string may still
        ("It is. Paris", ". It", True),
        ("one one", " one", False),
        ("a b a b", " a b", False),
        ("", "Paris.", True),
    ],
)
def test_a_stop_string_is_not_in_the_text_before_it(text: str, rest: str, is_stop: bool) -> None:
    assert bool(stop_words("", text, rest)) is is_stop
    assert repr("END") in stop_words("END", text, rest)


def last_message(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "messages": row["messages"][-1:]}


def without_tools(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "tools"}


@pytest.mark.parametrize(
    ("change", "words"),
    [(last_message, "its history is lost"), (without_tools, "The chat has no tools")],
    ids=["history", "tools"],
)
def test_messages_that_a_gateway_changes_before_the_right_tokenizer_are_one_finding(
    change: Any, words: str, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    class Changing(Behaviour):
        def ids(self, data: dict[str, Any]) -> Ids:
            return super().ids(change(data))

    with serving(Changing(oracle, version="0.32.0")) as url:
        assert main(["serve-check", f"vllm={url}", "--tokenizer", "spm-v3"]) == 1
    out = capsys.readouterr().out
    # a tool result alone is refused
    assert re.findall("^ML[0-9]+", out, re.MULTILINE) in (["ML902"], ["ML902", "ML907"]), out
    assert f"{words}, which gives the ids of each" in out, out
    assert "--tokenizer-mode" not in out


def test_an_assertion_has_the_words_of_the_server_too(oracle: Oracle) -> None:
    with (
        serving(Behaviour(oracle, prompt=with_a_space)) as url,
        pytest.raises(AssertionError, match="Start vLLM with `--tokenizer-mode mistral`"),
    ):
        assert_served_as_trained(f"vllm={url}", ROW, shipped_tokenizer("spm-v3"))


def test_parsers_have_the_words_of_their_server() -> None:
    target = ParsersTarget("served", judge=Target("spm-v3"), kind="vllm", python=Path(sys.executable))
    (found,) = target.in_words((Finding("ML925", "found"),))
    assert "--reasoning-parser mistral" in found.fix


@pytest.mark.parametrize(("text", "words"), [("[rules", "not valid TOML"), (None, "cannot be read")])
def test_a_file_of_fixes_that_is_none_is_an_error_of_its_package(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "fixes.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(EntryPointError) as error:
        fixes_in(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_a_server_that_nobody_answers_for_has_the_general_fix() -> None:
    target = ServerTarget("served", judge=Target("spm-v3"), kind="auto", url="http://127.0.0.1:9")
    findings = (Finding("ML906", "found"),)
    assert target.in_words(findings) == findings


def test_a_cause_has_the_option_of_the_kind_in_place_of_the_fix_of_the_rule(
    oracle: Oracle, tmp_path: Path, judged: Judged
) -> None:
    folder = write_golden_answers(oracle, tmp_path / "answers")
    rome = oracle.encode_text("Rome")[0]
    found = judged(
        "llamacpp",
        "--golden",
        str(folder),
        golden=golden_answers(oracle),
        scale=None,
        completion=lambda ids, _: (rome, *ids[1:]),
    )
    fixes = {finding["fix"] for finding in found if finding["rule"] == "ML908"}
    assert fixes == {SERVERS["llamacpp"].fixes("causes")["no-adapter"]}


LIKELY = {
    "another-tokenizer": ("ML902", "Else another model is served"),
    "quantised": ("ML908", "Serve the weights in the recorded precision"),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("cause", LIKELY)
def test_a_likely_cause_is_followed_by_the_check_of_the_file_that_llamacpp_reads(
    cause: str, kind: str, oracle: Oracle, tmp_path: Path, judged: Judged
) -> None:
    version = {"version": "0.32.0"} if kind == "vllm" else {}
    if cause == "quantised":
        folder = write_golden_answers(oracle, tmp_path / "answers")
        rome = oracle.encode_text("Rome")[0]
        behaviour = {"golden": golden_answers(oracle), "completion": lambda ids, _: (rome, *ids[1:]), **version}
        found = judged(f"{kind}:q4", "--golden", str(folder), **behaviour)
    else:
        found = judged(kind, "--tokenizer", "spm-v1", **version)
    rule, says = LIKELY[cause]
    fixes = {finding["fix"] for finding in found if finding["rule"] == rule}
    assert fixes
    for fix in fixes:
        assert says in fix
        assert ("mistral-lora check FILE.gguf" in fix) == (kind == "llamacpp"), fix


@pytest.mark.parametrize("kind", SERVERS.ours)
def test_the_words_of_a_server_are_of_its_rules_and_causes_and_name_an_option_of_it(kind: str) -> None:
    server = SERVERS[kind]
    assert server.fixes("causes").keys() <= _FIXES.keys()
    for rule, fix in server.fixes().items():
        assert RULES[rule].subject in ("server", "answer")
        assert fix != RULES[rule].fix
        assert Finding(rule, "found", fix=fix).to_json()["fix"] == with_paths(fix)
    for fix in (*server.fixes().values(), *server.fixes("causes").values()):
        assert server.title in fix or re.search(r"`(--|POST )", fix), fix


@pytest.mark.parametrize("subject", ["server", "answer"])
def test_a_rule_names_no_server(subject: str) -> None:
    names = {name.lower() for server in SERVERS.of_this_package() for name in (server.name, server.title)}
    names -= {SERVERS["openai"].name, SERVERS["openai"].title.lower()}
    for rule in RULES.of(subject):
        example = (rule.example.fault, rule.example.finding, rule.example.command, rule.example.sound)
        text = " ".join((rule.title, rule.why, rule.fix, *example)).lower()
        assert not [name for name in names if name in text], rule.id
