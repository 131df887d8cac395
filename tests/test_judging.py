"""The Python interface: the verdict of `judge` is that of `check`, and `audit` takes rows in any form."""

from __future__ import annotations

import doctest
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from check_verb import check, rows
from datasets import Dataset, DatasetDict, IterableDataset
from page_sections import section

from pytest_mistral_lora import (
    CheckpointTokenizer,
    Verdict,
    audit,
    judge,
    judging,
    read_rows,
    train,
    training_template,
)
from pytest_mistral_lora.errors import FindingsError, InputError, MistralLoraError

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
IDS = [1, 3, 16127, 4, 23325, 2]
SOUND = ROW | {"input_ids": IDS, "labels": [-100] * 4 + [23325, 2]}
EOS_MASKED = ROW | {"input_ids": IDS, "labels": [-100] * 4 + [23325, -100]}
OTHER = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "input_ids": [1, 3, 23325, 4, 16127, 2],
    "labels": [-100] * 4 + [16127, 2],
}
PAGE = section("api.md", "From a notebook")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def faulty() -> Verdict:
    return audit([OTHER, EOS_MASKED], tokenizer="spm-v3")


def test_judge_finds_what_check_finds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(here, "bot")
    code, out = check(capsys, "rows.jsonl", "--tokenizer", "spm-v3", "--json")
    data = json.loads(out)
    verdict = judge("rows.jsonl", tokenizer="spm-v3", examples=1)
    assert (verdict.ok, code) == (False, 1)
    found = [(finding["rule"], finding["place"]) for one in data["checks"] for finding in one["findings"]]
    assert sorted((finding.rule, str(finding.place)) for finding in verdict.findings) == sorted(found)
    [finding] = [finding for finding in verdict.findings if finding.severity == "error"]
    assert (finding.rule, str(finding.place), finding.found) == ("ML601", "rows.jsonl:3, messages[1].role", "'bot'")
    assert finding.next_step == data["causes"][0]["fix"]
    assert verdict.facts["rows.jsonl::dataset::statistics"]["rows"] == 2
    # the text is that of the verb, without the line of the path and the command to run next
    text = check(capsys, "rows.jsonl", "--tokenizer", "spm-v3")[1].partition("\n")[2].partition("\nnext: ")[0]
    assert text.split() == str(verdict).split()
    rows(here, "assistant")
    sound = judge("rows.jsonl", tokenizer="spm-v3", examples=1)
    assert sound.ok
    sound.raise_for_findings()


def of_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": speakers[said["role"]], "value": said["content"]} for said in row["messages"]]}


FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "iterator": iter,
    "dataset": Dataset.from_list,
    "another format": lambda rows: [*map(of_sharegpt, rows)],
    "pairs": lambda rows: [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{**row["messages"][1], "content": "N"}],
        }
        for row in rows
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_memory_are_judged_in_any_form(form: str) -> None:
    said = [[{**message, "content": f"{message['content']} {n}"} for message in ROW["messages"]] for n in range(3)]
    sound = [{"messages": messages} for messages in said]
    assert judge(rows=FORMS[form](sound), tokenizer="spm-v3").ok
    empty = {"messages": [said[1][0], {"role": "assistant", "content": ""}]}
    verdict = judge(rows=FORMS[form]([sound[0], empty, sound[2]]), tokenizer="spm-v3")
    assert {str(finding.place.row) for finding in verdict.findings} == {"rows[1]"}
    assert not verdict.ok


def test_ids_in_memory_are_judged_as_by_audit() -> None:
    rows = [OTHER, EOS_MASKED]
    assert judge(rows=rows, tokenizer="spm-v3").findings == audit(rows, tokenizer="spm-v3").findings


