"""`--mistral-runner`, with a runner of the user's own: a script of the documented interface."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from converted import converted_tokenizer
from cut_sentencepiece import cut_v3
from faulty_templates import CHATML

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.oracle.versions import version_facts
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.goldens import packaged_cases

Run = Callable[..., pytest.RunResult]

RUNNER = """\
import argparse, functools, json, sys
from pathlib import Path
from pytest_mistral_lora.chat.oracle import Oracle

parser = argparse.ArgumentParser()
for name in ("rows", "checkpoint", "config", "output"):
    parser.add_argument(f"--{name}", type=Path)
given = parser.parse_args()
with open("calls", "a") as calls:
    calls.write("x")
fault = given.config.read_text().split()
if fault == ["crash"]:
    sys.exit("no such template")
oracle = Oracle(next(given.checkpoint.glob("*.model.v*")))


@functools.cache
def loaded():
    # as transformers has them, which takes seconds to import
    from jinja2 import Environment
    from tokenizers import Tokenizer
    template = Environment().from_string((given.checkpoint / "chat_template.jinja").read_text())
    return Tokenizer.from_file(str(given.checkpoint / "tokenizer.json")), template


def ids_by_template(messages, **keys):
    tokenizer, template = loaded()
    return tokenizer.encode(template.render(messages=messages, **keys), add_special_tokens=False).ids


def by_template(row, trained):
    try:
        ids = ids_by_template(row["messages"])
    except Exception as error:
        return {"error": str(error)}
    asked = len(ids_by_template(row["messages"][:-1], add_generation_prompt=True))
    return {"input_ids": ids, "labels": ids if trained else [-100] * asked + ids[asked:]}


with given.output.open("w") as output:
    print(json.dumps({"environment": {"mine": "1.0"}}), file=output)
    for number, line in enumerate(given.rows.read_text().splitlines()):
        row = json.loads(line)
        encoded = oracle.encode(row)
        ids, labels = list(encoded.input_ids), list(encoded.labels)
        if fault == ["eos"]:
            labels = [-100 if label == 2 else label for label in labels]
        record = {"row": number, "input_ids": ids, "labels": labels}
        if fault[:1] == ["template"]:
            record = {"row": number, **by_template(row, trained=fault[1:])}
        if fault != ["drop"] or number != 3:
            print(json.dumps(record), file=output)
