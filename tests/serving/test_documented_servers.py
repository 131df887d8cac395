"""Servers that have no build here, by the answers that their source documents; a script of the user's own, really run.

The forms are those of SGLang 0.5 (entrypoints/openai/protocol.py), Text Generation Inference (router/src/lib.rs,
db931fc) and Ollama (api/types.go, fb30760).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from golden_answers import golden_answers, write_golden_answers
from local_server import Behaviour, Ids, serving

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.serving.client import KEY
from pytest_mistral_lora.serving.servers import SERVERS

NEVER_RUN = ("sglang", "ollama")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@dataclass
class Documented(Behaviour):
    """A server of one of the two kinds.

    Attributes:
        text: Renders messages as Ollama previews them; None for an Ollama before 0.11.5, which answers instead.
    """

    text: Callable[[list[dict[str, Any]]], str] | None = None

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the documented answer of an endpoint that is not OpenAI's, or a chat with SGLang's ids."""
        given = {
            "/server_info": {"version": "0.5.23", "api_key": "in-the-arguments"},
            "/api/version": {"version": "0.40.0"},
            "/api/tags": {"models": [{"name": "tuned:latest", "model": "tuned:latest"}]},
        }.get(path)
        if given is not None:
            return 200, given
        if path == "/api/chat":
            return self._native_chat(data)
        status, answer = super().respond(path, data)
        if status != 200 or path != "/v1/chat/completions":
            # SGLang has the text of an error at the top
            return status, answer if status == 200 else {"object": "error", "message": answer["error"]["message"]}
        ids = self.prompt(self.ids(data), data)
        if data.get("return_prompt_token_ids"):
            answer["choices"][0]["prompt_token_ids"] = list(ids)
        return 200, answer

    def _native_chat(self, data: dict[str, Any]) -> tuple[int, Any]:
        for message in data["messages"]:
            assert isinstance(message["content"], str)
            assert all(isinstance(call["function"]["arguments"], dict) for call in message.get("tool_calls", ()))
        assert data["stream"] is False
        if data.get("_debug_render_only") and self.text is not None:
            debug = {"rendered_template": self.text(data["messages"]), "image_count": 0}
            # server/routes.go: neither done nor a count
            return 200, {"model": data["model"], "message": {"role": "", "content": ""}, "_debug_info": debug}
        try:
            ids = self.prompt(self.ids(data), data)
        except OracleRejection as error:
            return 400, {"error": error.found}
        options = data["options"]
        choice = self.chat_answer(ids, {**data, "n_predict": options["num_predict"], **options})["choices"][0]
        message = choice["message"]
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        shown = {"message": {"role": "assistant", **message}, "done_reason": choice["finish_reason"]}
        return 200, {"model": data["model"], "done": True, "prompt_eval_count": len(ids), "eval_count": 1, **shown}


def run_check(name: str, url: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["serve-check", f"{name}={url}", "--tokenizer", "spm-v3", *options])
    return code, "".join(capsys.readouterr())


def a_bos_more(ids: Ids, data: dict[str, Any]) -> Ids:
    return (1, *ids)


@pytest.mark.parametrize(
    ("kind", "facts", "rule"),
    [
        ("sglang", "SGLang 0.5.23, model tiny: proof by ids", "ML902"),
        ("ollama", "Ollama 0.40.0, model tuned: proof by count", "ML904"),
    ],
)
def test_a_documented_server_is_green_with_the_ids_of_mistral_common_and_red_with_others(
    kind: str, facts: str, rule: str, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Documented(oracle)
    with serving(sound) as url:
        code, out = run_check(kind, url, capsys)
    assert ("does not show the ids" in out) is (kind == "ollama")
    assert (code, facts in out, "; never run: " in out) == (0, True, True), out
    assert "in-the-arguments" not in out
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    with serving(Documented(oracle, prompt=a_bos_more)) as url:
        code, out = run_check(kind, url, capsys, "--rows", str(rows))
    assert (code, f"{rule} " in out) == (1, True), out


@pytest.mark.parametrize("kind", NEVER_RUN)
def test_a_documented_server_answers_messages_as_recorded_with_its_own_settings_spelled_out(
    kind: str, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = write_golden_answers(oracle, tmp_path / "answers")
    row = tmp_path / "one.jsonl"
    row.write_text(json.dumps(golden_answers(oracle)[0].row.to_json()) + "\n")
    asked = ("--golden", str(golden), "--rows", str(row))

    def penalised(ids: Ids, data: dict[str, Any]) -> Ids:
        spelled = SERVERS[kind].greedy.keys() - {"temperature"}
        return ids if spelled <= data.keys() else (*oracle.encode_text("Rome"), *ids[1:])

    with serving(Documented(oracle, golden=golden_answers(oracle), scale=None, shows_ids=False)) as url:
        code, out = run_check(kind, url, capsys, *asked)
    assert (code, "3 exact of 3" in out, "is not asked by ids" in out) == (0, True, True), out
    given = {"golden": golden_answers(oracle), "scale": None, "shows_ids": False, "completion": penalised}
    with serving(Documented(oracle, **given)) as url:
        code, out = run_check(kind, url, capsys, *asked)
    assert (code, "3 exact of 3" in out, "ML911" in out) == (1, True, True), out


def rendered(messages: list[dict[str, Any]], space: str = " ") -> str:
    """Return messages as version 3 has them, without BOS."""
    turns = {"user": "[INST]{space}{}[/INST]", "assistant": "{space}{}</s>"}
    return "".join(turns[one["role"]].format(one["content"], space=space) for one in messages)


TALK = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yo"}]}
    for text in ("Hi", "東京 🙂")
]
TALK.append({"messages": [*TALK[0]["messages"], {"role": "user", "content": "a  b"}, TALK[0]["messages"][1]]})


@pytest.mark.parametrize(
    ("text", "prompt", "rule", "says"),
    [
        (rendered, None, "", "3 of 3 prompts have the ids"),
        # a template that Ollama takes for that of version 1
        (lambda given: rendered(given).replace("[INST] ", "[INST]  "), None, "ML902 ML903", "ML528"),
        # llama.cpp puts a BOS before the text in any case
        (lambda given: f"<s>{rendered(given)}", a_bos_more, "ML902", "BOS is there 2 times"),
        (lambda given: "[INST] Hi[/INST]", None, "ML902 ML903", "ML53"),
        # a preview that lies
        (rendered, a_bos_more, "ML903", "the preview has"),
    ],
)
def test_the_text_that_ollama_previews_is_held_to_mistral_common(
    text: Any, prompt: Any, rule: str, says: str, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TALK))
    with serving(Documented(oracle, text=text, **({"prompt": prompt} if prompt else {}))) as url:
        code, out = run_check("ollama", url, capsys, "--rows", str(rows))
    fired = {line[:5] for line in out.splitlines() if line.startswith("ML9")}
    assert (code, fired) == (bool(rule), set(rule.split())), out
    assert "Ollama 0.40.0, model tuned: proof by preview of the text" in out
    assert says in out