def test_known_deviations_and_the_written_list_are_those_of_check(here: Path) -> None:
    rows(here, "bot")
    assert not judge("rows.jsonl", tokenizer="spm-v3", write_xfails="known.txt").ok
    text = (here / "known.txt").read_text()
    (here / "known.txt").write_text(text.replace("  # \n", "  # a bot is an assistant\n"))
    verdict = judge("rows.jsonl", tokenizer="spm-v3", xfails="known.txt")
    assert (verdict.ok, [finding.severity for finding in verdict.findings if finding.severity == "error"]) == (True, [])
    (here / "known.txt").write_text(f"{(here / 'known.txt').read_text()}ML608  # mended long ago\n")
    assert not judge("rows.jsonl", tokenizer="spm-v3", xfails="known.txt").ok


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge("nope.jsonl"), r"nope\.jsonl: no such file or folder"),
        (lambda: judge("rows.jsonl"), r"and no tokenizer is given"),
        (lambda: judge("rows.jsonl", tokenizer="nope"), r"nope: no such file or folder"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", kind="rowz"), r"kind=: 'rowz' \(did you mean 'rows'\?\)"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", base="."), r"base= is the base of an adapter"),
        (lambda: judge("spm-v3", tokenizer="spm-v3"), r"tokenizer= is for rows and GGUF files"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", xfails="nope.txt"), r"xfails=: nope\.txt cannot be read"),
        (
            lambda: judge("rows.jsonl", tokenizer="spm-v3", write_xfails="rows.jsonl"),
            r"write_xfails=: rows\.jsonl exists",
        ),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", fail_on="error"), r"fail_on=: 'error'; expected note or"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", fail_on=[]), r"fail_on=: a list of 0; expected note or"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", examples=0), r"examples=: 0; expected a whole number"),
        (lambda: judge("rows.jsonl", tokenizer="spm-v3", oracle="spm-v8"), r"spm-v8: no such name"),
        (lambda: judge("rows.jsonl", rows=[ROW], tokenizer="spm-v3"), r"paths and rows in memory together"),
        (lambda: judge(rows=[ROW]), r"rows in memory, and no tokenizer is given"),
        (lambda: judge(rows="rows.jsonl", tokenizer="spm-v3"), r"rows=: 'rows\.jsonl'; expected rows in memory"),
        (lambda: judge(rows=[7], tokenizer="spm-v3"), r"rows\[0\]: a row is a int; expected a mapping"),
        (lambda: audit("nope.jsonl", tokenizer="spm-v3"), r"nope\.jsonl: no such file or folder"),
        (lambda: audit([SOUND], tokenizer="nope"), r"nope: no such file or folder"),
        (lambda: audit([SOUND], tokenizer="spm-v3", dataset="nope.jsonl"), r"nope\.jsonl: no such file or folder"),
        (lambda: audit(7, tokenizer="spm-v3"), r"rows of the type int; expected a datasets\.Dataset"),
        (lambda: audit([SOUND, 7], tokenizer="spm-v3"), r"rows\[1\]: a row is a int"),
        (lambda: audit([ROW | {"input_ids": {1}}], tokenizer="spm-v3"), r"rows\[0\]: .*expected plain data or tensors"),
        (lambda: audit({"labels": [[1]]}, tokenizer="spm-v3"), r"a batch without input_ids"),
        (lambda: audit(Dataset.from_list([]), tokenizer="spm-v3"), r"the dataset has no rows"),
    ],
)
def test_bad_input_is_an_error_of_ours(here: Path, call: Callable[[], object], message: str) -> None:
    rows(here, "assistant")
    with pytest.raises(InputError, match=message):
        call()


LOOP: list[Any] = []
LOOP.append(LOOP)
LOOPED: dict[str, Any] = {}
LOOPED["a"] = LOOPED
NO_PATHS = ("x" * 5000, "a/" * 3000, "a\0b", "\ud800", None, 3, b"rows.jsonl", ["rows.jsonl"], LOOP, object())
TAKES_A_PATH: dict[str, Callable[[Any], object]] = {
    "judge": judge,
    "tokenizer": lambda value: judge("rows.jsonl", tokenizer=[] if value is None else value),
    "base": lambda value: judge("rows.jsonl", tokenizer="spm-v3", base=[] if value is None else value),
    "xfails": lambda value: judge("rows.jsonl", tokenizer="spm-v3", xfails=[] if value is None else value),
    "write_xfails": lambda value: judge("rows.jsonl", tokenizer="spm-v3", write_xfails=[] if value is None else value),
    "audit": lambda value: audit([] if value is None else value, tokenizer="spm-v3").raise_for_findings(),
    "audit dataset": lambda value: audit([SOUND], tokenizer="spm-v3", dataset=[value]),
    "audit tokenizer": lambda value: audit([SOUND], tokenizer=value),
    "read_rows": lambda value: list(read_rows(value)),
    "train": train,
    "CheckpointTokenizer": CheckpointTokenizer,
    "training_template": training_template,
}


