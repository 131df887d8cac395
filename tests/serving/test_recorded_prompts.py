"""What real servers made of a few packaged rows and named deviations: judged, and replayed through vLLM's own API.

`recorded_prompts.json` has a server, a setting and a tokenizer in each entry, and by the name of a row its ids, their
number, or how the request ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from local_server import Behaviour, serving
from named_deviations import asked_examples

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.server.checks import ServerChecks
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerAnswers, ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.serving.server import ServedPrompt, ServerFacts, chat_request

Recorded = dict[str, Any]
RECORDED: list[Recorded] = json.loads(Path(__file__).with_name("recorded_prompts.json").read_text(encoding="utf-8"))
HF = "--tokenizer-mode hf"


def recorded(kind: str, tokenizer: str = "spm-v3", setting: str = "") -> Recorded:
    [found] = [
        one for one in RECORDED if (one["kind"], one["tokenizer"]) == (kind, tokenizer) and setting in one["setting"]
    ]
    return found


def target_of(one: Recorded) -> ServerTarget:
    judge = Target.of_loaded(converted_tokenizer(one["tokenizer"]), one["tokenizer"])
    return ServerTarget("served", judge=judge, kind=one["kind"], url="http://127.0.0.1:1")


def asked(one: Recorded) -> Iterator[AskedRow]:
    """Yield the rows of a recording with what the server made of them."""
    target = target_of(one)
    for row in (*target.asked_rows(), *asked_examples(target)):
        if (made := one["rows"].get(row.name)) is not None:
            yield replace(row, served=ServedPrompt(**{**made, "ids": made.get("ids") and tuple(made["ids"])}))


def rules(one: Recorded, row: AskedRow, version: str = "") -> set[str]:
    """Return the rules that the prompt of a row breaks."""
    target = target_of(one)
    # as the target keeps the answers of a running server
    vars(target)["answers"] = ServerAnswers(ServerFacts(version or one["version"], ("tiny",)), "tiny", (row,))
    results = [judge() for judge in ServerChecks(target).cases().values()]
    return {finding.rule for result in results for finding in result.findings}


@pytest.mark.parametrize("one", RECORDED, ids=lambda one: f"{one['kind']}-{one['tokenizer']}{one['setting'][-3:]}")
def test_what_a_server_made_of_a_row_is_right_a_known_deviation_or_a_finding(one: Recorded) -> None:
    broken = {row.name: found for row in asked(one) if (found := rules(one, row))}
    expected: dict[str, set[str]] = {}
    if one["kind"] == "openai":
        # transformers serve joins the parts of a text by a space, drops the text beside a call, and fails with HTTP 500
        # for a chat that the template refuses
        expected = {"text-chunks": {"ML904"}, "no-user-refused": {"ML919"}, "tool-call-with-text": {"ML904"}}
        expected = {name: found for name, found in expected.items() if name in one["rows"]}
    elif one["setting"] == HF and one["tokenizer"] == "spm-v3":
        expected = {"control-literal": {"ML906"}, "no-user-refused": {"ML907"}}
    elif one["kind"] == "llamacpp":
        expected = {"no-user-refused": {"ML907"}}
    assert broken == expected


def replayed(one: Recorded) -> Behaviour:
    """Return a server that answers with the recorded prompts, in the form of vLLM."""
    known = {_key(chat_request(row.row)): row.served for row in asked(one)}

    class Replayed(Behaviour):
        def respond(self, path: str, data: Any) -> tuple[int, Any]:
            if path != "/v1/chat/completions":
                return super().respond(path, data)
            found = known[_key(data)]
            assert isinstance(found, ServedPrompt)
            if found.refused:
                return 400, {"error": {"message": found.refused}}
            usage = {"prompt_tokens": len(found.ids or ())}
            return 200, {"prompt_token_ids": found.ids, "usage": usage, "choices": [{"message": {"content": "x"}}]}

    return Replayed(converted_tokenizer(one["tokenizer"]).oracle, version=one["version"])


def _key(data: dict[str, Any]) -> str:
    return json.dumps([data["messages"], data.get("tools")])


@pytest.mark.parametrize(
    ("setting", "code", "rule", "says"),
    [
        ("--tokenizer-mode mistral", 0, "", "6 of 6 prompts have the ids"),
        (HF, 1, "ML906", "1 of 5 prompts"),
    ],
)
def test_the_answers_of_vllm_are_read_as_they_were(
    setting: str, code: int, rule: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = recorded("vllm", setting=setting)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{row.row.to_jsonl()}\n" for row in asked(one)), encoding="utf-8")
    with serving(replayed(one)) as url:
        found = main(["serve-check", f"vllm={url}", "--tokenizer", "spm-v3", "--rows", str(file)])
    out = capsys.readouterr().out
    assert (found, rule in out, "ML902" in out) == (code, True, False), out
    assert "vLLM 0.32.0, model tiny: proof by ids" in out
    assert says in out, out


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("no-space-after-system", "spm-v7"),
        ("unequal-weights-merged", "spm-v3"),
        ("system-between-users", "spm-v3"),
        ("empty-message-joined", "spm-v3"),
        ("tool-results-out-of-order", "derived-v11"),
    ],
)
def test_a_recorded_deviation_is_accepted_of_its_server_and_version_alone(name: str, tokenizer: str) -> None:
    one = recorded("vllm", tokenizer, HF)
    [row] = [row for row in asked(one) if row.name == name]
    assert isinstance(row.served, ServedPrompt)
    assert row.served.ids is not None
    assert rules(one, row) == set()
    assert rules(one, row, "0.31.2") == {"ML902"}
    ids = (*row.served.ids, row.served.ids[-1])
    assert rules(one, replace(row, served=replace(row.served, ids=ids))) == {"ML902"}


@pytest.mark.parametrize("name", ["hostile-user", "control-literal"])
def test_a_control_literal_is_known_of_the_builds_of_llamacpp_that_were_run_and_of_no_other_prompt(name: str) -> None:
    one = recorded("llamacpp")
    [row] = [row for row in asked(one) if row.name == name]
    assert isinstance(row.served, ServedPrompt)
    assert rules(one, row) == set()
    assert rules(one, row, "b12000-8b3f1c2") == set()
    assert "ML906" in rules(one, row, "b8671-8b3f1c2")
    # it has a setting that encodes text as text
    assert "ML906" in rules({**one, "kind": "vllm"}, row, "0.32.0")
    # a wheel that reports no build
    assert "ML906" in rules({**one, "version": ""}, row)
    # a marker more than the rendered text has
    ids = row.served.ids or ()
    changed = replace(row, served=replace(row.served, ids=(*ids[:-1], 4, *ids[-1:])))
    assert "ML906" in rules(one, changed)
