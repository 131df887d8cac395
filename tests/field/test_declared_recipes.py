"""A recipe trains on the data that a trainer's configuration declares, and is told from such a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imported import GOOD, axolotl, llamafactory

from pytest_mistral_lora import judge
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.formats.convert import convert
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.report import Report
from pytest_mistral_lora.formats.sources import recorded_file, sources_of
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.recipe.data import DataSource

TAGS = {"role_tag": "who", "content_tag": "what", "user_tag": "user", "assistant_tag": "assistant"}
ENTRY = {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": TAGS}
TALK = {"talk": [{"who": message["role"], "what": message["content"]} for message in GOOD["messages"]]}


def source(folder: Path, **more: Any) -> DataSource:
    """Return the source of a recipe that names a `dataset_info.json` with two data sets."""
    path = llamafactory(folder, ENTRY, TALK)
    info = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**info, "other": {"file_name": "no.json"}}), "utf-8")
    return DataSource(path=path, **more)


def test_a_source_has_the_rows_of_a_declared_data_set_and_records_its_layout(tmp_path: Path) -> None:
    [file] = source(tmp_path, dataset=["mine"]).files(is_held_out=False)
    rows = list(read_rows(file))
    assert [row.messages for row in rows] == [tuple(GOOD["messages"])]
    assert file.source is not None
    # the declaration is not needed again
    (tmp_path / "dataset_info.json").unlink()
    again = recorded_file(file.path, {"source": file.source.facts()})
    assert list(read_rows(again)) == rows


COLUMNS = {"prompt": "instruction", "response": "output"}
ALPACA = {"instruction": "u", "output": "a"}
PAIR = {"instruction": "u", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("entry", "record", "words"),
    [
        ({"columns": COLUMNS}, ALPACA, ""),
        (
            {"columns": {"prompt": "output", "response": "instruction"}},
            ALPACA,
            "'output' as the prompt, 'instruction' as the answer",
        ),
        # questions are generated from answers on purpose
        ({"columns": {"prompt": "answer", "response": "question"}}, {"question": "u", "answer": "a"}, ""),
        ({"ranking": True, "columns": {"prompt": "instruction"}}, PAIR, ""),
        (
            {"ranking": True, "columns": {"prompt": "instruction", "chosen": "rejected", "rejected": "chosen"}},
            PAIR,
            "'rejected' as the chosen answer, 'chosen' as the rejected answer",
        ),
        (ENTRY, TALK, ""),
        (
            {**ENTRY, "tags": {**TAGS, "user_tag": "assistant", "assistant_tag": "user"}},
            {"talk": TALK["talk"][::-1]},
            "'assistant' as user, 'user' as assistant",
        ),
    ],
)
def test_names_that_a_declaration_exchanges_are_noted(tmp_path: Path, entry: Any, record: Any, words: str) -> None:
    path = llamafactory(tmp_path, entry, record)
    verdict = judge(path, tokenizer="spm-v3", kind="rows")
    assert verdict.ok
    expected = [("ML676", f"its declaration reads {words}", "rows.json")] if words else []
    notes = [(one.rule, one.found, Path(str(one.place)).name) for one in verdict.findings]
    assert notes == expected
    report = Report()
    sources, _ = sources_of(path, Layout())
    assert list(convert(sources, report))
    assert [remark.partition(" reads ")[2] for remark in report.remarks] == ([words] if words else [])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "declares 2 data sets"),
        ({"dataset": ["third"]}, "no such data set"),
        ({"dataset": ["mine"], "format": "alpaca"}, "declares its format"),
    ],
)
def test_a_source_that_cannot_be_followed_is_an_error(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        source(tmp_path, **more).files(is_held_out=False)


def test_a_configuration_is_a_source_as_well(tmp_path: Path) -> None:
    path = axolotl(tmp_path, {"type": "chat_template"}, GOOD)
    [file] = DataSource(path=path).files(is_held_out=False)
    assert [row.messages for row in read_rows(file)] == [tuple(GOOD["messages"])]


@pytest.mark.parametrize(
    ("text", "runner"),
    [
        ("base_model: x\ndatasets: [{path: rows.jsonl, type: chat_template}]", "Axolotl"),
        ("model_name_or_path: x\nstage: sft\ndataset: identity", "LLaMA-Factory"),
        ("model_name_or_path: x\ndataset_name: rows\nassistant_only_loss: true", "TRL"),
    ],
)
def test_a_configuration_of_another_trainer_is_named_with_the_commands_that_read_it(
    tmp_path: Path, text: str, runner: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.found == f"this is a configuration of {runner}"
    option = runner.lower().replace("-", "")
    assert f"mistral-lora check --runner {option} --config {path} --tokenizer PATH" in caught.value.next_step
    assert option in TRAINERS


def test_no_output_replaces_the_data_that_a_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    axolotl(tmp_path, {"type": "chat_template"}, GOOD)
    # a file with content would be refused for that
    Path("rows.jsonl").write_text("", "utf-8")
    words = ["check", "--runner", "axolotl", "--tokenizer", "spm-v3", "--config", "axolotl.yaml"]
    assert main([*words, "--output", "rows.jsonl"]) == 2
    assert "rows.jsonl, which this command reads" in capsys.readouterr().err
