"""A configuration of a trainer leads to its data, or is refused by its key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from imported import ANSWER, GOOD, USER, answer, axolotl, declared_rows, llamafactory, sharegpt, written

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.path_kinds import paths_behind
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import convert
from pytest_mistral_lora.formats.declarations import declared_sources
from pytest_mistral_lora.formats.report import Report


def test_pairs_of_axolotl(tmp_path: Path) -> None:
    entry = {
        "type": "chat_template.default",
        "field_messages": "asked",
        "field_chosen": "good",
        "field_rejected": "bad",
    }
    pair = {"asked": [USER], "good": ANSWER, "bad": {**ANSWER, "content": "b"}}
    assert declared_rows(axolotl(tmp_path, entry, pair, rl="dpo"))[0] == [GOOD]


def test_settings_of_training_are_remarks(tmp_path: Path) -> None:
    entry = {"type": "alpaca", "train_on_eos": "none"}
    record = {"instruction": "u", "input": "", "output": "a"}
    _, report = declared_rows(axolotl(tmp_path, entry, record, train_on_inputs=True))
    assert [remark.partition(" ")[0].rstrip(":") for remark in report.remarks] == [
        "train_on_inputs",
        "train_on_eos",
        "the",
    ]
    assert all(f"remark   {remark}" in report.lines() for remark in report.remarks)


def test_an_adapter_to_go_on_from_is_a_remark(tmp_path: Path) -> None:
    record = {"instruction": "u", "input": "", "output": "a"}
    _, report = declared_rows(axolotl(tmp_path, {"type": "alpaca"}, record, lora_model_dir="old"))
    [remark] = [remark for remark in report.remarks if remark.startswith("lora_model_dir: old of ")]
    assert "lora.start" in remark


def test_data_files_are_found_beside_the_configuration(tmp_path: Path) -> None:
    entry = {"path": "json", "data_files": ["rows.jsonl"], "ds_type": "json", "type": "chat_template"}
    assert declared_rows(axolotl(tmp_path, entry, GOOD))[0] == [GOOD]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps(GOOD), "utf-8")
    entry = {"path": str(tmp_path / "data"), "data_files": "a.jsonl", "type": "chat_template"}
    assert declared_rows(axolotl(tmp_path, entry, GOOD))[0] == [GOOD]


def test_a_training_file_of_llamafactory_leads_to_its_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    llamafactory(tmp_path / "data", {}, {"instruction": "u", "input": "", "output": "a"})
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\ndataset: mine\ndataset_dir: data\ntrain_on_prompt: true\n", "utf-8")
    found, report = declared_rows(path)
    assert found == [GOOD]
    [remark] = report.remarks
    assert remark.startswith(f"train_on_prompt: True of {path} ")


def test_a_configuration_of_trl_leads_to_its_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "u", "completion": "a"}), "utf-8")
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: x\ndataset_name: rows.jsonl\n", "utf-8")
    assert declared_rows(path)[0] == [GOOD]


REFUSED: list[tuple[str, str, str]] = [
    (
        "a.yaml",
        "datasets: [{path: rows.jsonl, type: completion}]",
        "datasets[0]: type completion: a text without turns",
    ),
    ("a.yaml", "datasets: [{path: rows.jsonl, type: orpo.x}]", "datasets[0]: type 'orpo.x'; expected chat_template"),
    ("a.yaml", "datasets: [{path: rows.jsonl, split_thinking: true}]", "split_thinking: True is not followed"),
    (
        "a.yaml",
        "datasets: [{path: rows.jsonl, message_field_training_detail: parts}]",
        "datasets[0]: message_field_training_detail: 'parts' trains parts of a message; expected message_field",
    ),
    ("a.yaml", "datasets: [{type: chat_template}]", "datasets[0]: no `path`"),
    ("a.yaml", "datasets: [rows.jsonl]", "datasets[0]: 'rows.jsonl'"),
    (
        "a.yaml",
        "datasets: [{path: owner/name, type: alpaca}]",
        "hf download --repo-type dataset",
    ),
    ("dataset_info.json", '{"a": {"hf_hub_url": "x"}, "b": {"file_name": "c"}}', "no such file or folder"),
    (
        "dataset_info.json",
        '{"a": {"file_name": "x"}, "b": {"file_name": "c"}}',
        "`dataset` in a recipe): a, b",
    ),
    (
        "dataset_info.json",
        '{"a": {"hf_hub_url": "x"}}',
        "`dataset` in a recipe): none has a file_name",
    ),
    ("dataset_info.json", '{"a": {"file_name": "x", "num_samples": 5}}', "a: num_samples 5 draws rows at random"),
    (
        "dataset_info.json",
        '{"a": {"file_name": "x", "formatting": "y"}}',
        "a: formatting: 'y'; expected 'alpaca', 'sharegpt' or 'openai'",
    ),
    ("dataset_info.json", '{"a": {"file_name": "x", "columns": {"prompt": "text"}}}', "no response is declared"),
]


@pytest.mark.parametrize(("name", "text", "said"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_a_declaration_that_is_not_followed_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        declared_sources(Path(name))
    assert said in str(caught.value)


def test_the_command_reads_a_declaration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = llamafactory(tmp_path, {}, {"instruction": "u", "input": "", "output": "a"})
    to = tmp_path / "rows.jsonl"
    assert main(["import", str(path), "--dataset", "mine", "--to", str(to)]) == 0
    assert json.loads(to.read_text("utf-8")) == GOOD
    assert "Alpaca (declared)" in capsys.readouterr().out
    assert main(["import", str(path), "--dataset", "other", "--to", str(to)]) == 2
    assert re.search(f"{re.escape(str(path))}, other: .*; expected .*mine", capsys.readouterr().err)
    words = ["import", str(path), "--dataset", "mine", "--format", "alpaca", "--to", str(tmp_path / "x")]
    assert main(words) == 2
    assert f"format: {path} declares its format" in capsys.readouterr().err
    assert main(["import", str(to), "--dataset", "other", "--to", str(tmp_path / "x")]) == 2
    assert f"{to}: declares no data set other; expected a dataset_info.json" in capsys.readouterr().err


FOLLOWED: list[tuple[dict[str, Any], str]] = [
    ({"base_model": "x", "datasets": [{"path": "rows.jsonl", "split": "train[:5]"}]}, "split: 'train[:5]' is not"),
    ({"base_model": "x", "datasets": [{"path": "rows.jsonl", "split": "test"}]}, "split test: a file alone has none"),
    ({"base_model": "x", "datasets": [{"path": "data", "split": "test"}]}, "no file of the split 'test'"),
    ({"base_model": "x", "datasets": []}, "datasets: is empty"),
    ({"model_name_or_path": "x", "dataset_name": "data", "dataset_train_split": "train[:5]"}, "dataset_train_split"),
    ({"model_name_or_path": "x", "datasets": [{"path": "rows.jsonl", "columns": ["prompt"]}]}, "columns: ['prompt']"),
    ({"model_name_or_path": "x", "dataset": "mine", "dataset_dir": "lists"}, "does not declare data sets"),
    ({"model_name_or_path": "x", "dataset": "mine", "dataset_dir": "numbers"}, "does not declare data sets"),
    ({"model_name_or_path": "x", "dataset": "mine"}, "data/dataset_info.json: cannot be read: No such file"),
]


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, info in (("lists", []), ("numbers", {"mine": 3}), ("data/.cache", {}), ("data", None)):
        Path(name).mkdir(parents=True, exist_ok=True)
        if info is not None:
            (Path(name) / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    for path in (Path("rows.jsonl"), Path("data/TRAIN.JSONL"), Path("data/._TRAIN.JSONL"), Path("data/.cache/a.json")):
        written(path, {"prompt": "u", "completion": "a"})
    return Path("config.yaml")


@pytest.mark.parametrize(("config", "said"), FOLLOWED, ids=[case[1][:30] for case in FOLLOWED])
def test_a_declaration_of_other_rows_is_refused(declared: Path, config: Any, said: str) -> None:
    declared.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        declared_sources(declared)
    assert said in str(caught.value)


def test_the_other_data_of_a_declaration_are_remarks_and_hidden_files_are_none(declared: Path) -> None:
    mixture = {"model_name_or_path": "x", "datasets": [{"path": "rows.jsonl"}, {"path": "data", "split": "train"}]}
    declared.write_text(yaml.safe_dump({**mixture, "test_datasets": ["held"]}), encoding="utf-8")
    sources, remarks = declared_sources(declared)
    assert [one.path for one in sources] == [Path("rows.jsonl"), Path("data/TRAIN.JSONL")]
    assert list(convert(sources, Report())) == [GOOD, GOOD]
    [remark] = remarks
    assert remark.startswith("test_datasets: ['held'] of config.yaml ")
    with pytest.raises(InputError, match="declares no data set mine"):
        declared_sources(declared, ("mine",))


def test_a_declared_pair_and_a_declared_tag_keep_both_answers(tmp_path: Path) -> None:
    pairs = {
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
    }
    tagged = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "good"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    for name, entry, record, row in (
        (
            "pairs",
            pairs,
            sharegpt(("human", "u"), good={"from": "gpt", "value": "a"}, bad={"from": "gpt", "value": "b"}),
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [answer("b")]},
        ),
        ("tagged", tagged, GOOD | {"good": False}, {"prompt": [USER], "completion": [ANSWER], "label": False}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        written(folder / "data.jsonl", record)
        (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "data.jsonl", **entry}}))
        sources, _ = declared_sources(folder / "dataset_info.json", ())
        report = Report()
        assert list(convert(sources, report)) == [row]
        assert not report.losses


def test_columns_of_a_spreadsheet_are_declared_beside_the_index_of_pandas(tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    columns = {"prompt": "instruction", "response": "output"}
    info.write_text(json.dumps({"mine": {"file_name": "b.csv", "columns": columns}}), encoding="utf-8")
    (tmp_path / "b.csv").write_text(",instruction,output\n5,u,a\n", encoding="utf-8")
    assert list(convert(declared_sources(info)[0], Report())) == [GOOD | {"": "5"}]


@pytest.mark.parametrize("write", [axolotl, llamafactory])
def test_an_unknown_role_is_declared_in_the_configuration_that_names_the_data(tmp_path: Path, write: Any) -> None:
    chat = {"type": "chat_template"} if write is axolotl else {"formatting": "sharegpt"}
    record = GOOD if write is axolotl else sharegpt(("human", "u"), ("gpt", "a"))
    path = write(tmp_path, chat, json.loads(json.dumps(record).replace('"user"', '"ghost"').replace("human", "ghost")))
    report = Report()
    assert list(convert(declared_sources(path)[0], report)) == []
    key = "`roles` of Axolotl's datasets" if write is axolotl else "`tags` of LLaMA-Factory's dataset_info.json"
    assert f"Declare it: {key}." in report.fault_lines()[0]


def test_the_data_of_a_description_of_any_name_are_not_replaced(tmp_path: Path) -> None:
    path = llamafactory(tmp_path, {}, {"instruction": "u", "input": "", "output": "a"})
    mine = path.rename(tmp_path / "mine_dataset_info.json")
    assert paths_behind(mine) == [mine, tmp_path / "rows.json"]
