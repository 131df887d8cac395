"""What is said of a chat whose answer differs from that to the same ids: on llama.cpp, and with a relay before it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_server import Change, Relay, in_streams, masked, nothing, with_entities, with_prefix, without_calls
from derived_tekken import derived_oracle
from gguf_files import write_gguf
from golden_answers import transcript_of
from llamacpp_process import BUILD, converted_model, needs_llamacpp, served
from local_server import serving
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.server.chat_causes import CONSTRAINED, RIGHT_MODEL, RIGHT_PROMPT
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.training.export.probe import plant
from pytest_mistral_lora.training.generate.record import next_token_logprobs

pytestmark = needs_llamacpp

Ask = Callable[[dict[str, Any]], dict[str, Any]]
RIGHT = ("plain", "system", "call", "text-after-result")
"""Known answers that llama.cpp gives as the model says them."""
COUNT = len(RIGHT)
BY_GRAMMAR = "call-other-order"
"""One whose keys are not in the order of the schema, which llama.cpp's grammar fixes."""
SWEPT = pytest.mark.slow
"""What test_replay.py and the gallery have with a server of the tests, here with llama.cpp."""
KNOWN = {answer.name: answer for answer in known_answers() if answer.name in (*RIGHT, BY_GRAMMAR)}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return derived_oracle("derived-v13-thinking", words=2000)


