from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from sampling import sampled

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.cases import CASES
from pytest_mistral_lora.conformance.targets import EMBEDDED

Run = Callable[..., pytest.RunResult]
CALL: dict[str, Any] = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def said(*texts: str, **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)], **keys}


def called(**changes: Any) -> dict[str, Any]:
    """A row with a tool call, its result and an answer."""
    call = {**CALL, "function": {**CALL["function"], **changes.pop("function", {})}}
    result = {"role": "tool", "content": "12", "tool_call_id": CALL["id"], **changes}
    call_message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {
        "messages": [
            {"role": "user", "content": "Weather?"},
            call_message,
            result,
            {"role": "assistant", "content": "12"},
        ],
        "tools": [TOOL],
    }


HEALTHY = [
    said("Capital of France?", "Paris."),
    said("Say `<|im_start|>`.", "It is `<|im_start|>`, a marker of ChatML."),
    said("How many legs?", "Eight.", "And an ant?", "Six."),
    called(),
    {"messages": [{"role": "system", "content": "Be brief."}, *said("Hi", "Hello.")["messages"]]},
    {"messages": [*said("x", "wrong")["messages"][:1], {"role": "assistant", "content": "no", "weight": 0}]
        + said("And now?", "Right.")["messages"]},
    said("2+2?", "4", id=7, source="own"),
]  # fmt: skip

