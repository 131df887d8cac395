"""A type of chunk that a test brings along is read, encoded, shown and imported: no file of the package knows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from each_oracle import oracle_named
from toy_chunk import ASIDE
from toy_kind import POEM

from pytest_mistral_lora.chat.answer_message import AnswerChunk, AnswerMessage
from pytest_mistral_lora.chat.chunks.registry import chunk_types, register_types
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.kinds.registry import KINDS, register_kinds
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile, chunks, in_order
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.mask.row_laws import assistant_text_violation
from pytest_mistral_lora.errors import RowError

ANSWER = [{"type": "text", "text": "Red."}, {"type": "aside", "aside": "or blue", "whispered": True}]
PLAIN = [{"type": "text", "text": "Red."}, {"type": "text", "text": "(or blue)"}]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    register_types([ASIDE.importable])
    yield
    del chunk_types()[ASIDE.name]


def record(*answer: Any, role: str = "assistant") -> dict[str, Any]:
    asked = {"role": "user", "content": "A colour?"}
    last = [{"role": "assistant", "content": "Red."}] if role != "assistant" else []
    return {"messages": [asked, {"role": role, "content": [*answer]}, *last]}


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (record({"type": "aside"}), "messages[1].content[0].aside", "is null"),
        (record({"type": "aside", "aside": "x", "whispered": 1}), "messages[1].content[0].whispered", "1"),
        (record({"type": "aside", "aside": "x", "loud": True}), "messages[1].content[0].loud", "unknown field"),
        (record({"type": "joke"}), "messages[1].content[0].type", "'joke'"),
    ],
)
def test_its_fields_are_checked(data, place, found):
    with pytest.raises(RowError) as error:
        Row.from_dict(data)
    assert (str(error.value.place), error.value.found[: len(found)]) == (place, found)


def test_roles_that_cannot_have_it_are_refused():
    row = record({"type": "aside", "aside": "x"})
    row["messages"].insert(0, {"role": "system", "content": [{"type": "aside", "aside": "x"}]})
    with pytest.raises(RowError) as error:
        Row.from_dict(row)
    assert str(error.value.place) == "messages[0].content[0]"
    assert error.value.expected == "aside of the user or the assistant"


@pytest.mark.parametrize("name", ["spm-v1", "spm-v3", "tekken-cut"])
def test_it_is_encoded_as_it_says(name):
    oracle = oracle_named(name)
    row, plain = Row.from_dict(record(*ANSWER)), Row.from_dict(record(*PLAIN))
    encoded = oracle.encode(row)
    assert encoded == oracle.encode(plain)
    assert encoded.input_ids == oracle.reference(plain)
    assert assistant_text_violation(row, encoded, oracle) == ""
    comparison = compare(row, oracle, CheckpointTokenizer(oracle.path).template)
    assert not comparison.unexplained
    assert comparison.template is not None


def test_it_is_a_part_of_an_answer():
    row = Row.from_dict(record(*ANSWER))
    facts = oracle_named("spm-v3").facts
    [joined] = AnswerMessage.of_last_turn(row, facts).chunks
    assert joined == AnswerChunk(f"Red.{facts.joint}(or blue)")
    assert text_of(row.messages[-1]["content"]) == "Red.\n\n(or blue)"


def rows_of_chunk(plan: None) -> Callable[[Chunk], list[Row]]:
    """Return the work of a process: the row of each line."""

    def work(chunk: Chunk) -> list[Row]:
        return [parse_rows(json.loads(line))[0] for _, line in chunk.lines]

    return work


def test_other_processes_know_it_and_a_kind_of_record(tmp_path):
    path, poem = tmp_path / "rows.jsonl", {"poem": ["Two roads diverged"]}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (record(*ANSWER), poem)), encoding="utf-8")
    register_kinds([POEM.importable])
    try:
        [(rows, _)] = in_order(rows_of_chunk, None, chunks([DataFile(path)], lambda error: None), 2)
    finally:
        del KINDS[POEM.name]
    assert text_of(rows[0].messages[-1]["content"]) == "Red.\n\n(or blue)"
    assert (rows[1].kind, rows[1].to_json()) == (POEM, poem)


def test_it_is_shown_and_imported(tmp_path, capsys):
    path, rows = tmp_path / "rows.jsonl", tmp_path / "imported.jsonl"
    path.write_text(f"{json.dumps(record(*ANSWER))}\n", encoding="utf-8")
    assert main(["render", str(path), "--tokenizer", "spm-v3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["messages"] == record(*ANSWER)["messages"]
    assert shown["input_ids"] == [*oracle_named("spm-v3").encode(record(*PLAIN)).input_ids]
    foreign = record({"type": "output_text", "text": "Red."}, {**ANSWER[1], "id": 7})
    path.write_text(f"{json.dumps(foreign)}\n", encoding="utf-8")
    assert main(["import", str(path), "--to", str(rows), "--lossy", "message-keys"]) == 0
    assert json.loads(rows.read_text(encoding="utf-8")) == record(*ANSWER)