"""
CASES = [case.name for case in packaged_cases() if version_facts("v3") in case.versions]
CHECKS = len(packaged_cases()) + 2


@pytest.fixture(scope="session", autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # made before the first run: what a run in this process imports is forgotten, and torch cannot be imported twice
    return write_tiny_base(tmp_path_factory.mktemp("runner-base") / "base", cut_v3())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runner") / "my-mistral"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model.v3")
    return folder


@pytest.fixture
def judged(golden: Run, checkpoint: Path, pytester: pytest.Pytester) -> Run:
    (pytester.path / "mine.py").write_text(RUNNER)

    def judge(fault: str, *args: str) -> pytest.RunResult:
        (pytester.path / "mine.yaml").write_text(fault)
        return golden(
            f"--mistral-tokenizer={checkpoint}", "--mistral-runner=mine.py=mine.yaml", "-k", "runner", "-v", *args
        )

    return judge


def _outcomes(result: pytest.RunResult) -> dict[str, int]:
    outcomes = result.parseoutcomes()
    outcomes.pop("deselected")
    return outcomes


def _ids(result: pytest.RunResult, word: str) -> set[str]:
    parts = (line.split() for line in result.outlines if line.startswith("mistral-golden::mine-my-mistral::runner::"))
    return {words[0].rpartition("::")[2] for words in parts if words[1:2] == [word]}


def test_a_sound_runner_passes_every_packaged_row_that_the_version_encodes(
    judged: Run, pytester: pytest.Pytester
) -> None:
    result = judged("sound")
    assert _outcomes(result) == {"passed": len(CASES) + 2, "skipped": CHECKS - len(CASES) - 2}
    assert _ids(result, "PASSED") == {"extraction", "all-rows", *CASES}
    result.stdout.fnmatch_lines(["mine-my-mistral ran under mine 1.0; configuration mine.yaml"])
    assert (pytester.path / "calls").read_text() == "x"


def test_a_fault_is_named_for_each_row_that_has_it(judged: Run) -> None:
    result = judged("eos", "--mistral-allow-code")
    assert _ids(result, "FAILED") == {*CASES}
    result.stdout.fnmatch_lines(["ML546 */cases.json, empty-user: *", "  > *</s>*", "and 40 more like it: *"])
    # the command that repeats a check allows the same code
    result.stdout.fnmatch_lines(["rerun:  pytest * --mistral-runner=mine.py=mine.yaml --mistral-allow-code -k *"])


def test_a_row_that_is_dropped_fails_alone(judged: Run) -> None:
    result = judged("drop")
    assert _ids(result, "FAILED") == {CASES[3], "all-rows"}
    result.stdout.fnmatch_lines([f"ML502 */cases.json, {CASES[3]}: row 3 was dropped*"])


def test_known_deviations_of_a_runner_do_not_fail(judged: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "known.txt").write_text(
        "ML502  # we know of it\nmistral-golden::mine-my-mistral::runner::all-rows  # follows from it\n"
    )
    result = judged("drop", "--mistral-xfails=known.txt")
    assert result.ret == 0
    assert _outcomes(result)["xfailed"] == 2


def test_a_runner_without_rows_fails_once_and_the_rest_is_not_checked(judged: Run, pytester: pytest.Pytester) -> None:
    result = judged("crash")
    assert _outcomes(result) == {"failed": 1, "skipped": CHECKS - 1}
    assert _ids(result, "FAILED") == {"extraction"}
    text = result.stdout.str()
    assert "mine.py ends with exit code 1: no such template" in text
    assert "the runner gave no rows" in text
    assert "Traceback" not in text
    assert (pytester.path / "calls").read_text() == "x"


@pytest.mark.slow
def test_workers_share_one_run_of_the_runner(judged: Run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = judged("crash", "-n", "2")
    assert result.parseoutcomes()["failed"] == 1
    assert (pytester.path / "calls").read_text() == "x"


def test_with_a_recipe_the_runner_gets_the_recipe_s_rows(golden: Run, pytester: pytest.Pytester, base: Path) -> None:
    here = pytester.path
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(30)]
    (here / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe = {
        "base": {"path": str(base), "weights_sha256": BaseFolder(base).weights_sha256},
        "data": {"train": ["rows.jsonl"]},
        "training": {"steps": 1, "learning_rate": 1e-3, "batch_size": 1, "micro_batch_tokens": 64},
        "output": "out",
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (here / "mine.py").write_text(RUNNER)
    (here / "mine.yaml").write_text("eos")
    options = ("--mistral-recipe=recipe.yaml", "--mistral-runner=mine.py=mine.yaml", "-k", "runner", "-v")
    result = golden(*options)
    failed = {line.split()[0] for line in result.outlines if " FAILED" in line}
    assert failed == {"mistral-golden::mine-recipe.yaml::runner::labels"}
    # the names break into lines by the length of the temporary folder's path
    result.stdout.fnmatch_lines(["ML546 *rows.jsonl:1: *", "and 29 more like it:*"])
    assert "10 that are only counted" in " ".join(result.stdout.str().split())


def test_with_a_dataset_the_runner_gets_its_rows(judged: Run, pytester: pytest.Pytester) -> None:
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(5)]
    (pytester.path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    result = judged("eos", "--mistral-dataset=rows.jsonl")
    names = {line.split()[0] for line in result.outlines if " FAILED" in line}
    assert names == {"mistral-golden::mine-rows.jsonl::runner::labels"}
    result.stdout.fnmatch_lines(
        ["ML546 rows.jsonl:1: the EOS of turn 1 is masked", "and 4 more like it: rows.jsonl:2-5"]
    )
    # code that this run was not allowed, its rerun is not allowed either
    result.stdout.no_fnmatch_line("rerun:*--mistral-allow-code*")


@pytest.mark.parametrize(
    ("fault", "others"), [pytest.param("template", [], marks=pytest.mark.slow), ("template prompts", ["ML543"])]
)
def test_a_chat_template_is_the_one_cause_on_both_roads(
    fault: str, others: list[str], golden: Run, checkpoint: Path, pytester: pytest.Pytester, capsys: Any
) -> None:
    folder = shutil.copytree(checkpoint, pytester.path / "chatml")
    (folder / "chat_template.jinja").write_text(CHATML)
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(5)]
    (pytester.path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (pytester.path / "mine.py").write_text(RUNNER)
    (pytester.path / "mine.yaml").write_text(fault)
    words = ["--runner", "mine.py", "--config", "mine.yaml", "--tokenizer", "chatml", "--dataset", "rows.jsonl"]
    assert main(["check", *words, "--output-format=jsonl"]) == 1
    *audited, summary = map(json.loads, capsys.readouterr().out.splitlines())
    options = ("--mistral-dataset=rows.jsonl", "--mistral-tokenizer=chatml", "--mistral-runner=mine.py=mine.yaml")
    assert golden(*options, "--mistral-report=report.json", "-k", "runner").ret == 1
    checks = json.loads((pytester.path / "report.json").read_text())["checks"]
    found = [finding for check in checks for finding in check["findings"]]
    assert [finding["rule"] for finding in found if finding["rule"] != "ML543"] == ["ML004"]
    assert {finding["rule"] for finding in found} == {"ML004", *others}
    keys = ("rule", "place", "found", "expected", "covers", "fix")
    assert {json.dumps([one[key] for key in keys]) for one in found} == {
        json.dumps([one[key] for key in keys]) for one in audited
    }
    skipped = {check["case"]: check["not_checked"] for check in checks if check["not_checked"]}
    assert skipped == summary["summary"]["not_checked"]


def test_a_packaged_row_of_another_chat_template_is_not_passed(
    golden: Run, checkpoint: Path, pytester: pytest.Pytester
) -> None:
    folder = shutil.copytree(checkpoint, pytester.path / "chatml")
    (folder / "chat_template.jinja").write_text(CHATML)
    (pytester.path / "mine.py").write_text(RUNNER)
    (pytester.path / "mine.yaml").write_text("template")
    options = ("--mistral-tokenizer=chatml", "--mistral-runner=mine.py=mine.yaml", "-k", "runner")
    golden(*options, "--mistral-report=report.json")
    checks = json.loads((pytester.path / "report.json").read_text())["checks"]
    by_case = {check["case"]: check for check in checks}
    assert "ML004" in {finding["rule"] for finding in by_case["all-rows"]["findings"]}
    assert by_case["empty-user"]["not_checked"].endswith("see ML004")


def test_rows_that_a_runner_cannot_be_given_fail_once(judged: Run, pytester: pytest.Pytester) -> None:
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pair = {"prompt": [{"role": "user", "content": "Hi"}], **answers}
    (pytester.path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    result = judged("sound", "--mistral-dataset=pairs.jsonl")
    assert _outcomes(result)["failed"] == 1
    assert not (pytester.path / "calls").exists()
    text = result.stdout.str()
    assert "Traceback" not in text
    assert "the runner gave no rows" in text


@pytest.mark.of_field
def test_a_configuration_that_names_code_is_refused_unless_it_is_allowed(
    golden: Run, checkpoint: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(pytester.path / "cache"))
    (pytester.path / "theirs.yaml").write_text("model_type: mistral\nexternal_plugins: [evil.py]\n")
    words = (f"--mistral-tokenizer={checkpoint}", "--mistral-runner=ms-swift=theirs.yaml", "-k", "extraction")
    refused = golden(*words)
    assert refused.ret == 1
    refused.stdout.fnmatch_lines(["*theirs.yaml:2, external_plugins: *external_plugins: *evil.py* names code*"])
    allowed = golden(*words, "--mistral-allow-code")
    assert allowed.ret == 1
    # the run goes on to the trainer, which is not there
    allowed.stdout.fnmatch_lines(["*ms-swift is not installed*"])
    allowed.stdout.no_fnmatch_line("*names code*")
