"""How chat rows are written for LLaMA-Factory: the columns and tags that its `dataset_info.json` names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pytest_mistral_lora.runners import TRAINERS

pytest.importorskip("datasets", reason="the runners' own library")

STOCK = TRAINERS["llamafactory"].config
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zoë"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "yes"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": [TOOL],
}


@pytest.fixture
def script(scripts: None) -> Iterator[ModuleType]:
    import llamafactory_rows

    yield llamafactory_rows
    sys.modules.pop("torchaudio", None)


@pytest.fixture
def written(script: ModuleType, tmp_path: Path) -> Any:
    """Return the rows as they are written, and the configuration that goes with them."""

    def write(
        config: dict[str, Any], rows: list[dict[str, Any]], name: str = ""
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"dataset_dir": str(STOCK.parent / "llamafactory"), **config}))
        (tmp_path / "work").mkdir()
        marked = [{**row, script.MARK: n} for n, row in enumerate(rows)]
        task = script.Task(marked, tmp_path, file, tmp_path / "work", name=name)
        made = script.configuration(task)
        lines = (Path(made["dataset_dir"]) / "train.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], made

    return write


def test_sharegpt_has_calls_as_a_message_of_their_own_role(written: Any, script: ModuleType) -> None:
    [row], config = written({"dataset": "rows"}, [ROW])
    assert row["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Warm?"},
        {"role": "function_call", "content": '[{"name": "weather", "arguments": {"city": "Zo\\u00eb"}}]'},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert json.loads(row["tools"]) == [TOOL["function"]]
    assert row[script.MARK] == 0
    described = json.loads((Path(config["dataset_dir"]) / "dataset_info.json").read_text())
    assert described["rows"]["file_name"] == "train.jsonl"
    assert described["rows"]["formatting"] == "sharegpt"


def test_openai_keeps_calls_where_they_are(written: Any) -> None:
    [row], _ = written({"dataset": "openai_rows"}, [ROW])
    assert row["messages"][2] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_what_ids_do_not_depend_on_is_replaced_and_the_rest_is_kept(written: Any, tmp_path: Path) -> None:
    given = {"dataset": "rows", "template": "mistral", "cutoff_len": 9, "bf16": True, "deepspeed": "x.json"}
    _, config = written(given, [ROW])
    assert (config["template"], config["cutoff_len"], config["bf16"]) == ("mistral", 9, False)
    assert config["model_name_or_path"] == str(tmp_path)
    assert "deepspeed" not in config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "one dataset of dataset_info.json"),
        ({"dataset": "rows,openai_rows"}, "one dataset of dataset_info.json"),
        ({"dataset": "other"}, "'other' is not in"),
    ],
)
def test_a_configuration_without_the_one_dataset_is_refused(config: dict[str, Any], words: str, written: Any) -> None:
    with pytest.raises(ValueError, match=words):
        written(config, [ROW])


def test_another_form_than_chat_rows_is_refused(written: Any, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json"}}))
    with pytest.raises(ValueError, match="formatting: alpaca; chat rows need sharegpt or openai"):
        written({"dataset": "mine", "dataset_dir": str(tmp_path)}, [ROW])


PAIR = {
    "prompt": ROW["messages"][:4],
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "tool_calls": [CALL]}],
    "tools": [TOOL],
}
CALLED = '[{"name": "weather", "arguments": {"city": "Zo\\u00eb"}}]'


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_a_pair_has_one_message_in_each_column_of_an_answer(stage: str, written: Any, script: ModuleType) -> None:
    [row], config = written({"dataset": "pairs", "stage": stage}, [PAIR], stage)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "function_call", "tool"]
    assert row["chosen"] == {"role": "assistant", "content": "Yes."}
    assert row["rejected"] == {"role": "function_call", "content": CALLED}
    assert json.loads(row["tools"]) == [TOOL["function"]]
    assert row[script.MARK] == 0
    described = json.loads((Path(config["dataset_dir"]) / "dataset_info.json").read_text())["pairs"]
    assert described["ranking"] is True
    assert config["stage"] == stage


def test_a_pair_in_openai_s_form_keeps_calls_where_they_are(written: Any, tmp_path: Path) -> None:
    info = json.loads((STOCK.parent / "llamafactory" / "dataset_info.json").read_text())
    info = {"mine": {**info["pairs"], "formatting": "openai"}}
    info["mine"]["columns"] = {"messages": "asked", "chosen": "good", "rejected": "bad"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    [row], _ = written({"dataset": "mine", "dataset_dir": str(tmp_path)}, [PAIR], "dpo")
    assert row["asked"][2] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert row["good"] == {"role": "assistant", "content": "Yes."}
    assert row["bad"] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_a_rated_answer_is_a_conversation_with_a_tag(written: Any) -> None:
    rated = {"prompt": ROW["messages"][1:2], "completion": PAIR["chosen"], "label": False}
    [row], config = written({"dataset": "rated"}, [rated], "kto")
    assert row["messages"] == [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "Yes."}]
    assert row["label"] is False
    assert config["stage"] == "kto"


@pytest.mark.parametrize(
    ("dataset", "stage", "words"),
    [
        ("rows", "dpo", "columns: chosen, columns: rejected, ranking: true, which stage: dpo"),
        ("pairs", "kto", "no columns: kto_tag, which stage: kto needs"),
    ],
)
def test_a_description_without_the_columns_of_the_answers_is_refused(
    dataset: str, stage: str, words: str, written: Any
) -> None:
    with pytest.raises(ValueError, match=words):
        written({"dataset": dataset}, [PAIR], stage)


def test_an_answer_of_several_messages_is_refused_by_itself(script: ModuleType, tmp_path: Path) -> None:
    row = {**PAIR, "chosen": [*ROW["messages"][2:4], *PAIR["chosen"]], script.MARK: 7}
    [(number, made)] = script.encode(script.Task([row], tmp_path, STOCK, tmp_path, name="dpo"))
    assert (number, made["error"].partition(",")[0]) == (7, "`chosen` has 3 messages")


def test_each_stage_has_the_columns_that_its_trainer_reads(script: ModuleType) -> None:
    row = {
        f"{side}_{name}": [1] for side in ("chosen", "rejected") for name in ("input_ids", "labels", "attention_mask")
    }
    assert script._columns(row, "rm") == {"chosen_input_ids": [1], "rejected_input_ids": [1]}
    assert script._columns(row, "dpo").keys() == row.keys() - {"chosen_attention_mask", "rejected_attention_mask"}
    row = {"input_ids": [1, 2], "labels": [-100, 2], "kl_input_ids": [3], "kl_labels": [3], "kto_tags": True}
    rated = {"completion_input_ids": [1, 2], "completion_labels": [-100, 2], "label": True}
    assert script._columns(row, "kto") == rated


def test_torchaudio_that_cannot_be_imported_has_a_stand_in_that_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # as a package that is broken or not there
    assert "stand-in" in script.stand_in_for_torchaudio()["torchaudio"]
    import torchaudio

    assert "stand-in-" in str(torchaudio.__file__)


@pytest.mark.parametrize(
    ("here", "beside", "is_absolute", "expected"),
    [
        ("here", "beside", False, "here"),
        ("here", None, False, "here"),
        (None, "beside", False, "beside"),
        ("here", "beside", True, "beside"),
    ],
)
def test_the_folder_of_the_data_is_relative_to_the_current_folder_and_else_beside_the_configuration(
    here: str | None,
    beside: str | None,
    is_absolute: bool,
    expected: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The current folder is LLaMA-Factory's own rule; its examples lie beside their data, and run from anywhere."""
    for folder, name in ((tmp_path / "cwd", here), (tmp_path / "project", beside)):
        (folder / "rows").mkdir(parents=True)
        if name is not None:
            entry = {"mine": {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": {"messages": name}}}
            (folder / "rows" / "dataset_info.json").write_text(json.dumps(entry))
    given = str(tmp_path / "project" / "rows") if is_absolute else "rows"
    file = tmp_path / "project" / "config.yaml"
    file.write_text(yaml.safe_dump({"dataset": "mine", "dataset_dir": given}))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    task = script.Task([{**ROW, script.MARK: 0}], tmp_path, file, tmp_path / "work")
    made = script.configuration(task)
    described = json.loads((Path(made["dataset_dir"]) / "dataset_info.json").read_text())
    assert described["mine"]["columns"]["messages"] == expected


def test_without_the_key_the_folder_is_named_data(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    entry = {"mine": {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entry))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"dataset": "mine"}))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    made = script.configuration(script.Task([{**ROW, script.MARK: 0}], tmp_path, file, tmp_path / "work"))
    assert Path(made["dataset_dir"]) == tmp_path / "work" / "data"
