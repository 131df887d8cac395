from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from pytest_mistral_lora.chat.oracle import Oracle

Conversation = list[str]


@cache
def english_conversations() -> tuple[Conversation, ...]:
    folder = files("chatterbot_corpus") / "data" / "english"
    documents = [
        yaml.safe_load(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name[-4:] == ".yml"
    ]
    return tuple(said for document in documents for said in map(as_texts, document["conversations"]) if said)


def as_texts(conversation: list[Any]) -> Conversation:
    """Whole exchanges only; YAML reads some answers as numbers or booleans."""
    return [text for text in map(str, conversation) if text.strip(" ")][: len(conversation) // 2 * 2]


def as_row(conversation: Conversation) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(conversation)
        ]
    }


def test_the_corpus_is_all_there() -> None:
    assert len(english_conversations()) > 1900
    assert max(map(len, english_conversations())) >= 4


def test_every_answer_of_a_real_corpus_survives_the_round_trip(oracle: Oracle) -> None:
    for conversation in english_conversations():
        encoded = oracle.encode(as_row(conversation))
        assert list(supervised_texts(oracle, encoded)) == [kept(oracle, text) for text in conversation[1::2]]


def supervised_texts(oracle: Oracle, encoded: Any) -> Iterator[str]:
    """Split the labels at EOS and decode, without a look at the spans."""
    answer: list[int] = []
    for label in encoded.labels:
        if label == oracle.eos_id:
            yield oracle.decode(answer)
            answer = []
        elif label != -100:
            answer.append(label)
    assert not answer


def kept(oracle: Oracle, text: str) -> str:
    return text if oracle.version == "v1" else text.rstrip(" ")


def test_a_round_trip_notices_a_label_that_is_lost(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v3")
    conversation = english_conversations()[0]
    encoded = oracle.encode(as_row(conversation))
    first = next(index for index, label in enumerate(encoded.labels or ()) if label != -100)
    labels = (*(encoded.labels or ())[:first], -100, *(encoded.labels or ())[first + 1 :])
    lost = type(encoded)(encoded.input_ids, labels, encoded.spans)
    assert list(supervised_texts(oracle, lost)) != conversation[1::2]
