"""The parsers of an installed vLLM, in a process of their own: by what version 0.32.0 made of known answers."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from answer_server import AnswerServer, question
from derived_tekken import derived_oracle
from golden_answers import transcript_of
from local_server import Message, serving
from vllm_python import VLLM_PYTHON, needs_vllm

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.server.checks import served_prompt
from pytest_mistral_lora.conformance.server_target import ParsersTarget, ServerChoice
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.known_answers import KnownAnswer, known_answers
from pytest_mistral_lora.serving.answers import ServedAnswer
from pytest_mistral_lora.serving.forced_answers import request_of

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_parsers.json").read_text(encoding="utf-8"))
"""The messages of version 0.32.0 for a tokenizer of v13 with thinking, by the name of the answer."""

OF_VLLM = {
    # the letters of a marker
    "ML924": {"spelled-call", "spelled-call-tools", "spelled-thinking", "spelled-end", "call-spelled"}
    | {"thinking-spelled-call"},
    # values of a property without a type
    "ML927": {"call-null", "call-boolean", "call-float", "call-big-integer"},
}
"""The answers that version 0.32.0 changes, if they come whole, by the rule."""

PARSERS = "vllm-parsers"
ANSWERS = {answer.name: answer for answer in known_answers()}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return derived_oracle("derived-v13-thinking", words=2000)


def replaying(folder: Path, *messages: Any) -> Path:
    """Return a program in place of a Python with vLLM: it writes messages, and reads nothing."""
    made = folder / "made.json"
    made.write_text(json.dumps({"version": RECORDED["version"], "answers": messages}))
    return program(folder, f'cp {shlex.quote(str(made))} "$3"')


def program(folder: Path, line: str) -> Path:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


def judged(python: Path, oracle: Oracle, *answers: KnownAnswer) -> dict[str, Result]:
    judge = Target("own", oracle.path)
    target = ParsersTarget(PARSERS, judge=judge, kind="vllm", python=python, given_answers=answers)
    return {case: run() for case, run in AnswerChecks(target).cases().items()}


def findings(results: dict[str, Result]) -> dict[str, str]:
    return {finding.rule: finding.found for result in results.values() for finding in result.findings}


def test_the_parsers_of_vllm_make_what_was_recorded(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = replaying(tmp_path, *all_messages(oracle))
    code = main(["serve-check", f"{PARSERS}={python}", "--tokenizer", str(oracle.path)])
    out = capsys.readouterr().out
    assert code == 1, out
    assert re.search("55 of 65 .*whole.*, 65 of 65 .*stream; 65 .*parsers by ids", out)
    assert "line-breaks-before-call (1), thought-edges (1)" in out
    results = judged(python, oracle, *(answer for answer in ANSWERS.values() if answer.fits(oracle)))
    broken: dict[str, set[str]] = {}
    for finding in (finding for result in results.values() for finding in result.findings):
        if finding.rule != "ML931" and not finding.found.startswith("…"):
            name, _, way = finding.found.partition(": ")
            broken.setdefault(f"{finding.rule} {way.partition(':')[0]}", set()).add(name)
    assert broken == {
        "ML924 whole": OF_VLLM["ML924"],
        # a part of the stream with several tokens is read by its letters, too
        "ML924 streamed with a cut before token 1": {"spelled-end", "call-spelled"},
        **{f"ML925 streamed with a cut before token {cut}": {"thinking-twice"} for cut in (6, 7, 8, 9)},
        "ML927 whole": OF_VLLM["ML927"],
    }


def test_what_sound_parsers_make_of_recorded_ids_is_no_change_of_a_message(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [one for one in ANSWERS.values() if one.fits(oracle) and not one.settings and not one.row.response_format]
    golden, rows = tmp_path / "golden", tmp_path / "one.jsonl"
    golden.mkdir()
    for one in asked:
        transcript_of(oracle, one.name, one.row, one.prompt_ids(oracle), one.answer_ids(oracle)).write(golden)
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')
    recorded = {question(request_of(one)): RECORDED["answers"][one.name] for one in asked}

    def parsed(message: Message, request: dict[str, Any]) -> None:
        made = recorded[question(request)]
        part = made["streams"][0] if request.get("stream") else made["whole"]
        calls = [{"id": f"call{at:05}", "type": "function", "function": one} for at, one in enumerate(part["calls"])]
        message |= {"content": part["content"], "reasoning_content": part["reasoning"], "tool_calls": calls}

    with serving(AnswerServer(oracle, change=parsed)) as url:
        words = ["--tokenizer", str(oracle.path), "--rows", str(rows), "--golden", str(golden), "--json"]
        assert main(["serve-check", f"vllm:fp32={url}", *words]) == 1
    [check] = [one for one in json.loads(capsys.readouterr().out)["checks"] if one["case"] == "by-messages"]
    # the letters of a marker, and values of a property without a type, each in whole answers alone
    changed = {finding["found"].partition(":")[0] for finding in check["findings"]}
    assert changed == OF_VLLM["ML924"] | OF_VLLM["ML927"]
    summary = check["facts"]["answers by messages of"]
    assert f"{len(asked) - 10} exact, 10 different of {len(asked)}" in summary
    assert f"as a stream {len(asked) - 10} of {len(asked) - 10}" in summary


def test_a_plain_answer_is_read_as_it_was_said(oracle: Oracle, tmp_path: Path) -> None:
    python = replaying(tmp_path, RECORDED["answers"]["plain"])
    results = judged(python, oracle, ANSWERS["plain"])
    assert findings(results) == {}
    assert dict(results["answered"].facts)["server of"].startswith("vLLM 0.32.0, its parsers")


def test_a_stream_that_depends_on_the_cut_is_found(oracle: Oracle, tmp_path: Path) -> None:
    plain = RECORDED["answers"]["plain"]
    [stream] = plain["streams"]
    cut = {**stream, "cut": 1, "content": "Par"}
    python = replaying(tmp_path, {**plain, "streams": [stream, cut]})
    results = judged(python, oracle, ANSWERS["plain"])
    way = "plain: streamed with a cut before token 1"
    assert findings(results) == {"ML923": f"{way}: the text 'Par'", "ML931": f"{way}: text 'Par'"}
    assert "; 1 stream with another message if cut elsewhere" in dict(results["answered"].facts)["answers of"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("echo \"ModuleNotFoundError: No module named 'vllm'\"; exit 1", "No module named 'vllm'"),
        ("exit 0", "it wrote no file"),
    ],
)
def test_a_python_whose_parsers_do_not_run_is_a_finding(line: str, says: str, oracle: Oracle, tmp_path: Path) -> None:
    results = judged(program(tmp_path, line), oracle, ANSWERS["plain"])
    assert says in findings(results)["ML921"]
    assert results["text"].not_checked == "the parsers do not run: see the check `answered`"


def test_a_request_that_the_parsers_cannot_prepare_fails(oracle: Oracle, tmp_path: Path) -> None:
    words = "TypeError: get_lark_from_jinja() missing 1 required positional argument: 'force_tool_names'"
    failed = {"error": words}
    python = replaying(tmp_path, {"whole": failed, "streams": [{"cut": None, **failed}]})
    results = judged(python, oracle, ANSWERS["plain"])
    assert words in findings(results)["ML921"]
    assert results["text"].not_checked == "no answer came: see the check `answered`"


def decoding(folder: Path, fault: str = "none") -> Path:
    """Return a program in place of a Python with vLLM, which runs the script with mistral-common's decoder."""
    stand_in = Path(__file__).with_name("parsers_of_mistral_common.py")
    return program(folder, f'exec {shlex.quote(sys.executable)} {shlex.quote(str(stand_in))} {fault} "$@"')