NONE = {"role": "assistant", "content": "b", "weight": 0}
RED: list[tuple[str, Any, str, str]] = [
    ("a role of nobody", {"messages": [{"role": "bot", "content": "a"}]}, "rows-are-valid", "ML601"),
    ("another format", {"conversations": [{"from": "human", "value": "a"}]}, "rows-are-valid", "ML601"),
    ("half a line", '{"messages": [', "rows-are-valid", "ML601"),
    (
        "no answer is trained on",
        {"messages": [{"role": "user", "content": "a"}, NONE]},
        "something-is-supervised",
        "ML605",
    ),
    ("arguments of another schema", called(function={"arguments": '{"city": 3}'}), "tool-calls-fit-the-tools", "ML622"),
    ("a result of no call", called(tool_call_id="zzzzzzzzz"), "tool-calls-fit-the-tools", "ML621"),
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_rows(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def test_healthy_rows_are_green_and_the_tokenizer_is_their_oracle_alone(
    golden: Run, write: Callable[..., Path]
) -> None:
    # rows with tools ask for a grammar, which v3 does not have
    accepted = write("mistral-golden::rows.jsonl::dataset::decoding-allows-answers  # no grammar", name="xfails.txt")
    options = (
        f"--mistral-dataset={write(*HEALTHY)}",
        "--mistral-tokenizer=spm-v3",
        "--mistral-fail-on=note,not-checked",
        "-v",
    )
    result = golden(*options, f"--mistral-xfails={accepted}")
    cases = [line.split()[0].split("::")[-1] for line in result.outlines if line.startswith("mistral-golden::")]
    result.assert_outcomes(passed=len(cases) - 1, skipped=1)
    # without a recipe there is no split and no length, and a tokenizer file has no template
    left_out = {"split-has-rows", "nothing-is-cut", "no-leakage", "no-near-leakage", "backends-agree"}
    assert set(CASES) - set(cases) == left_out
    result.stdout.fnmatch_lines(["oracle of rows.jsonl: spm-v3 (v3)*", "figures of rows.jsonl: *"])


@pytest.mark.parametrize(("row", "case", "rule"), [one[1:] for one in RED], ids=[one[0] for one in RED])
def test_a_red_row_fails_with_its_line(row: Any, case: str, rule: str, golden: Run, write: Callable[..., Path]) -> None:
    path = write(*HEALTHY, row)
    result = golden(f"--mistral-dataset={path}", "--mistral-tokenizer=spm-v3")
    assert result.ret == 1
    assert result.parseoutcomes()["failed"] == 1
    lines = result.outlines
    assert any(line.startswith(f"{rule} {path}:{len(HEALTHY) + 1}") for line in lines)
    assert any(line.strip("_ ") == f"rows.jsonl::dataset::{case}" for line in lines)
    command = f"--mistral-dataset={path} -k rows.jsonl::dataset::{case}"
    assert any(line.startswith("rerun:  pytest --mistral-golden --mistral-tokenizer=spm-v3 ") for line in lines)
    assert any(line.endswith(command) for line in lines)


@pytest.mark.parametrize("name", sampled(EMBEDDED, ("spm-v1", "spm-v7m1")))
def test_every_shipped_tokenizer_can_be_named(name: str, golden: Run, write: Callable[..., Path]) -> None:
    rows = HEALTHY[:3]
    result = golden(f"--mistral-dataset={write(*rows)}", f"--mistral-tokenizer={name}")
    assert result.ret == 0
    assert f"oracle of rows.jsonl: {name} (" in result.stdout.str()


def test_a_folder_with_a_template_is_compared_with_it_on_every_row(
    golden: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = tmp_path / "my-model", write(*HEALTHY[:3])
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    options = (f"--mistral-dataset={path}", f"--mistral-tokenizer={folder}", "--mistral-fail-on=note,not-checked")
    result = golden(*options)
    result.assert_outcomes(passed=13)
    result.stdout.fnmatch_lines(["oracle of rows.jsonl: my-model (v3)*spm-v3: 32,768 of 32,768 ids*"])
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'[INST] '", "'[INST]'"))
    result = golden(*options)
    assert result.parseoutcomes() == {"failed": 1, "passed": 12}
    assert any(line.startswith(f"ML603 {path}:") for line in result.outlines)
    # a layout of its own is what the rows are trained with
    result = golden(*options, "--mistral-oracle=none")
    result.assert_outcomes(passed=10)
    result.stdout.fnmatch_lines(["oracle of rows.jsonl: none, *template of my-model*"])


def test_two_tokenizers_judge_the_rows_each(golden: Run, write: Callable[..., Path]) -> None:
    file = shipped_tokenizer("spm-v7")
    result = golden(
        f"--mistral-dataset={write(*HEALTHY)}",
        "--mistral-tokenizer=spm-v3",
        f"--mistral-tokenizer={file}",
        "--co",
        "-q",
    )
    targets = {line.split("::")[1] for line in result.outlines if line.startswith("mistral-golden::")}
    assert targets == {"rows.jsonl-spm-v3", f"rows.jsonl-{file.name}"}


def test_k_and_the_report_work(write: Callable[..., Path], pytester: pytest.Pytester) -> None:
    path = write(*HEALTHY, RED[0][1])
    pytester.makeini(f"[pytest]\nmistral_datasets = {path}\nmistral_tokenizers = spm-v3")
    report = pytester.path / "report.json"
    result = pytester.runpytest_inprocess("--mistral-golden", f"--mistral-report={report}", "--junitxml=j.xml")
    assert result.ret == 1
    data = json.loads(report.read_text())
    assert (data["counts"]["passed"], data["counts"]["failed"]) == (10, 1)
    [cause] = data["causes"]
    assert (cause["rule"], cause["place"]) == ("ML601", f"{path}:{len(HEALTHY) + 1}, messages[0].role")
    assert "ML601" in (pytester.path / "j.xml").read_text()
    chosen = pytester.runpytest_inprocess("--mistral-golden", "-k", "statistics")
    chosen.assert_outcomes(passed=1, deselected=11)


def test_places_are_those_of_check_wherever_a_test_before_has_gone(
    golden: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pytester.path / "rows.jsonl"
    path.write_text(json.dumps(RED[0][1]) + "\n")
    pytester.makepyfile(test_away="import os\n\ndef test_it_goes_away(): os.chdir('/')")
    options = (f"--mistral-dataset={path}", "--mistral-tokenizer=spm-v3", "--mistral-report=golden.json")
    assert golden("test_away.py", *options).ret == 1
    monkeypatch.chdir(pytester.path)
    assert main(["check", str(path), "--tokenizer=spm-v3", "--report=check.json"]) == 1
    causes = [json.loads(Path(name).read_text())["causes"] for name in ("golden.json", "check.json")]
    assert [[(one["rule"], one["place"]) for one in of_report] for of_report in causes] == [
        [("ML601", "rows.jsonl:1, messages[0].role")]
    ] * 2


def test_rows_need_a_tokenizer_that_is_there(golden: Run, write: Callable[..., Path]) -> None:
    path = write(*HEALTHY)
    for options, expected in (
        (
            [],
            "add --mistral-tokenizer PATH (a shipped one: ",
        ),
        (
            ["--mistral-tokenizer=spm-v9"],
            "spm-v9 (did you mean 'spm-v7'?)",
        ),
    ):
        result = golden(f"--mistral-dataset={path}", *options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert expected in result.stderr.str()
    missing = golden(f"--mistral-dataset={path}x", "--mistral-tokenizer=spm-v3")
    assert missing.ret == pytest.ExitCode.USAGE_ERROR


def test_a_shipped_tokenizer_is_a_target_of_its_own_and_the_fixture_takes_it(
    golden: Run, pytester: pytest.Pytester
) -> None:
    collected = golden("--mistral-tokenizer=tekken-240911", "--co", "-q")
    targets = {line.split("::")[1] for line in collected.outlines if line.startswith("mistral-golden::")}
    assert targets == {"tekken-240911"}
    pytester.makeini("[pytest]\nmistral_tokenizers = spm-v2")
    pytester.makepyfile("def test_it(mistral_oracle):\n    assert mistral_oracle.version == 'v2'")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_rows_are_judged_without_torch_and_transformers(write: Callable[..., Path]) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--mistral-golden", f"--mistral-dataset={write(*HEALTHY)}"]
    code = (
        f"import sys, pytest\nended = pytest.main([*{options}, '--mistral-tokenizer', 'spm-v3'])\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'pyarrow') if name in sys.modules])\n"
        "sys.exit(ended)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "[]"), ran.stdout


def test_rows_of_another_format_are_converted_in_memory(golden: Run, write: Callable[..., Path]) -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    bad = {"conversations": [{"from": "human", "value": "a"}, {"from": "ghost", "value": "b"}]}
    path = write(good, name="share.jsonl")
    result = golden(f"--mistral-dataset={path}", "--mistral-tokenizer=spm-v3", "--mistral-fail-on=note,not-checked")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["rows of share.jsonl: converted from JSON Lines, ShareGPT (*"])
    write(good, bad, name="share.jsonl")
    result = golden(f"--mistral-dataset={path}", "--mistral-tokenizer=spm-v3")
    assert result.ret == 1
    assert any(line.startswith(f"ML601 {path}:2, conversations[1].from: 'ghost'") for line in result.outlines)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file has no rows"),
        (b"PK\x03\x04", "this is a zip archive"),
        (b"a,b\n1,2\n", "no known format: keys a, b"),
    ],
)
def test_a_file_that_has_no_rows_fails_one_check(content: bytes, found: str, golden: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    result = golden(f"--mistral-dataset={path}", "--mistral-tokenizer=spm-v3")
    assert result.parseoutcomes() == {"failed": 1, "skipped": 11}
    assert any(line.startswith(f"ML602 {path}") and found in line for line in result.outlines)
