"""Rows that a trainer has prepared, as it saves them: folders of `datasets`, Parquet, and other containers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pytest
from encoded_files import Data, audit_findings, audit_rules, number_line, number_row, write_lines

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.formats.sources import row_files


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Target("spm-v3").oracle


@pytest.fixture
def lines(oracle: Oracle) -> list[Data]:
    lines = [number_line(oracle, number) for number in range(5)]
    for line in lines:
        del line["row"]
    return lines


def table(lines: Sequence[Data]) -> datasets.Dataset:
    keys = dict.fromkeys(key for line in lines for key in line)
    return datasets.Dataset.from_list([{key: line.get(key) for key in keys} for line in lines])


def saved(lines: Sequence[Data], path: Path) -> None:
    table(lines).save_to_disk(path, num_shards=min(2, len(lines)))


def splits(lines: Sequence[Data], path: Path) -> None:
    datasets.DatasetDict({"train": table(lines[:3]), "test": table(lines[3:])}).save_to_disk(path)


def parquet(lines: Sequence[Data], path: Path) -> None:
    table(lines).to_parquet(path)


def parquet_splits(lines: Sequence[Data], path: Path) -> None:
    path.mkdir()
    for name, part in (("train", lines[:3]), ("test", lines[3:])):
        parquet(part, path / f"{name}-00000-of-00001.parquet")


def array(lines: Sequence[Data], path: Path) -> None:
    path.write_text(json.dumps(lines))


def pretty(lines: Sequence[Data], path: Path) -> None:
    path.write_text("\n".join(json.dumps(line, indent=1) for line in lines))


def compressed(lines: Sequence[Data], path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def utf16(lines: Sequence[Data], path: Path) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-16")


Save = Callable[[Sequence[Data], Path], None]
FORMS: dict[str, tuple[Save, str, str]] = {
    "saved": (saved, "prepared", "data-00000-of-00002.arrow:1"),
    "splits": (splits, "prepared", "train/data-00000-of-00001.arrow:1"),
    "parquet": (parquet, "rows.parquet", ":1"),
    "parquet splits": (parquet_splits, "prepared", "test-00000-of-00001.parquet:1"),
    "a JSON array": (array, "rows.json", " record 1, line 1"),
    "objects over several lines": (pretty, "rows.json", " record 1, line 1"),
    "gzip": (compressed, "rows.jsonl.gz", ":1"),
    "UTF-16": (utf16, "rows.jsonl", ":1"),
}


def all_trained(lines: Sequence[Data]) -> list[Data]:
    return [{**line, "labels": line["input_ids"]} for line in lines]


def as_mask(lines: Sequence[Data], key: str = "assistant_masks", **more: Any) -> list[Data]:
    masks = [[int(label != -100) for label in line["labels"]] for line in lines]
    rows = [{name: value for name, value in line.items() if name != "labels"} for line in lines]
    return [{**row, key: mask, **more} for row, mask in zip(rows, masks, strict=True)]


def without(lines: Sequence[Data], *keys: str) -> list[Data]:
    return [{key: value for key, value in line.items() if key not in keys} for line in lines]


def check(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["check", str(path), "--tokenizer", "spm-v3", "-v", *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_judged_in_each_form_and_sound_rows_are_counted(
    form: str, lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, name, first = FORMS[form]
    for folder in ("sound", "bad"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "sound" / name
    save(lines, path)
    assert recognised(path).kind == "encoded"
    code, out = check(path, capsys)
    assert code == 0, out
    assert f"encoded rows of {name}: 5 rows, 5 judged" in out
    path = tmp_path / "bad" / name
    save(all_trained(lines), path)
    code, out = check(path, capsys)
    assert code == 1
    assert f"ML543 {path / first if path.is_dir() else f'{path}{first}'}" in out
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 1
    assert "5 rows: 0 sound, 5 wrong, 0 not judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "form", ["saved", pytest.param("parquet", marks=pytest.mark.slow), pytest.param("gzip", marks=pytest.mark.slow)]
)
def test_pytest_judges_the_labels_or_names_the_option_that_does(
    form: str, lines: list[Data], pytester: pytest.Pytester
) -> None:
    save, name, _ = FORMS[form]
    path = pytester.path / name
    save(all_trained(lines), path)
    words = ("--mistral-golden", "--mistral-tokenizer=spm-v3", "-k", "encoded or dataset")
    result = pytester.runpytest_inprocess(*words, f"--mistral-encoded={path}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*ML543*"])
    result = pytester.runpytest_inprocess(*words, f"--mistral-dataset={path}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*ML634*rows has `input_ids`*", f"*: mistral-lora check {name}* --tokenizer PATH"])


@pytest.mark.parametrize("key", ["assistant_masks", "assistant_tokens_mask", "completion_mask"])
def test_labels_are_made_of_a_mask_as_trl_makes_them(
    key: str, lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = as_mask(lines, key, seq_lengths=None)
    saved(masked, tmp_path / "sound")
    code, out = check(tmp_path / "sound", capsys)
    assert code == 0, out
    assert re.search(r"5 rows, 5 judged; .*labels of 5 .*a mask", out)
    assert main(["check", str(tmp_path / "sound"), "--tokenizer", "spm-v3"]) == 0
    assert "labels made of a mask: 5 rows" in capsys.readouterr().out
    masked[3][key] = [1] * len(masked[3][key])
    masked[4][key] = [0] * len(masked[4][key])
    saved(masked, tmp_path / "bad")
    code, out = check(tmp_path / "bad", capsys)
    assert code == 1
    assert {"ML543", "ML544"} <= set(out.split())


def test_two_masks_leave_out_what_either_leaves_out(lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    masked = as_mask(lines)
    saved([{**line, "completion_mask": [1] * len(line["input_ids"])} for line in masked], tmp_path / "a")
    assert audit_rules(tmp_path / "a", oracle) == []
    saved([{**line, "completion_mask": [0] * len(line["input_ids"])} for line in masked], tmp_path / "b")
    assert set(audit_rules(tmp_path / "b", oracle)) == {"ML544", "ML506"}


def test_a_mask_that_contradicts_the_labels_is_a_finding(lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    lines[1]["assistant_masks"] = [0] * len(lines[1]["input_ids"])
    lines[2]["assistant_masks"] = [int(label != -100) for label in lines[2]["labels"]]
    saved(lines, tmp_path / "rows")
    [finding] = audit_findings(tmp_path / "rows", oracle)
    assert finding.rule == "ML559"
    assert str(finding.place).endswith("data-00000-of-00002.arrow:2")


def test_a_mask_of_another_length_is_an_unreadable_row(lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    masked = as_mask(lines)
    masked[0]["assistant_masks"].append(1)
    saved(masked, tmp_path / "rows")
    findings = audit_findings(tmp_path / "rows", oracle)
    assert [finding.rule for finding in findings if str(finding.place).endswith("assistant_masks")] == ["ML501"]


def test_ids_without_labels_and_masks_are_never_green(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(without(lines, "labels"), tmp_path / "rows")
    code, out = check(tmp_path / "rows", capsys)
    assert code == 1
    assert re.search(r"ML501 .*rows.*labels: is missing.*a mask", out)


def test_ids_without_messages_are_judged_by_their_dataset(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str], oracle: Oracle
) -> None:
    path = tmp_path / "rows"
    saved(without(lines, "messages"), path)
    code, out = check(path, capsys)
    assert code == 0, out
    assert "5 rows, 5 judged; 5 without messages" in out
    dataset = write_lines(tmp_path, [number_row(number) for number in range(5)], "dataset.jsonl")
    assert audit_rules(path, oracle, dataset) == []
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--dataset", str(dataset)]) == 0
    assert "5 rows: 5 sound, 0 wrong, 0 not judged" in capsys.readouterr().out
    saved(without(all_trained(lines), "messages"), tmp_path / "bad")
    assert audit_rules(tmp_path / "bad", oracle, dataset) == ["ML543"] * 5
    short = write_lines(tmp_path, [number_row(number) for number in range(4)], "short.jsonl")
    findings = audit_findings(path, oracle, short)
    assert [(finding.rule, finding.found) for finding in findings] == [("ML505", "row 4 of a dataset of 4 rows")]
    assert [verdict.state for verdict in Audit(FileRows(path), oracle, (short,)).verdicts()][4] == "not judged"


def test_ids_without_messages_that_come_again_or_too_late_are_named(
    lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    bare = [{**line, "row": row} for line, row in zip(without(lines, "messages"), (0, 1, 1, 4, 3), strict=True)]
    dataset = write_lines(tmp_path, [number_row(number) for number in range(5)], "dataset.jsonl")
    findings = audit_findings(write_lines(tmp_path, bare), oracle, dataset)
    assert [finding.found for finding in findings if finding.rule == "ML505"] == [
        "row 1 has ids alone, and comes after row 1",
        "row 3 has ids alone, and comes after row 4",
    ]


def test_packed_ids_without_messages_are_read_back_without_a_dataset_alone(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows"
    packed = {key: [value for line in lines for value in line[key]] for key in ("input_ids", "labels")} | {
        "seq_lengths": [len(line["input_ids"]) for line in lines]
    }
    saved([packed, packed], path)
    code, out = check(path, capsys)
    assert code == 0, out
    dataset = write_lines(tmp_path, [number_row(number) for number in range(5)], "dataset.jsonl")
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--dataset", str(dataset)]) == 1
    assert "Prepare the dataset without packing" in capsys.readouterr().out


def test_lengths_stand_for_the_positions_that_trl_makes_of_them(
    lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    lengths = [len(line["input_ids"]) for line in lines]
    packed = {key: [value for line in lines for value in line[key]] for key in ("input_ids", "labels")}
    for name, columns in {"seq_lengths": lengths, "cu_seqlens": [0, *accumulate(lengths)]}.items():
        saved([packed | {name: columns}, packed | {name: columns}], tmp_path / name)
        # each conversation is there twice, which is a note
        assert audit_rules(tmp_path / name, oracle) == ["ML608"] * len(lines)
    # one for all of them: the conversations see each other
    saved([packed | {"seq_lengths": [sum(lengths)]}] * 2, tmp_path / "one")
    assert audit_rules(tmp_path / "one", oracle) == ["ML512", "ML512", *["ML608"] * len(lines)]
    for bad in ([1, 2], [0, 3, 2]):
        path = write_lines(tmp_path, [packed | {"cu_seqlens": bad}], "bad.jsonl")
        assert audit_rules(path, oracle) == ["ML501"]


def test_the_summary_names_the_columns_that_say_what_is_trained_on(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weighted = [{**line, "loss_weights": [0.5 * (label != -100) for label in line["labels"]]} for line in lines[:2]]
    path = write_lines(tmp_path, [*weighted, *as_mask(lines[2:], "loss_mask")])
    code, out = check(path, capsys)
    assert code == 0, out
    assert "labels (2), loss_mask (3), loss_weights (2)" in out
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 0
    assert "labels in 2 rows, loss_mask in 3 rows, loss_weights in 2 rows" in capsys.readouterr().out
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--output-format=jsonl"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["columns"] == {"labels": 2, "loss_mask": 3, "loss_weights": 2}


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Number 0?", "completion": "It is 0."},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "<s>[INST]"},
    ],
)
def test_rows_with_other_columns_than_messages_are_read_back(
    columns: Data, lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    saved([{**line, **columns} for line in without(lines, "messages")], tmp_path / "rows")
    assert audit_rules(tmp_path / "rows", oracle) == []
    saved([{**line, **columns} for line in without(all_trained(lines), "messages")], tmp_path / "bad")
    assert audit_rules(tmp_path / "bad", oracle) == ["ML543"] * 5


def pair(number: int) -> Data:
    return {"prompt": f"Number {number}?", "completion": f"It is {number}."}


def sharegpt(number: int) -> Data:
    said = {"human": f"Number {number}?", "gpt": f"It is {number}."}
    return {"conversations": [{"from": role, "value": text} for role, text in said.items()]}


@pytest.mark.parametrize("columns", [pair, sharegpt])
def test_the_step_for_rows_of_another_format_leads_to_a_verdict(
    columns: Callable[[int], Data], lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = tmp_path / "prepared", tmp_path / "rows.jsonl"
    saved([line | columns(number) for number, line in enumerate(without(lines, "messages"))], path)
    assert main(["import", str(path), "--to", str(rows)]) == 0
    capsys.readouterr()
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--dataset", str(rows), "--output-format=jsonl"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert (summary["rows"], summary["sound"], summary["packed"]) == (5, 5, 0)


def tool(name: str, **properties: Any) -> Data:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}


def called(name: str, call_id: str, tools: Any, **arguments: Any) -> Data:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": call_id},
        {"role": "assistant", "content": "So."},
    ]
    return {"messages": messages, "tools": tools}


@pytest.fixture
def calls(oracle: Oracle) -> list[Data]:
    rows = [
        called("weather", "abcdefghi", [tool("weather", city={"type": "string"})], city="Rome"),
        called("time", "abcdefghj", [tool("time", zone={"type": "string", "enum": ["CET"]})], zone="CET"),
    ]
    return [with_ids(oracle, row) for row in rows]


def with_ids(oracle: Oracle, row: Data) -> Data:
    encoded = oracle.encode({key: row[key] for key in ("messages", "tools")})
    return {**row, "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_nulls_that_the_table_adds_to_calls_and_tools_are_none_of_the_row(
    form: str, calls: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    save, name, _ = FORMS[form]
    save(calls, tmp_path / name)
    padded = datasets.Dataset.from_list(calls)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert padded == {"city": "Rome", "zone": None}
    assert audit_rules(tmp_path / name, oracle) == []


def test_nulls_that_were_encoded_are_a_finding(calls: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    saved(calls, tmp_path / "first")
    padded = datasets.load_from_disk(tmp_path / "first")[0]
    row = {**calls[0], "messages": [*calls[0]["messages"]]}
    row["messages"][1] = {**row["messages"][1], "tool_calls": padded["messages"][1]["tool_calls"]}
    saved([with_ids(oracle, row), calls[1]], tmp_path / "rows")
    [finding] = audit_findings(tmp_path / "rows", oracle)
    assert finding.rule == "ML623"
    assert "null at $.zone" in finding.found


def test_tools_as_json_are_read_as_trl_reads_them(calls: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    saved([{**line, "tools": json.dumps(line["tools"])} for line in calls], tmp_path / "rows")
    assert audit_rules(tmp_path / "rows", oracle) == []
    saved([{**line, "tools": "[{"} for line in calls], tmp_path / "bad")
    assert audit_rules(tmp_path / "bad", oracle) == ["ML501", "ML501"]


def test_a_folder_of_which_some_files_are_encoded_is_parted(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, lines, "encoded.jsonl")
    write_lines(tmp_path, [number_row(1)], "rows.jsonl")
    code, out = check(tmp_path, capsys)
    assert code == 2
    assert "a folder of which 1 of 2 files are encoded rows" in out
    assert f"mistral-lora check {tmp_path}/encoded.jsonl {tmp_path}/rows.jsonl --tokenizer PATH" in out


def test_one_shard_with_ids_makes_the_table_encoded(lines: list[Data], tmp_path: Path) -> None:
    for number, part in enumerate((without(lines, "input_ids", "labels"), lines)):
        parquet(part, tmp_path / f"train-{number:05}-of-00002.parquet")
    assert recognised(tmp_path).kind == "encoded"


def test_a_saved_dataset_without_one_of_its_files_is_an_error(lines: list[Data], tmp_path: Path) -> None:
    saved(lines, tmp_path / "rows")
    second = tmp_path / "rows" / "data-00001-of-00002.arrow"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    assert recognised(tmp_path / "rows").kind == "encoded"
    with pytest.raises(InputError, match="cannot be read as an Arrow stream"):
        audit_rules(tmp_path / "rows", Target("spm-v3").oracle)
    second.unlink()
    with pytest.raises(InputError, match=f"{second.name}.*no such file"):
        recognised(tmp_path / "rows")


@pytest.mark.parametrize("text", ['{"splits": ["."]}', '{"splits": [""]}'])
def test_a_split_that_is_its_own_folder_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(text)
    (tmp_path / "x.arrow").touch()
    with pytest.raises(InputError, match="a split without a name"):
        row_files(tmp_path)


def test_labels_of_late_rows_are_not_left_unread(
    lines: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Data] = [number_row(number) for number in range(30)]
    # of a classifier, which are no labels of tokens
    rows = [{**row, "labels": [0, 3]} for row in rows]
    code, out = check(write_lines(tmp_path, rows), capsys)
    assert code == 0, out
    for name, save in (("rows.jsonl", None), ("rows.parquet", parquet), ("rows.json", array)):
        late = [*without(rows, "labels"), {**number_row(31), "input_ids": [1, 2], "labels": [1, 2]}]
        path = tmp_path / name
        write_lines(tmp_path, late) if save is None else save(late, path)
        assert recognised(path).kind == "rows"
        code, out = check(path, capsys)
        assert code == 1, out
        assert f"ML634 {path}{':31' if save is None else ''}: " in out
        code, out = check(path, capsys, "--as", "encoded")
        assert code == 1
        assert "ML501" in out


INT32 = 2**31 - 1
FLOAT32 = 3.4028234663852886e38


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("attention_mask", 1, None),
        ("attention_mask", True, None),
        ("attention_mask", 1.0, None),
        ("attention_mask", False, "ML552"),
        ("attention_mask", 0.5, "ML501"),
        ("attention_mask", 2, "ML517"),
        ("attention_mask", -1, "ML570"),
        ("attention_mask", 2**62, "ML517"),
        ("loss_weights", 1.0, None),
        ("loss_weights", FLOAT32, None),
        ("loss_weights", FLOAT32 * 1.001, "ML570"),
        ("loss_weights", float("inf"), "ML570"),
        ("loss_weights", float("-inf"), "ML570"),
        ("loss_weights", float("nan"), "ML570"),
        ("loss_weights", -0.5, "ML571"),
        ("loss_mask", 1, None),
        ("loss_mask", True, None),
        ("loss_mask", False, "ML559"),
        ("completion_mask", 1.0, None),
        ("position_ids", True, "ML501"),
        ("loss_mask", 2, "ML570"),
        ("assistant_masks", -1, "ML570"),
        ("completion_mask", 2**62, "ML570"),
        ("sequence_ids", 0, None),
        ("sequence_ids", INT32, None),
        ("sequence_ids", INT32 + 1, "ML570"),
        ("sequence_ids", 2**62, "ML570"),
        ("seq_idx", -2, "ML570"),
    ],
)
def test_a_value_beside_the_ids_that_contradicts_its_column_is_found(
    column: str, value: float, rule: str | None, lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    line = lines[0] | {column: [value] * len(lines[0]["input_ids"])}
    for part in (line, {key: values for key, values in line.items() if key != "messages"}):
        saved([part], tmp_path / f"{'messages' in part}")
        assert audit_rules(tmp_path / f"{'messages' in part}", oracle) == ([rule] if rule else [])


def test_the_first_bad_value_is_shown_with_the_number_of_the_others(
    lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    count = len(lines[0]["input_ids"])
    for number, more in ((1, ""), (3, ", and 2 more")):
        mask = [7 if 2 <= n < 2 + number else int(lines[0]["labels"][n] != -100) for n in range(count)]
        [finding] = audit_findings(write_lines(tmp_path, [lines[0] | {"assistant_masks": mask}]), oracle)
        assert (finding.rule, finding.found) == ("ML570", f"assistant_masks is 7 at token 2{more}")


@pytest.mark.parametrize(
    ("first", "is_sound"), [(0, True), (100, True), (-1, False), (2**24 - 40, True), (2**24, False), (2**62, False)]
)
def test_positions_of_a_row_are_numbers_that_a_model_tells_apart(
    first: int, is_sound: bool, lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    count = len(lines[0]["input_ids"])
    path = write_lines(tmp_path, [lines[0] | {"position_ids": [first + n for n in range(count)]}])
    assert audit_rules(path, oracle) == ([] if is_sound else ["ML512"])


def test_the_numbers_of_a_packed_sequence_name_its_conversations(
    lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    counts = [len(line["input_ids"]) for line in lines[:2]]
    packed = {key: [value for line in lines[:2] for value in line[key]] for key in ("input_ids", "labels")}
    packed |= {"conversations": [line["messages"] for line in lines[:2]]}
    packed |= {"position_ids": [n for count in counts for n in range(count)]}
    for numbers in ([0, 1], [1, 2], [7, 3]):
        right = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
        path = write_lines(tmp_path, [packed | {"sequence_ids": right}])
        assert audit_rules(path, oracle) == []
        # one number a conversation is no number for each token
        assert audit_rules(write_lines(tmp_path, [packed | {"sequence_ids": numbers}]), oracle) == []
        late = [right[0], *right[:-1]]
        [finding] = audit_findings(write_lines(tmp_path, [packed | {"seq_idx": late}]), oracle)
        assert finding.rule == "ML517"
        assert f"seq_idx: conversation 1 has the numbers {numbers[0]} and {numbers[1]}" in finding.found
    shared = packed | {"sequence_ids": [0] * sum(counts)}
    assert audit_rules(write_lines(tmp_path, [shared]), oracle) == ["ML517"]


def test_a_huge_length_of_a_packed_sequence_takes_no_time(lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    row = {key: lines[0][key] for key in ("input_ids", "labels")}
    for lengths in ([2**62], [2**62, 2**62], [len(row["input_ids"]), 2**62]):
        found = audit_rules(write_lines(tmp_path, [row | {"seq_lengths": lengths}]), oracle)
        assert found == ["ML561"]
