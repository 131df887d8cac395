"""The recorded prompts of real servers: judged as on their page, and replayed through a local server."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scoreboards
from boards import pages, prompts, tables
from boards.inputs import DOCS
from boards.prompts import RecordedServer, asked_examples, read_recorded
from boards.results import DEVIATION
from local_server import Behaviour, serving

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.serving.server import chat_request
from pytest_mistral_lora.serving.servers import SERVERS

RECORDED = {(one.kind, one.setting, one.tokenizer): one for one in read_recorded()}


def recorded(kind: str, setting: str) -> RecordedServer:
    return RECORDED[kind, setting, "spm-v3"]


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert pages.filled("prompts") == (DOCS / pages.page_of("prompts")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "setting", "verdicts"),
    [
        ("vllm", "--tokenizer-mode mistral", {""}),
        pytest.param(
            *("llamacpp", "the template is a name (--mistral-format)", {"ML535", "ML533 ML534"}),
            marks=pytest.mark.slow,
        ),
        ("openai", "transformers serve MERGED", {"", "ML904"}),
    ],
)
def test_a_recording_is_judged_as_on_the_page(kind: str, setting: str, verdicts: set[str]) -> None:
    result = recorded(kind, setting).judged().result
    assert {" ".join(labels) for labels in result.verdicts.values()} == verdicts
    assert result.compares_lengths == (kind == "openai")
    page = (DOCS / pages.page_of("prompts")).read_text(encoding="utf-8")
    section = page.partition("## spm-v3, row by row\n")[2].partition("\n## ")[0]
    head, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    at = next(number for number, title in enumerate(head) if setting in title)
    assert {line[0]: line[at] for line in lines} == {name: tables.verdict(result, name) for name in result.verdicts}


def replayed(one: RecordedServer) -> Behaviour:
    """Return a server that answers with the recorded prompts, in the form of vLLM."""
    asked = [*one.target.asked_rows(), *asked_examples(one.target)]
    known = {_key(chat_request(row.row)): one.prompts[row.name] for row in asked}

    class Recorded(Behaviour):
        def respond(self, path: str, data: Any) -> tuple[int, Any]:
            if path == "/version":
                return 200, {"version": one.version}
            if path != "/v1/chat/completions":
                return super().respond(path, data)
            found = known[_key(data)]
            if found.refused:
                return 400, {"error": {"message": found.refused}}
            usage = {"prompt_tokens": found.count}
            return 200, {"prompt_token_ids": found.ids, "usage": usage, "choices": [{"message": {"content": "x"}}]}

    return Recorded(Oracle(shipped_tokenizer(one.tokenizer)))


def _key(data: dict[str, Any]) -> str:
    return json.dumps([data["messages"], data.get("tools")])


def test_a_server_that_answers_as_it_did_is_recorded_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RECORDED", tmp_path)
    setting = "--tokenizer-mode mistral"
    with serving(replayed(recorded("vllm", setting))) as url:
        words = ["--server", f"vllm={url}", "--tokenizer", "spm-v3", f"--setting={setting}", "--name", "vllm-mistral"]
        assert scoreboards.main(["record", "prompts", *words]) == 0
    [made] = tmp_path.iterdir()
    assert made.read_bytes() == (DOCS / "serving" / "recorded" / made.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["record", "rows", "prompts", "--trainer", "trl"], "to record prompts, add --server"),
        (["record", "prompts", "pairs", "--server", "vllm=http://127.0.0.1:1"], "to record prompts, add --tokenizer"),
        (["record", "rows"], "to record rows, add --trainer"),
        (["write", "promts"], "'promts' is not a board: rows, pairs, layers, real, prepared, prompts, answers"),
    ],
)
def test_a_word_that_is_missing_is_named_before_anything_runs(
    words: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scoreboards.main(words)
    assert ended.value.code == 2
    assert missing in capsys.readouterr().err


def test_the_answers_of_vllm_are_read_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(replayed(recorded("vllm", "--tokenizer-mode mistral"))) as url:
        code, out = main(["serve-check", f"vllm={url}", "--tokenizer", "spm-v3"]), capsys.readouterr().out
    assert code == 0, out
    assert "vLLM 0.32.0, model tiny: proof by ids" in out
    assert "41 of 41 prompts have the ids" in out
    with serving(replayed(recorded("vllm", "--tokenizer-mode hf"))) as url:
        code, out = main(["serve-check", f"vllm={url}", "--tokenizer", "spm-v3"]), capsys.readouterr().out
    assert (code, "ML906" in out, "ML902" in out) == (1, True, False)
    assert re.search(r"33 of 41 prompts .*; named deviations, .*vLLM 0\.32\.0: ", out)


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
    one = RECORDED["vllm", "--tokenizer-mode hf", tokenizer]
    prompt = one.prompts[name]
    assert prompt.ids is not None

    def rules(ids: tuple[int, ...], version: str) -> set[str]:
        changed = replace(one, version=version, prompts={name: replace(prompt, ids=ids)})
        return {finding.rule for finding in changed.judged().findings}

    assert rules(prompt.ids, one.version) == set()
    assert rules(prompt.ids, "0.31.2") == {"ML902"}
    assert rules((*prompt.ids, prompt.ids[-1]), one.version) == {"ML902"}


def test_a_control_literal_is_known_of_the_builds_of_llamacpp_that_were_run_and_of_no_other_prompt() -> None:
    one = recorded("llamacpp", "export --to llamacpp")
    literals = {name: one.prompts[name] for name in ("hostile-user", "hostile-system", "tool-hostile")}

    def rules(**changes: Any) -> set[str]:
        return {finding.rule for finding in replace(one, **{"prompts": literals, **changes}).judged().findings}

    assert rules() == set()
    assert rules(version="b12000-8b3f1c2") == set()
    assert "ML906" in rules(version="b8671-8b3f1c2")
    # a wheel that reports no build
    assert "ML906" in rules(version="")
    # it has a setting that encodes text as text
    assert "ML906" in rules(kind="vllm", version="0.32.0")
    # a marker more than the rendered text has
    hostile = one.prompts["hostile-user"]
    ids = hostile.ids or ()
    changed = replace(hostile, ids=(*ids[:-1], 4, *ids[-1:]))
    assert "ML906" in rules(prompts={**literals, "hostile-user": changed})


@pytest.mark.slow
def test_the_table_has_the_deviations_of_each_recording_and_no_other_of_vllm() -> None:
    seen: dict[str, set[str]] = {}
    for one in read_recorded():
        judged = one.judged()
        for labels in (*judged.result.verdicts.values(), *judged.of_examples.verdicts.values()):
            if names := {label.removeprefix(DEVIATION) for label in labels if label.startswith(DEVIATION)}:
                seen[one.kind] = seen.get(one.kind, set()) | names
                server = SERVERS[one.kind]
                assert all(server.has_deviation("prompts", name, one.version) for name in names), one.setting
    assert seen["vllm"] == SERVERS["vllm"].known_deviations("prompts").keys()


def test_a_row_is_recorded_with_its_own_request() -> None:
    row = Row(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}), None, "here")
    assert _key(chat_request(row)) == '[[{"role": "user", "content": "Hi"}], null]'