@pytest.fixture(scope="module")
def folder(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the answers, their transcripts, and a row."""
    folder = tmp_path_factory.mktemp("causes")
    plant(folder / "model", oracle, tuple(KNOWN.values()))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, known in KNOWN.items():
        golden = folder / ("by-grammar" if name == BY_GRAMMAR else "right")
        golden.mkdir(exist_ok=True)
        ids = known.prompt_ids(oracle), known.answer_ids(oracle)
        with torch.no_grad():
            every = next_token_logprobs(model, *ids)
        logprobs = tuple(every[at, token].item() for at, token in enumerate(ids[1]))
        replace(transcript_of(oracle, name, known.row, *ids), logprobs=logprobs).write(golden)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def llamacpp(folder: Path, oracle: Oracle) -> Iterator[str]:
    with served(write_gguf(folder / "model.gguf", *converted_model(folder / "model", oracle))) as (_, address):
        yield address


@pytest.fixture
def check(
    llamacpp: str, folder: Path, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def run(golden: str, asks: Ask = lambda request: request, change: Change = nothing) -> tuple[int, str]:
        words = ["--tokenizer", str(oracle.path), "--rows", str(folder / "one.jsonl")]
        with serving(Relay(oracle, upstream=llamacpp, asks=asks, change=change)) as url:
            code = main(["serve-check", f"llamacpp@{BUILD}={url}", *words, "--golden", str(folder / golden)])
        return code, capsys.readouterr().out

    return run


def test_answers_that_nothing_changes_are_green(check: Callable[..., tuple[int, str]]) -> None:
    code, out = check("right")
    assert (code, out.count(f"{COUNT} exact of {COUNT}")) == (0, 2), out
    assert f"as a stream {COUNT} of {COUNT}" in out


def test_a_grammar_is_the_cause_if_the_request_without_it_is_answered_as_recorded(
    check: Callable[..., tuple[int, str]],
) -> None:
    code, out = check("by-grammar")
    assert code == 1
    assert re.findall(r"^ML\d+", out, re.MULTILINE) == ["ML909"], out
    assert CONSTRAINED in out
    assert "1 exact of 1" in out


def test_a_server_that_drafts_tokens_is_judged_by_ids_alone(
    folder: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "model.gguf", *converted_model(folder / "model", oracle))
    words = ["--tokenizer", str(oracle.path), "--rows", str(folder / "one.jsonl"), "--golden", str(folder / "right")]
    with served(file, draft=str(file)) as (_, address):
        code = main(["serve-check", f"llamacpp@{BUILD}:fp32={address}", *words])
    out = capsys.readouterr().out
    assert (code, out.count(f"{COUNT} exact of {COUNT}")) == (0, 2), out
    assert re.search(r"log-probabilities are not compared, and ids are: the server drafts tokens.* \(2\)\n", out), out
    assert "nats at most" not in out


class WithGrammar(Relay):
    """A relay that gives a grammar to each request that has none."""

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the answer of the server."""
        is_answer = path in ("/completion", "/v1/chat/completions") and not data.get("tools")
        return super().respond(path, {"grammar": 'root ::= "no" | "yes"', **data} if is_answer else data)


def test_a_grammar_of_each_request_is_the_cause_and_not_the_weights(
    llamacpp: str, folder: Path, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer", str(oracle.path), "--rows", str(folder / "one.jsonl"), "--golden", str(folder / "right")]
    with serving(WithGrammar(oracle, upstream=llamacpp)) as url:
        code = main(["serve-check", f"llamacpp@{BUILD}={url}", *words])
    out = capsys.readouterr().out
    assert (code, re.findall(r"^(ML\d+) ", out, re.MULTILINE)[:1]) == (1, ["ML908"]), out
    assert "so a grammar constrains each answer" in out
    assert "The weights differ" not in out


def strict(text: str) -> str:
    """Leave the space behind [SYSTEM_PROMPT] out, which rows without a system message do not have."""
    changed = text.replace("[SYSTEM_PROMPT]", "[SYSTEM_PROMPT] ")
    assert changed != text
    return changed


@pytest.mark.parametrize(
    ("change", "rules", "says"),
    [
        (
            lambda text: text.replace("[INST]", "[INST] "),
            ["ML902"],
            r"ML902 .*one\.jsonl[\s\S]*explains: \d more findings: ML909 \(\d\)",
        ),
        # the asked row is right: the answer alone shows the template
        (strict, ["ML909"], rf"{re.escape(RIGHT_MODEL)}\n.*the first other: token \d+"),
    ],
    ids=["each-row", "transcript"],
)
def test_answers_to_prompts_of_a_wrong_template_are_a_part_of_the_finding_of_the_prompts(
    change: Callable[[str], str],
    rules: list[str],
    says: str,
    folder: Path,
    oracle: Oracle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(change(oracle.chat_template()))
    file = write_gguf(tmp_path / "model.gguf", *converted_model(folder / "model", oracle))
    words = ["--tokenizer", str(oracle.path), "--rows", str(folder / "one.jsonl"), "--golden", str(folder / "right")]
    with served(file, template=str(template)) as (_, address):
        code = main(["serve-check", f"llamacpp@{BUILD}={address}", *words])
    out = capsys.readouterr().out
    assert (code, re.findall(r"^(ML\d+) ", out, re.MULTILINE)) == (1, rules), out
    assert re.search(says, out), out
    # by ids they are the recorded ones, in the summary
    assert RIGHT_MODEL in out
    assert f"{COUNT} exact of {COUNT}" in out


def with_system_prompt(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "messages": [{"role": "system", "content": "You are kind."}, *request["messages"]]}


def with_the_last_message(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "messages": request["messages"][-1:]}


def without_tools(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name != "tools"}


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        (with_system_prompt, rf"{re.escape(RIGHT_MODEL)}\n.*prompt: \d+ tokens recorded, \d+ fed to the chat"),
        pytest.param(with_the_last_message, r"prompt: \d+ tokens recorded, \d+ fed to the chat", marks=SWEPT),
        pytest.param(without_tools, r"prompt: \d+ tokens recorded, \d+ fed to the chat", marks=SWEPT),
        pytest.param(lambda request: {**request, "stop": ["."]}, r"the answer ends early", marks=SWEPT),
        pytest.param(
            lambda request: {**request, "max_tokens": 1}, r"a limit ends the answer after 1 token, and", marks=SWEPT
        ),
        (lambda request: {**request, "temperature": 9, "seed": -1}, r"two answers to one request differ"),
        pytest.param(
            lambda request: {**request, "logit_bias": [[" Paris", -100], ["Paris", -100]]},
            r"the chat changes the answer",
            marks=SWEPT,
        ),
    ],
    ids=["system", "last-message", "tools", "stop", "limit", "temperature", "bias"],
)
def test_a_relay_that_changes_requests_is_not_taken_for_a_grammar(
    asks: Ask, says: str, check: Callable[..., tuple[int, str]]
) -> None:
    code, out = check("right", asks)
    assert code == 1, out
    assert CONSTRAINED not in out
    assert re.search(says, out), out
    assert "ML909 " in out
    assert (RIGHT_PROMPT in out) is ("tokens recorded" not in says), out


@pytest.mark.parametrize(
    ("change", "wrong", "is_stream", "says"),
    [
        (masked, 1, False, r"the client gets text '\*\*\*\*\.'\n +expected: text 'Paris\.'"),
        pytest.param(
            with_entities, 1, False, r"the client gets text 'It&nbsp;has&nbsp;25&nbsp;degrees\.'", marks=SWEPT
        ),
        pytest.param(
            with_prefix, COUNT, True, r"the client gets text 'AI: Paris\.'\n +expected: text 'Paris\.'", marks=SWEPT
        ),
        (without_calls, 1, True, r"the client gets an empty message\n +expected: calls weather\("),
    ],
    ids=["mask", "entities", "prefix", "calls"],
)
def test_a_message_that_is_changed_behind_right_ids_is_a_finding(
    change: Change, wrong: int, is_stream: bool, says: str, check: Callable[..., tuple[int, str]]
) -> None:
    code, out = check("right", change=in_streams(change) if is_stream else change)
    assert (code, set(re.findall(r"^(ML\d+) ", out, re.MULTILINE))) == (1, {"ML909"}), out
    says = says.replace("the client", "as a stream the client") if is_stream else says
    assert re.search(says, out), out
    assert CONSTRAINED not in out
    # by ids, and as whole answers if the streams alone are changed
    assert out.count(f"{COUNT} exact of {COUNT}") == 1 + is_stream
    right = f"as a stream {COUNT - wrong} of {COUNT}" if is_stream else rf"{wrong} different"
    assert re.search(right, out), out