SOME = ("plain", "emoji", "call", "calls-of-two-tools", "thinking")


def test_the_script_reads_the_answers_and_writes_their_messages(oracle: Oracle, tmp_path: Path) -> None:
    answers = [ANSWERS[name] for name in SOME]
    results = judged(decoding(tmp_path), oracle, *answers)
    assert findings(results) == {}
    facts = dict(results["answered"].facts)
    assert facts["server of"].startswith("vLLM 0.0-decoder, its parsers")
    assert re.match("5 of 5 .*whole.*, 5 of 5 .*stream; 5 .*parsers", facts["answers of"])


def test_the_script_cuts_each_stream_at_each_place(oracle: Oracle, tmp_path: Path) -> None:
    results = judged(decoding(tmp_path, "cut"), oracle, ANSWERS["plain"])
    # the cut before the last token and EOS loses nothing, and the others are one message
    way = "plain: streamed with a cut before token 1"
    assert findings(results) == {"ML923": f"{way}: the text 'Paris'", "ML931": f"{way}: text 'Paris'"}


@pytest.mark.parametrize(
    ("fault", "failed", "words"),
    [
        ("unprepared", {"call", "calls-of-two-tools"}, "TypeError: get_lark_from_jinja() missing 1 required"),
        ("raises", set(SOME[:4]), "ValueError: no parser"),
    ],
)
def test_the_script_writes_the_errors_of_parsers(
    fault: str, failed: set[str], words: str, oracle: Oracle, tmp_path: Path
) -> None:
    results = judged(decoding(tmp_path, fault), oracle, *(ANSWERS[name] for name in SOME[:4]))
    errors = [finding for finding in results["answered"].findings if finding.rule == "ML921"]
    assert all(words in finding.found for finding in errors), [finding.found for finding in errors]
    assert {finding.found.partition(":")[0] for finding in errors} == failed


