"""The prompts of an evaluation as encoded rows, by any script that makes them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_mistral_lora import strategies
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners.extract import extract_prompts
from pytest_mistral_lora.runners.process import RunnerOutput
from pytest_mistral_lora.runners.prompts import prompt_lines, read_prompt
from pytest_mistral_lora.runners.trainer import NOTHING, Trainer

CHAT = [{"role": "user", "content": "Which colour is the sky?"}]
TOKENIZERS = ("spm-v1", "spm-v3", "spm-v7", "tekken-240911")


def oracle_of(name: str) -> Oracle:
    return converted_tokenizer(name).oracle


def audited(records: list[dict[str, Any]], oracle: Oracle, folder: Path) -> dict[str, int]:
    """Judge the records of a script, and return the number of findings by rule."""
    file = folder / "prompts.jsonl"
    read = dict(read_prompt({"row": number, **record}, Place.of("prompts")) for number, record in enumerate(records))
    file.write_text("".join(f"{line}\n" for line in prompt_lines(RunnerOutput(records=read), oracle)))
    audit = Audit(FileRows(file), oracle)
    assert sum(1 for _ in audit.verdicts()) == len(records) + 1
    return dict(audit.counts)


def asked(chat: list[dict[str, Any]], answer: str, oracle: Oracle) -> dict[str, Any]:
    """Return the record of a scored answer, as mistral-common encodes it."""
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in chat]
    encoded: EncodedRow = oracle.encode({"messages": [*before, {"role": "assistant", "content": answer}]})
    start = next(span.start for span in encoded.spans if span.supervised)
    ids = list(encoded.input_ids)
    record = {"place": "task, document 0", "few_shot": sum(message["role"] == "assistant" for message in chat)}
    return {
        **record,
        "messages": chat,
        "prompt_ids": ids[:start],
        "answer": answer,
        "answer_ids": ids[start:-1],
    }


@given(row=strategies.rows(), name=st.sampled_from(TOKENIZERS))
def test_what_mistral_common_encodes_is_sound(
    row: dict[str, Any], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    *chat, last = row["messages"]
    assume(last["role"] == "assistant" and not last["content"][:1].isspace())
    scored = {**asked(chat, last["content"], oracle_of(name)), "few_shot": 0}
    generated = {key: value for key, value in scored.items() if not key.startswith("answer")}
    assert audited([scored, generated], oracle_of(name), tmp_path_factory.mktemp("prompts")) == {}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_that_the_harness_begins_is_judged_as_a_whole(name: str, tmp_path: Path) -> None:
    oracle = oracle_of(name)
    whole = asked(CHAT, "It is blue.", oracle)
    begun = len(oracle.encode({"messages": [*CHAT, {"role": "assistant", "content": "It"}]}).input_ids) - 1
    ids = whole["prompt_ids"] + whole["answer_ids"]
    chat = [*CHAT, {"role": "assistant", "content": "It"}]
    scored = {**whole, "messages": chat, "prompt_ids": ids[:begun], "answer": " is blue.", "answer_ids": ids[begun:]}
    generated = {key: value for key, value in scored.items() if not key.startswith("answer")}
    assert audited([scored, generated], oracle, tmp_path) == {}
    generated["prompt_ids"] = [*generated["prompt_ids"], oracle.eos_id]
    assert audited([generated], oracle, tmp_path) != {}


def test_a_chat_that_mistral_common_refuses_is_named(tmp_path: Path) -> None:
    oracle = oracle_of("spm-v3")
    record = asked(CHAT, "Blue.", oracle)
    answer = {"role": "assistant", "content": "Blue."}
    refused = {**record, "messages": [*CHAT, answer, {"role": "system", "content": "Be brief."}, *CHAT]}
    assert audited([refused], oracle, tmp_path) == {"ML507": 1}
    unknown = {**record, "messages": [{"role": "speaker", "content": "Hi"}]}
    assert audited([unknown], oracle, tmp_path) == {"ML501": 1}


def script_runner(folder: Path, body: str) -> Trainer:
    """Return the runner of a script that writes its records by the interface."""
    head = """\
        import argparse, json
        parser = argparse.ArgumentParser()
        for name in ("rows", "checkpoint", "config", "output"):
            parser.add_argument(f"--{name}")
        given = parser.parse_args()
        sound = {"row": 0, "place": "task, document 0", "few_shot": 0, "prompt_ids": [1, 3, 4]}
        def write(*records):
            with open(given.output, "w") as output:
                output.writelines(json.dumps(record) + "\\n" for record in records)
        """
    script = folder / "harness.py"
    script.write_text(textwrap.dedent(head) + body)
    return Trainer("harness", "My harness", "", "", script, NOTHING, "", NOTHING, is_evaluation=True)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("write({**sound, 'row': True})", "True"),
        ("write({**sound, 'prompt_ids': None})", "prompt_ids is None"),
        ("write({**sound, 'place': 3})", "place is 3"),
        ("write({**sound, 'few_shot': '2'})", "few_shot is '2'"),
        ("write({**sound, 'messages': ['Hi']})", "a message is no object"),
        ("write({**sound, 'answer': 'Yes'})", "answer_ids is None"),
        ("write({'note': 'no documents'})", r"it made no prompt \(no documents\)"),
    ],
)
def test_a_script_that_breaks_the_interface_is_an_error(body: str, found: str, tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    config.write_text("tasks: [task]\n")
    tokenizer = converted_tokenizer("spm-v3").path
    with pytest.raises(RunnerError, match=found):
        extract_prompts(script_runner(tmp_path, body), tokenizer, tmp_path / "out.jsonl", config=config)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_tasks_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="has no tasks of its own; expected a configuration with tasks"):
        extract_prompts(script_runner(tmp_path, ""), tmp_path, tmp_path / "out.jsonl", config=None)


def test_prompts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    config.write_text("tasks: [task]\n")
    body = "write({**sound, 'row': 1}, {'environment': {'mine': '1.0'}}, sound)"
    tokenizer = converted_tokenizer("spm-v3").path
    made = extract_prompts(script_runner(tmp_path, body), tokenizer, tmp_path / "out.jsonl", config=config)
    assert [json.loads(line)["row"] for line in made.file.read_text().splitlines()] == [0, 1]
    assert made.environment == {"mine": "1.0"}
