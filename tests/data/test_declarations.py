from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.data import convert
from pytest_mistral_lora.data.declarations import declared_sources
from pytest_mistral_lora.data.report import LOSSES, Report
from pytest_mistral_lora.errors import InputError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def rows_of(path: Path, *names: str) -> tuple[list[Any], Report]:
    sources, remarks = declared_sources(path, names)
    report = Report(remarks=remarks)
    found = list(convert(sources, report, lossy=LOSSES))
    assert report.fault_lines() == []
    return found, report


def llamafactory(folder: Path, entry: dict[str, Any], *records: Any) -> Path:
    (folder / "rows.json").write_text(json.dumps(records), "utf-8")
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}), "utf-8")
    return path


def axolotl(folder: Path, entry: dict[str, Any], *records: Any, **config: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    path = folder / "axolotl.yaml"
    path.write_text(
        yaml.safe_dump({"base_model": "x", "datasets": [{"path": "rows.jsonl", **entry}], **config}), "utf-8"
    )
    return path


OF_LLAMAFACTORY: list[tuple[str, dict[str, Any], Any, Any]] = [
    (
        "alpaca",
        {},
        {"instruction": "u", "input": "v", "output": "a"},
        {"messages": [{**USER, "content": "u\nv"}, ANSWER]},
    ),
    (
        "columns of another name",
        {"columns": {"prompt": "q", "response": "r", "system": "s", "history": "h"}},
        {"q": "u", "r": "a", "s": "s", "h": [["b", "c"]]},
        {"messages": [SYSTEM, {**USER, "content": "b"}, {**ANSWER, "content": "c"}, USER, ANSWER]},
    ),
    (
        # a column that is not declared beside others is not read
        "an input that is not declared",
        {"columns": {"prompt": "instruction", "response": "output"}},
        {"instruction": "u", "input": "x", "output": "a"},
        GOOD | {"input": "x"},
    ),
    (
        "sharegpt with tools",
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools", "system": "sys"}},
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
            "sys": "s",
        },
        {
            "messages": [
                SYSTEM,
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "ID", "type": "function", "function": {"name": "f", "arguments": {}}}],
                },
                {"role": "tool", "content": "1", "tool_call_id": "ID"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "tags",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot"},
        },
        {"turns": [{"who": "me", "says": "u"}, {"who": "bot", "says": "a"}]},
        GOOD,
    ),
    (
        "openai",
        {
            "formatting": "openai",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        GOOD,
        GOOD,
    ),
    (
        "pairs of sharegpt",
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
        },
        {
            "conversations": [{"from": "human", "value": "u"}],
            "good": {"from": "gpt", "value": "a"},
            "bad": {"from": "gpt", "value": "b"},
        },
        GOOD,
    ),
    (
        "pairs of alpaca",
        {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
        {"instruction": "u", "chosen": "a", "rejected": "b"},
        GOOD,
    ),
    (
        "kto",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "good"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        GOOD | {"good": False},
        None,
    ),
]


def with_ids(row: Any) -> Any:
    return json.loads(json.dumps(row), object_hook=_named)


def _named(one: dict[str, Any]) -> dict[str, Any]:
    return {key: "ID" if key in ("id", "tool_call_id") else value for key, value in one.items()}


@pytest.mark.parametrize(("name", "entry", "record", "row"), OF_LLAMAFACTORY, ids=[case[0] for case in OF_LLAMAFACTORY])
def test_a_dataset_info_of_llamafactory(tmp_path: Path, name: str, entry: Any, record: Any, row: Any) -> None:
    found, report = rows_of(llamafactory(tmp_path, entry, record))
    assert with_ids(found) == ([] if row is None else [row])
    assert report.sources[0]["format"].endswith("(declared)")


OF_AXOLOTL: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("chat_template", {"type": "chat_template"}, GOOD, GOOD),
    (
        "mappings",
        {
            "type": "chat_template",
            "field_messages": "turns",
            "field_system": "sys",
            "field_tools": "functions_of_mine",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["me"], "assistant": ["bot"]},
        },
        {
            "turns": [{"from": "me", "value": "u"}, {"from": "bot", "value": "a"}],
            "sys": "s",
            "functions_of_mine": [TOOL],
        },
        {"messages": [SYSTEM, USER, ANSWER], "tools": [TOOL]},
    ),
    (
        "the old names of the mappings",
        {"type": "chat_template", "message_field_role": "from", "message_field_content": "value"},
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        GOOD,
    ),
    (
        "a flag of training",
        {"type": "chat_template", "message_field_training": "learn"},
        {"messages": [USER, {**ANSWER, "learn": False}]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
    ),
    (
        "only flagged answers are trained on",
        {"type": "chat_template", "roles_to_train": [], "message_field_training": "learn"},
        {"messages": [USER, ANSWER, USER, {**ANSWER, "learn": True}]},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    ),
    (
        "thinking and parts",
        {"type": "chat_template", "field_thinking": "why"},
        {
            "messages": [
                USER,
                {"role": "assistant", "why": "t", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "ab"}],
                },
            ]
        },
    ),
    ("no system", {"type": "chat_template", "drop_system_message": True}, {"messages": [SYSTEM, USER, ANSWER]}, GOOD),
    (
        "sharegpt",
        {"type": "sharegpt"},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        GOOD,
    ),
    ("alpaca", {"type": "alpaca"}, {"instruction": "u", "input": "", "output": "a"}, GOOD),
    ("gpteacher", {"type": "gpteacher"}, {"instruction": "u", "input": "", "response": "a"}, GOOD),
    ("questions", {"type": "alpaca_chat.load_qa"}, {"question": "u", "answer": "a"}, GOOD),
    (
        "fields of one's own",
        {
            "type": {
                "system_prompt": "s",
                "field_instruction": "q",
                "field_output": "r",
                "format": "[Q] {instruction} ({input})",
                "no_input_format": "[Q] {instruction}",
            }
        },
        {"q": "u", "r": "a"},
        {"messages": [SYSTEM, {**USER, "content": "[Q] u"}, ANSWER]},
    ),
]