def test_the_script_names_the_module_that_a_python_lacks(oracle: Oracle, tmp_path: Path) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    # `regex` is imported before vLLM, and both are the reason
    found = findings(judged(Path(sys.executable), oracle, ANSWERS["plain"]))
    assert re.search(r"No module named '(vllm|regex)'", found["ML921"]), found


@pytest.mark.parametrize("option", ["--model", "--rows", "--adapter", "--golden", "--probe"])
def test_parsers_take_no_option_of_a_running_server(
    option: str, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = program(tmp_path, "exit 0")
    words = [f"{PARSERS}={python}", "--tokenizer", str(oracle.path), option, str(tmp_path)]
    assert main(["serve-check", *words]) == 2
    assert f"{option} only applies to a running server" in capsys.readouterr().err


def test_parsers_are_named_by_a_python_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no program"):
        ServerChoice.parse(f"{PARSERS}={tmp_path / 'python'}")
    python = program(tmp_path, "exit 0")
    chosen = ServerChoice.parse(f"{PARSERS}={python}")
    assert ServerChoice.parse(str(chosen)) == chosen


def test_pytest_gives_answers_to_parsers(
    oracle: Oracle, run_pytest: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    python = replaying(tmp_path, *all_messages(oracle))
    named = (f"--mistral-server={PARSERS}={python}", f"--mistral-tokenizer={oracle.path}")
    found = run_pytest("--mistral-golden", *named, "-k", "vllm-parsers")
    found.assert_outcomes(passed=4, failed=4, skipped=3)
    found.stdout.fnmatch_lines(["ML924 spelled-end: whole: *"])


def test_the_fixture_of_prompts_refuses_parsers(oracle: Oracle, tmp_path: Path) -> None:
    choice = ServerChoice.parse(f"{PARSERS}={program(tmp_path, 'exit 0')}")
    with pytest.raises(InputError, match="make no prompts"):
        served_prompt(choice, ANSWERS["plain"].row, CheckpointTokenizer(oracle.path))


@pytest.mark.vllm
@needs_vllm
def test_the_installed_parsers_make_what_was_recorded(oracle: Oracle) -> None:
    judge = Target("own", oracle.path)
    target = ParsersTarget(PARSERS, judge=judge, kind="vllm", python=VLLM_PYTHON)
    assert target.served_version == RECORDED["version"]
    for forced, recorded in zip(target.forced_answers, all_messages(oracle), strict=True):
        assert isinstance(forced.whole, ServedAnswer)
        assert isinstance(forced.stream, ServedAnswer)
        assert forced.whole.text == (recorded["whole"]["content"] or ""), forced.known.name
        assert forced.stream.text == recorded["streams"][0]["content"], forced.known.name
        assert len(forced.cuts) == len(recorded["streams"]) - 1, forced.known.name


def all_messages(oracle: Oracle) -> list[Any]:
    return [RECORDED["answers"][name] for name, answer in ANSWERS.items() if answer.fits(oracle)]