@pytest.mark.parametrize("name", TAKES_A_PATH)
def test_a_value_that_is_no_path_is_an_error_of_ours(here: Path, name: str) -> None:
    rows(here, "assistant")
    for value in NO_PATHS:
        with pytest.raises(MistralLoraError):
            TAKES_A_PATH[name](value)


@pytest.mark.parametrize(
    "given",
    [
        [SOUND | {"x": LOOP}],
        [SOUND | {"input_ids": LOOP}],
        [LOOPED],
        [SOUND | {"x": LOOPED}],
        LOOPED,
        {"input_ids": LOOP},
        {"input_ids": [[1]], "x": [LOOPED]},
    ],
)
def test_a_value_that_holds_itself_is_an_error_of_ours(given: Any) -> None:
    with pytest.raises(InputError, match="holds itself"):
        audit(given, tokenizer="spm-v3")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (numpy.array(SOUND, dtype=object), "rows of the type ndarray"),
        (torch.tensor(1), "rows of the type Tensor"),
        ([SOUND | {"input_ids": torch.zeros(3, device="meta")}], "no data"),
        ({"input_ids": torch.zeros(1, 3, device="meta")}, "no data"),
    ],
)
def test_a_tensor_without_rows_or_values_is_an_error_of_ours(given: Any, found: str) -> None:
    with pytest.raises(InputError, match=found):
        audit(given, tokenizer="spm-v3")


def test_nothing_judged_is_not_ok() -> None:
    # mistral-common refuses each row, so that no ids can be compared
    refused = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello"}]}
    verdict = audit([refused | {"input_ids": IDS, "labels": IDS}], tokenizer="spm-v3")
    assert not verdict.ok
    with pytest.raises(FindingsError):
        verdict.raise_for_findings()


def ids_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in ("messages", "input_ids", "labels")}


BATCHES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": lambda rows: rows,
    "generator": iter,
    "dataset": Dataset.from_list,
    "torch dataset": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "streamed dataset": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "batch of lists": ids_of,
    "batch of arrays": lambda rows: ids_of(rows) | {"input_ids": numpy.array([row["input_ids"] for row in rows])},
    "batch of tensors": lambda rows: ids_of(rows) | {"labels": torch.tensor([row["labels"] for row in rows])},
    "list of tensors": lambda rows: ids_of(rows) | {"labels": [torch.tensor(row["labels"]) for row in rows]},
}


@pytest.mark.parametrize("form", BATCHES)
def test_rows_are_audited_in_any_form(form: str) -> None:
    verdict = audit(BATCHES[form]([OTHER, EOS_MASKED]), tokenizer="spm-v3")
    assert [(finding.rule, str(finding.place)) for finding in verdict.findings] == [("ML546", "rows[1]")]
    assert audit(BATCHES[form]([SOUND, OTHER]), tokenizer="spm-v3").ok


def test_the_splits_of_a_dataset_are_named() -> None:
    splits = {"train": Dataset.from_list([OTHER]), "test": Dataset.from_list([OTHER, EOS_MASKED])}
    verdict = audit(DatasetDict(splits), tokenizer="spm-v3")
    assert [(finding.rule, str(finding.place)) for finding in verdict.findings] == [
        ("ML546", "rows['test'][1]"),
        # the row of the other split
        ("ML608", "rows['test'][0]"),
    ]


def test_a_padded_batch_is_audited_by_its_attention_mask() -> None:
    padded = {
        "messages": [ROW["messages"]],
        "input_ids": torch.tensor([[0, 0, *IDS]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100] * 6 + [23325, 2]]),
        "num_items_in_batch": torch.tensor(2),
    }
    assert audit(padded, tokenizer="spm-v3").ok
    trained = padded | {"labels": torch.tensor([[0, -100, *[-100] * 4, 23325, 2]])}
    assert "ML510" in {finding.rule for finding in audit(trained, tokenizer="spm-v3").findings}