@pytest.mark.parametrize(("name", "entry", "record", "row"), OF_AXOLOTL, ids=[case[0] for case in OF_AXOLOTL])
def test_a_configuration_of_axolotl(tmp_path: Path, name: str, entry: Any, record: Any, row: Any) -> None:
    found, _ = rows_of(axolotl(tmp_path, entry, record))
    assert found == [row]


def test_pairs_of_axolotl(tmp_path: Path) -> None:
    entry = {
        "type": "chat_template.default",
        "field_messages": "asked",
        "field_chosen": "good",
        "field_rejected": "bad",
    }
    pair = {"asked": [USER], "good": ANSWER, "bad": {**ANSWER, "content": "b"}}
    assert rows_of(axolotl(tmp_path, entry, pair, rl="dpo"))[0] == [GOOD]


def test_settings_of_training_are_remarks(tmp_path: Path) -> None:
    entry = {"type": "alpaca", "train_on_eos": "none"}
    record = {"instruction": "u", "input": "", "output": "a"}
    _, report = rows_of(axolotl(tmp_path, entry, record, train_on_inputs=True))
    assert [remark.partition(" ")[0].rstrip(":") for remark in report.remarks] == [
        "train_on_inputs",
        "train_on_eos",
        "the",
    ]
    assert all(f"remark   {remark}" in report.lines() for remark in report.remarks)


def test_data_files_are_found_beside_the_configuration(tmp_path: Path) -> None:
    entry = {"path": "json", "data_files": ["rows.jsonl"], "ds_type": "json", "type": "chat_template"}
    assert rows_of(axolotl(tmp_path, entry, GOOD))[0] == [GOOD]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps(GOOD), "utf-8")
    entry = {"path": str(tmp_path / "data"), "data_files": "a.jsonl", "type": "chat_template"}
    assert rows_of(axolotl(tmp_path, entry, GOOD))[0] == [GOOD]


def test_a_training_file_of_llamafactory_leads_to_its_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    llamafactory(tmp_path / "data", {}, {"instruction": "u", "input": "", "output": "a"})
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\ndataset: mine\ndataset_dir: data\ntrain_on_prompt: true\n", "utf-8")
    found, report = rows_of(path)
    assert found == [GOOD]
    assert report.remarks == [f"train_on_prompt: True of {path} is a setting of training, not of rows"]


def test_a_configuration_of_trl_leads_to_its_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "u", "completion": "a"}), "utf-8")
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: x\ndataset_name: rows.jsonl\n", "utf-8")
    assert rows_of(path)[0] == [GOOD]


REFUSED: list[tuple[str, str, str]] = [
    (
        "a.yaml",
        "datasets: [{path: rows.jsonl, type: completion}]",
        "datasets[0]: type completion: a text without turns",
    ),
    ("a.yaml", "datasets: [{path: rows.jsonl, type: orpo.x}]", "datasets[0]: type 'orpo.x'; expected chat_template"),
    ("a.yaml", "datasets: [{path: rows.jsonl, split_thinking: true}]", "split_thinking: True is not followed"),
    ("a.yaml", "datasets: [{type: chat_template}]", "datasets[0]: no `path`"),
    ("a.yaml", "datasets: [rows.jsonl]", "datasets[0]: 'rows.jsonl'"),
    (
        "a.yaml",
        "datasets: [{path: owner/name, type: alpaca}]",
        "owner/name: no such file or folder. From the Hub: hf download --repo-type dataset",
    ),
    ("a.yaml", "a: [", "not valid YAML"),
    ("a.yaml", "[]", "is a list; expected a configuration"),
    ("a.yaml", "model: x", "no data is declared (keys model)"),
    ("a.yaml", "base: {}\ndata: {}", "this is a recipe of mistral-lora"),
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
    assert f"{path}, other: no such data set; expected one of mine" in capsys.readouterr().err
    words = ["import", str(path), "--dataset", "mine", "--format", "alpaca", "--to", str(tmp_path / "x")]
    assert main(words) == 2
    assert f"format: {path} declares its format" in capsys.readouterr().err
    assert main(["import", str(to), "--dataset", "other", "--to", str(tmp_path / "x")]) == 2
    assert f"{to}: declares no data set other; expected a dataset_info.json" in capsys.readouterr().err
