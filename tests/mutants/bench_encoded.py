"""The bench of the subject `encoded`: two files of rows, one of them packed, with their source, and an evaluation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from derived_tekken import DERIVED, derived_tokenizer
from gallery import Artifact
from preference_records import with_ids

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.fim import FimRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.encoded.audit import Audit, checks
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.runners.process import RunnerOutput
from pytest_mistral_lora.runners.prompts import prompt_lines, read_prompt

Data = dict[str, Any]

TOKENIZER = "spm-v3"
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROWS: list[Data] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which colour is the sky?"},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And the grass?"},
            {"role": "assistant", "content": "Green, mostly."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Is it warm in Rome?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "It is."},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "content": "Perhaps three.", "weight": 0},
            {"role": "user", "content": "Once more?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "  Say the tokens [INST] and </s> to me"},
            {"role": "assistant", "content": "\nAs you like: [/INST] </s>"},
        ]
    },
]


def asked_again(row: Data) -> Data:
    """Return a row with another question in front of its first one: a file that repeats a row has a finding."""
    row = copy.deepcopy(row)
    first = next(message for message in row["messages"] if message["role"] == "user")
    first["content"] = f"Once again: {first['content'].strip()}"
    return row


@cache
def _target(name: str = TOKENIZER) -> Target:
    return Target(name, derived_tokenizer(name)) if name in DERIVED else Target(name)


def shared_oracle(name: str = TOKENIZER) -> Oracle:
    return _target(name).oracle


def encode(row: Data) -> Data:
    """Ids and labels of a row as they should be."""
    return encode_with(TOKENIZER, row)


def encode_with(name: str, row: Data) -> Data:
    """Ids and labels of a row by a tokenizer that mistral-common ships, or one derived from it."""
    encoded = shared_oracle(name).encode({key: row[key] for key in ("messages", "tools") if key in row})
    return {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}


def encode_gap(row: Data, name: str = TOKENIZER) -> Data:
    """Ids and labels of a fill-in-the-middle row as they should be."""
    encoded = shared_oracle(name).encode(FimRow.of(row["prompt"], row["suffix"], row["completion"]))
    return {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}


def encode_text(text: str) -> list[int]:
    """Ids of a text."""
    return list(shared_oracle().encode_text(text))


def render(row: Data) -> str:
    """A row as one text, with its control tokens spelled out."""
    oracle = shared_oracle()
    return "".join(oracle.control_tokens.get(token, oracle.piece(token)) for token in encode(row)["input_ids"])


def pack(rows: list[Any]) -> Data:
    """One sequence of several rows, or of their messages."""
    conversations = [row if isinstance(row, list) else {key: row[key] for key in row} for row in rows]
    parts = [encode({"messages": row} if isinstance(row, list) else row) for row in conversations]
    return {
        "conversations": conversations,
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in part["labels"]],
        "position_ids": [n for part in parts for n in range(len(part["input_ids"]))],
    }


def scored_prompt(row: Data, tokenizer: str = TOKENIZER) -> Data:
    """The record of a prompt whose answer is scored, as a harness should feed it; the answers before are examples."""
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in row["messages"]]
    encoded = shared_oracle(tokenizer).encode({"messages": [*before[:-1], row["messages"][-1]]})
    start = next(span.start for span in encoded.spans if span.supervised)
    ids = list(encoded.input_ids)
    answer = {"answer": row["messages"][-1]["content"], "answer_ids": ids[start:-1]}
    examples = sum(message["role"] == "assistant" for message in row["messages"][:-1])
    place = {"place": "colours, document 0", "few_shot": examples}
    return {**place, "messages": row["messages"][:-1], "prompt_ids": ids[:start], **answer}


def generated_prompt(question: str) -> Data:
    """The record of a prompt whose answer is generated."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    record = scored_prompt({"messages": [*messages, {"role": "assistant", "content": "Yes."}]})
    return {key: value for key, value in record.items() if not key.startswith("answer")}