def test_rows_with_one_fault_are_one_cause() -> None:
    unread = ROW | {"input_ids": [1.5], "labels": []}
    text = str(audit([EOS_MASKED, EOS_MASKED, unread, unread], tokenizer="spm-v3"))
    assert (text.count("ML546 rows[0]: "), text.count("ML501 rows[2], ")) == (1, 1)
    assert "and 1 more like it: rows[1]" in text
    assert "and 1 more like it: rows[3], input_ids[0]" in text


def test_a_file_is_audited_under_its_own_name(here: Path) -> None:
    (here / "encoded.jsonl").write_text(f"{json.dumps(EOS_MASKED)}\n")
    [finding] = audit("encoded.jsonl", tokenizer="spm-v3").findings
    assert (finding.rule, str(finding.place)) == ("ML546", "encoded.jsonl:1")


def test_rows_without_messages_are_judged_by_the_dataset(here: Path) -> None:
    (here / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n")
    bare = {name: EOS_MASKED[name] for name in ("input_ids", "labels")}
    [finding] = audit([bare], tokenizer="spm-v3", dataset="rows.jsonl").findings
    assert finding.rule == "ML546"


def test_rows_without_messages_are_read_back(here: Path) -> None:
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in (OTHER, EOS_MASKED)]
    [finding] = audit(bare, tokenizer="spm-v3").findings
    assert (finding.rule, str(finding.place)) == ("ML546", "rows[1]")
    assert json.loads(finding.row)["messages"] == ROW["messages"]


def test_a_verdict_raises_with_itself(faulty: Verdict) -> None:
    with pytest.raises(FindingsError, match="ML546") as caught:
        faulty.raise_for_findings()
    assert caught.value.verdict is faulty
    copied = pickle.loads(pickle.dumps(caught.value))
    assert copied.verdict == faulty
    assert str(copied) == str(caught.value)


def test_a_verdict_is_a_page_in_a_frame(faulty: Verdict) -> None:
    html = faulty._repr_html_()
    assert re.fullmatch(r'<iframe srcdoc="[^"]+" sandbox="allow-scripts" title="[^"]+" style="[^"]+"></iframe>', html)
    assert "ML546" in html
    assert re.fullmatch(r"<Verdict not ok: ML546 rows\[\d\]: .*; 1 finding of 1 cause; .*>", repr(faulty))
    assert len(repr(faulty)) <= 200
    assert not faulty


def test_a_verdict_is_written_as_a_report(faulty: Verdict, here: Path) -> None:
    faulty.write("report.json")
    data = json.loads((here / "report.json").read_text())
    assert (data["exit_status"], data["causes"][0]["rule"], data["command"]) == (1, "ML546", "audit(rows)")
    assert faulty.write(here / "report.html") == here / "report.html"
    assert "ML546" in (here / "report.html").read_text()
    assert "ML546" in (here / "report.rows.html").read_text()
    with pytest.raises(InputError, match=r"'report\.txt'; expected a name that ends"):
        faulty.write("report.txt")
    (here / "mine.html").write_text("mine")
    with pytest.raises(InputError):
        faulty.write("mine.html")


def test_nothing_here_imports_pytest(here: Path) -> None:
    (here / "encoded.jsonl").write_text(f"{json.dumps(SOUND)}\n")
    code = """
import sys
import pytest_mistral_lora
assert {name for name in sys.modules if name.startswith("pytest")} == {"pytest_mistral_lora"}, sys.modules.keys()
from pytest_mistral_lora import audit, judge
assert audit("encoded.jsonl", tokenizer="spm-v3").ok
assert judge("encoded.jsonl", tokenizer="spm-v3").ok
print(sorted({name.partition(".")[0] for name in sys.modules} & {"pytest", "_pytest", "torch", "datasets"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_examples_in_the_docstrings_run() -> None:
    outcome = doctest.testmod(judging)
    assert outcome.failed == 0
    assert outcome.attempted >= 12


def test_the_examples_of_the_page_print_what_it_shows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bot = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    (here / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(bot)}\n")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, flags=re.DOTALL)
    assert len(blocks) == 6
    for code, shown in blocks:
        exec(code, names)
        assert capsys.readouterr().out.startswith(shown)
    assert (here / "report.html").is_file()