def test_a_server_that_is_not_ollama_is_no_ollama(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(oracle, answer=lambda path: (404, b"{}"))) as url:
        code, out = run_check("ollama", url, capsys)
    assert (code, "the models that Ollama has" in out) == (1, True)


def test_help_names_each_kind_and_the_page_marks_those_that_never_ran_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve-check", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"its kind if you name it ({', '.join(SERVERS.ours)})" in text
    assert "docs/serving.md has the servers and versions that were run" in text
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    for kind in SERVERS:
        assert ("never run: " in lines[kind]) is (kind in NEVER_RUN)
        assert SERVERS[kind].was_run is (kind not in NEVER_RUN)


def test_the_page_names_the_endpoints_by_which_servers_are_recognised_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    sentence = page.partition("Without a name it is the kind whose version is\nat its own endpoint: ")[2].partition(
        ";"
    )[0]
    assert set(re.findall(r"`(/.*?)`", sentence)) == {kind.version_at[0] for kind in SERVERS.values()} - {""}


SCRIPT = """\
import argparse, json, os, sys
from pathlib import Path
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.plugin.options import SERVER

parser = argparse.ArgumentParser()
for name in ("rows", "url", "model", "output"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
oracle = Oracle(shipped_tokenizer("spm-v3"))
with open(given.output, "w") as output:
    print(json.dumps({"environment": {"my-server": "1.0"}}), file=output)
    for number, line in enumerate(Path(given.rows).read_text().splitlines()):
        row = json.loads(line)
        row["messages"].append({"role": "assistant", "content": "x"})
        try:
            record = RECORD
        except OracleRejection as error:
            record = {"refused": error.found}
        if record is not None:
            print(json.dumps({"row": number, **record}), file=output)
"""
IDS = '{"input_ids": [*oracle.encode_prompt(row)]}'
FEWER = """\
import json, os, sys
from pathlib import Path

record = RECORD
if record is not None:
    record = json.dumps({"row": 0, **record}) + "\\n"
Path(sys.argv[-1]).write_text(record or "")
"""
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'


@pytest.fixture
def url(oracle: Oracle) -> str:
    return "http://127.0.0.1:9"


def write_script(folder: Path, record: str, script: str = FEWER) -> str:
    file = folder / "my_server.py"
    file.write_text(script.replace("RECORD", record))
    return str(file)


def test_a_script_of_the_user_s_own_is_asked(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_check(write_script(tmp_path, IDS, SCRIPT), url, capsys)
    assert (code, "my_server.py my-server 1.0, " in out, "proof by ids" in out) == (0, True, True), out


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ('{"input_ids": [1, 1, 3, 16127, 4]}', "BOS is there 2 times"),
        ('{"input_ids": ["<s>"]}', "whole numbers"),
        ('{"error": "no such model"}', "no such model"),
        ("None", "the script made nothing of it"),
        (
            "sys.exit(f'my key is {os.environ[chr(77) + \"ISTRAL_SERVER_KEY\"]}')",
            "ends with exit code 1: my key is ***",
        ),
        ('{"row": 999}', 'an object with "row" from 0 to'),
    ],
)
def test_a_script_that_fails_is_a_finding(
    record: str,
    found: str,
    tmp_path: Path,
    url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY, "s3cr3t-key")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    code, out = run_check(write_script(tmp_path, record), url, capsys, "--rows", str(rows))
    assert (code, found in out, "s3cr3t" in out) == (1, True, False), out
    # the server may well be there
    assert "Mend your script" in out or "exit code" not in out, out


def test_a_script_that_is_not_there_is_bad_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_check("./none.py", url, capsys)
    assert (code, "./none.py: no such file" in out) == (2, True), out


def test_a_script_that_hangs_is_ended(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.conformance.server.script.SECONDS", 0.5)
    code, out = run_check(write_script(tmp_path, "__import__('time').sleep(60)"), url, capsys)
    assert (code, "not done after 0.5 seconds" in out) == (1, True), out