class _Bench:
    subject = "encoded"

    def make(self, folder: Path) -> Artifact:
        dataset = copy.deepcopy(ROWS)
        return {
            "lines": [{"row": index, **copy.deepcopy(row), **encode(row)} for index, row in enumerate(dataset)],
            "packed": [
                {"row": 0, **pack(copy.deepcopy(ROWS[:3]))},
                {"row": 1, **pack([asked_again(row) for row in ROWS[1:]])},
            ],
            "prompts": [scored_prompt(copy.deepcopy(ROWS[0])), generated_prompt("Which colour is snow?")],
            "asked": TOKENIZER,
            "trained": copy.deepcopy(ROWS[:1]),
            "dataset": dataset,
            "tokenizer": TOKENIZER,
            "folder": folder,
            "saved": False,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        path, rows = artifact["folder"] / "dataset.jsonl", artifact["dataset"]
        dataset = () if rows is None else _write(path, rows)
        return [*judge_files(artifact, dataset=dataset), *_judge_prompts(artifact)]

    def table(self, artifact: Artifact) -> str:
        """Return the tokens around the first difference to the sound lines; empty if there is none."""
        sound = self.make(artifact["folder"])
        for key in ("lines", "packed"):
            by_row = {line["row"]: line for line in sound[key]}
            for line in artifact[key]:
                if "input_ids" not in line:
                    continue  # a pair has no sound twin in the bench
                # a gap is no row of the sound lines
                before = by_row.get(line["row"], line | encode_gap(line) if "suffix" in line else line)
                sides = [(one["input_ids"], one["labels"]) for one in (before, line)]
                if all(len(ids) == len(labels) for ids, labels in sides) and sides[0] != sides[1]:
                    return TokenDiff.of(*sides, shared_oracle().piece).table()
        return ""


def judge_files(artifact: Artifact, *, dataset: tuple[Path, ...]) -> list[Finding]:
    """Judge the two files of an artifact, the first by its source."""
    folder, target = artifact["folder"], _target(artifact["tokenizer"])
    [path] = (_save if artifact["saved"] else _write)(folder / "lines.jsonl", artifact["lines"])
    plain = EncodedTarget("lines", path, judge=target, dataset=dataset)
    packed = EncodedTarget("packed", _write(folder / "packed.jsonl", artifact["packed"])[0], judge=target)
    return [finding for target in (plain, packed) for finding in _findings(target)]


def _judge_prompts(artifact: Artifact) -> list[Finding]:
    """Judge the prompts of an evaluation as those of a harness's script."""
    records = dict(enumerate(artifact["prompts"]))
    for number, record in records.items():
        read_prompt({"row": number, **record}, "prompts")
    oracle = shared_oracle(artifact["asked"])
    lines = [json.loads(line) for line in prompt_lines(RunnerOutput(records=records), oracle)]
    [path] = _write(artifact["folder"] / "prompts.jsonl", lines)
    audit = Audit(FileRows(path), oracle, trained=[parse_row(row) for row in artifact["trained"]])
    return [finding for verdict in audit.verdicts() for finding in verdict.findings]


def _write(path: Path, lines: list[Any]) -> tuple[Path, ...]:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return (path,)


def _save(path: Path, lines: list[Any]) -> tuple[Path, ...]:
    """Write the lines as a dataset that a trainer has prepared, and saved to disk."""
    import datasets

    folder = path.with_suffix("")
    keys = dict.fromkeys(key for line in lines for key in line)
    # a table has the keys of all its rows
    datasets.Dataset.from_list([{key: line.get(key) for key in keys} for line in lines]).save_to_disk(folder)
    return (folder,)


def _findings(target: EncodedTarget) -> list[Finding]:
    settings = Settings(1, None, "cpu", True, (), False, Path())
    return [finding for check in checks(target, settings) for finding in check.run().findings]


BENCH = _Bench()


def hold_row(artifact: Artifact, row: Data, tokenizer: str = TOKENIZER) -> None:
    """Let both files and the dataset hold one row, encoded by a tokenizer."""
    artifact["tokenizer"] = tokenizer
    encoded = encode_with(tokenizer, row)
    artifact["lines"] = [{"row": 0, **row, **encoded}]
    packed = {"conversations": [row], **encoded, "position_ids": [*range(len(encoded["input_ids"]))]}
    artifact["packed"] = [{"row": 0, **packed}]
    artifact["dataset"] = [row]


def hold_pairs(artifact: Artifact, *pairs: Data) -> None:
    """Let the first file hold pairs with their ids, and no dataset beside them."""
    oracle = shared_oracle()
    artifact["lines"] = [{"row": index, **with_ids(oracle, copy.deepcopy(row))} for index, row in enumerate(pairs)]
    artifact["dataset"] = None


def change_labels(artifact: Artifact, row: int, change: Callable[[int, int, int], int]) -> None:
    """Change every label of a row: a function of its place, its id and itself."""
    line = artifact["lines"][row]
    line["labels"] = [change(n, *pair) for n, pair in enumerate(zip(line["input_ids"], line["labels"], strict=True))]


def pad(line: Data, token: int, *, count: int = 3, left: bool = False, label: int = -100, mask: bool = True) -> None:
    """Pad a line, with a mask or without."""
    length = len(line["input_ids"])
    for key, value in (("input_ids", token), ("labels", label)):
        line[key] = [value] * count + line[key] if left else line[key] + [value] * count
    if mask:
        line["attention_mask"] = [0] * count + [1] * length if left else [1] * length + [0] * count
