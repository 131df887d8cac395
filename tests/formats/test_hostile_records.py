"""No record and no declaration ends in a traceback: each gives a row that is sound, or an error of ours."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.foreign_fields import CONTENT, FLAGS, OTHER_ROLES, THOUGHTS
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.declarations import declared_sources
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.formats.report import LOSSES, Report

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.just(0.5),
    st.sampled_from(
        ["", " ", "a", "{}", "[]", '[{"role": "user"}]', '{"name": "f", "arguments": {}}', "call_1", "\ud800"]
    ),
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "bot", *OTHER_ROLES])
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "text", "name"]), inner, max_size=2)
    ),
    max_leaves=4,
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": SCALARS,
        "type": st.just("function") | SCALARS,
        "function": st.fixed_dictionaries({}, optional={"name": SCALARS, "arguments": JSON, "b": JSON}) | JSON,
        "name": SCALARS,
        "arguments": JSON,
        "index": SCALARS,
    },
)
CHUNKS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "thinking", "reasoning", "tool_call", "image_url", "x"]) | SCALARS,
        **dict.fromkeys(("text", "value", "content", "thinking", "train"), JSON),
    },
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), ROLES | SCALARS),
        **{key: SCALARS | st.lists(CHUNKS, max_size=2) | JSON for key in CONTENT},
        **dict.fromkeys((*FLAGS, *THOUGHTS, "refusal", "name", "tool_call_id", "prefix", "audio"), SCALARS),
        "tool_calls": st.lists(CALLS | JSON, max_size=2) | JSON,
        "function_call": CALLS | JSON,
    },
)
TALKS = st.lists(MESSAGES | JSON, max_size=4) | JSON
TOOLS = st.lists(CALLS | JSON, max_size=2) | JSON
TEXT_KEYS = ("instruction", "input", "output", "system", "text", "label", "only_last", "images", "tool", "id")
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations", "prompt", "completion", "chosen", "rejected", "history"), TALKS),
        **dict.fromkeys(("tools", "functions"), TOOLS),
        **dict.fromkeys(TEXT_KEYS, JSON),
    },
)


@FOLDER
@given(st.lists(RECORDS | TALKS | JSON, min_size=1, max_size=3), st.sampled_from(["", *FORMATS]))
def test_no_record_ends_in_a_traceback(tmp_path: Path, records: list[Any], name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    report = Report()
    with suppress(InputError):
        for row in convert([Source(path, Layout(name))], report, lossy=LOSSES):
            assert parse_row(json.loads(json.dumps(row))).to_json()["messages"] == row["messages"]
    for record in records:
        recognise(record)
    assert all(line.startswith(str(path)) for line in report.fault_lines())
    json.dumps(report.to_json())
    report.lines()


KEYS = (
    *("field_messages", "field_system", "field_tools", "field_thinking", "message_property_mappings"),
    *("message_field_role", "message_field_training", "roles", "roles_to_train", "data_files"),
    *("file_name", "formatting", "columns", "tags", "ranking", "train_on_eos", "drop_system_message"),
)
ENTRIES = st.fixed_dictionaries(
    {"path": st.just("rows.jsonl") | JSON},
    optional={
        "type": st.sampled_from(["chat_template", "alpaca", "sharegpt"]) | JSON,
        **dict.fromkeys(KEYS, JSON),
    },
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "datasets": st.lists(ENTRIES | JSON, max_size=2) | JSON,
        "dataset": JSON,
        "dataset_dir": JSON,
        "rl": JSON,
    },
)


@FOLDER
@given(CONFIGS | JSON, st.dictionaries(st.sampled_from(["mine", "b"]), ENTRIES | JSON, max_size=2), RECORDS)
def test_no_declaration_ends_in_a_traceback(tmp_path: Path, config: Any, info: Any, record: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), "utf-8")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    for path, names in ((tmp_path / "config.yaml", ()), (tmp_path / "dataset_info.json", ("mine",))):
        with suppress(InputError):
            sources, _ = declared_sources(path, names)
            list(convert(sources, Report(), lossy=LOSSES))
