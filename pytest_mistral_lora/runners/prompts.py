"""The prompts of an evaluation as encoded rows: what the harness feeds a model, and behind it a whole answer.

The script of an evaluation writes a record for each prompt: `row`, its number from 0 on; `place`, its task and
document; `prompt_ids`; `few_shot`, the number of examples in the prompt; `messages`, the chat that the prompt is made
of, without an answer, or no such key if it is made of a text; and if an answer is scored `answer` and `answer_ids`,
else no such keys. mistral-common encodes whole answers, so an answer that is generated is its own, and each answer
gets its EOS: only the prompt and the scored tokens can differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, unscored
from pytest_mistral_lora.errors import RowError, RunnerError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.runners.process import RunnerOutput, integers, row_number

NO_CHAT = "the prompt is a text, and no chat"
_ANSWER = "Yes."
"""Stands for an answer that the model would generate."""


def read_prompt(data: Any, place: Place) -> tuple[int, Mapping[str, Any]]:
    """Return the number and the content of a prompt's record; see `process.ReadRecord`."""
    number = row_number(data, place)
    integers(data, "prompt_ids", place)
    kinds: dict[str, type] = {"place": str, "few_shot": int}
    kinds |= {key: kind for key, kind in {"messages": list, "answer": str}.items() if key in data}
    for key, kind in kinds.items():
        if type(data.get(key)) is not kind:
            raise RunnerError(f"{key} is {data.get(key)!r:.80}", place=place, expected=f"of type {kind.__name__}")
    if "answer" in data:
        integers(data, "answer_ids", place)
    if not all(isinstance(message, Mapping) for message in data.get("messages", ())):
        raise RunnerError("a message is no object", place=place, expected="messages of role and content")
    return number, data


def prompt_lines(output: RunnerOutput, oracle: Oracle) -> Iterator[str]:
    """Yield a line of an encoded-rows file for each prompt, in order."""
    for number, record in sorted(output.records.items()):
        facts = {"place": record["place"], "few_shot": record["few_shot"]}
        yield json.dumps({"row": number, "evaluation": facts, **_encoded(record, oracle)}, ensure_ascii=False)


def prompt_rows(file: Path) -> list[Row]:
    """Return the chat of each prompt of an encoded-rows file, with its task and document as its place."""
    lines = [item[1] for item in scan_jsonl(file, encoded=True) if not isinstance(item, RowError)]
    return [Row(tuple(line.get("messages", ())), place=NOWHERE / line["evaluation"]["place"]) for line in lines]


def _encoded(record: Mapping[str, Any], oracle: Oracle) -> dict[str, Any]:
    """Return the messages, ids and labels of a prompt with its answer, or an error."""
    if record.get("messages") is None:
        return {"error": NO_CHAT}
    messages = unscored(record["messages"])
    answer = record.get("answer", _ANSWER)
    answer_ids = record.get("answer_ids")
    if messages and messages[-1]["role"] == "assistant":
        # the harness begins the answer (gen_prefix), and the model goes on with it
        answer, answer_ids = f"{messages.pop()['content']}{record.get('answer', '')}", answer_ids or []
    if oracle.kind == "spm":
        # SentencePiece encodes an answer with a space in front, so a text behind the marker needs that space
        answer = answer.removeprefix(" ")
    messages.append({"role": "assistant", "content": answer})
    try:
        expected = oracle.encode(parse_row({"messages": messages}))
    except RowError:
        # the audit says why
        ids = [*record["prompt_ids"], *(answer_ids or ()), oracle.eos_id]
        return {"messages": messages, "input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}
    if answer_ids is None:
        start = next(span.start for span in expected.spans if span.supervised)
        answer_ids = list(expected.input_ids[start:-1])
    ids = [*record["prompt_ids"], *answer_ids, oracle.eos_id]
    # a harness has no labels: they are those of a trainer that scores the same tokens
    labels = [IGNORE_INDEX] * len(record["prompt_ids"]) + [*answer_ids, oracle.eos_id]
    if ids == list(expected.input_ids) and expected.labels is not None:
        labels = list(expected.labels)
    return {"messages": messages, "input_ids": ids, "labels": labels}
