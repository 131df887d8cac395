"""Rows that are there twice, on one side of a split or on both."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench_dataset import HELD_OUT, arguments_of, parameters_of, said, turn_of
from gallery import Artifact, mutant


@mutant("ML608", says="the row is there 2 times")
def row_twice(artifact: Artifact) -> None:
    """A row is there twice; a weight that is spelled out does not make it another."""
    copy = json.loads(json.dumps(artifact["rows"][0]))
    copy["messages"][1]["weight"] = 1
    artifact["rows"].append(copy)


@mutant("ML608", says="the row is there 2 times")
def file_named_twice(artifact: Artifact) -> None:
    """The recipe names its file twice."""
    artifact["recipe"]["data"]["train"] *= 2


@mutant("ML609", says="with another answer")
def two_answers(artifact: Artifact) -> None:
    """One question has two answers."""
    artifact["rows"].append(said("Name a prime number.", "Eleven."))


@mutant("ML610", says="the row is also trained on")
def held_out_row_is_trained_on(artifact: Artifact) -> None:
    """A row of the eval file is among the training rows, written with its keys in another order."""
    row = {key: artifact["held_out"][0][key] for key in reversed(artifact["held_out"][0])}
    artifact["rows"].append(row)


@mutant("ML610 ML608", says="the row is also trained on")
def split_by_hash_of_equal_rows(artifact: Artifact) -> None:
    """Copies of a row that differ in a spelled-out weight fall on both sides of a split by hash."""
    artifact["recipe"]["data"] = {"train": ["rows.jsonl"], "held_out": 0.5}
    for row in list(artifact["rows"]):
        for keys in ({"weight": 1}, {"weight": None}):
            messages = [message | (keys if message["role"] == "assistant" else {}) for message in row["messages"]]
            artifact["rows"].append({**row, "messages": messages})


@mutant("ML611", says="the prompt is also trained on")
def held_out_prompt_is_trained_on(artifact: Artifact) -> None:
    """The question of a held-out row begins a conversation that is trained on."""
    artifact["held_out"].append(said("How many legs has a spider?", "It has eight legs."))


@mutant("ML615", says="holds out none")
def split_without_held_out_rows(artifact: Artifact) -> None:
    """The fraction is too small for the number of rows."""
    artifact["recipe"]["data"] = {"train": ["rows.jsonl"], "held_out": 0.001}


def _held_out_in_another_form(artifact: Artifact, change: Callable[[str], str]) -> None:
    row = json.loads(json.dumps(HELD_OUT[0]))
    for message in row["messages"]:
        message["content"] = change(message["content"])
    artifact["rows"].append(row)


@mutant("ML632", "N26", says="the row is also trained on, in another form")
def held_out_but_for_a_space(artifact: Artifact) -> None:
    """A held-out row is trained on with a space and a line break more."""
    _held_out_in_another_form(artifact, lambda text: f" {text}\n".replace(" the", "  the"))


@mutant("ML632", "N26", says="the row is also trained on, in another form")
def held_out_but_for_case_and_punctuation(artifact: Artifact) -> None:
    """A held-out row is trained on in capitals, with other punctuation."""
    _held_out_in_another_form(artifact, lambda text: text.upper().rstrip(".?") + " !")


@mutant("ML632", "N26", says="the row is also trained on, in another form")
def held_out_but_for_emphasis(artifact: Artifact) -> None:
    """A held-out row is trained on with a word in bold."""
    _held_out_in_another_form(artifact, lambda text: text.replace(text.split()[0], f"**{text.split()[0]}**", 1))


@mutant("ML632", "N26", says="the row is also trained on, in another form")
def held_out_but_for_the_order_of_arguments(artifact: Artifact) -> None:
    """A held-out row is trained on with the arguments of its call in another order, and in capitals."""
    parameters_of(artifact)["properties"]["day"] = {"type": "string"}
    arguments_of(artifact)["day"] = "monday"
    artifact["held_out"].append(json.loads(json.dumps(artifact["rows"][4])))
    call = turn_of(artifact, 4, 1)["tool_calls"][0]["function"]
    call["arguments"] = {"day": "Monday", "city": call["arguments"]["city"]}


@mutant("ML632", "N26", says="the row is also trained on, in another form")
def held_out_but_for_its_unicode_form(artifact: Artifact) -> None:
    """A held-out row is trained on with its accents composed, and in wide letters."""
    artifact["held_out"][0]["messages"][0]["content"] = "Was ist ein Cafe\u0301?"
    row = json.loads(json.dumps(artifact["held_out"][0]))
    row["messages"][0]["content"] = "Was ist ein \uff23af\u00e9?"
    artifact["rows"].append(row)


LONG = (
    "How do I return a lamp that came with a broken shade, if I threw away the box that it was in two weeks ago? "
    "I still have the bill and a picture of the shade, but the shop where I bought it has been closed since then.",
    "Send us the picture of the shade and the number of the bill, and we will mail you a label and a box for the lamp. "
    "Once it is here we will repair it or send you a new one, and you do not have to go to a shop for that.",
)


def _nearly_held_out(artifact: Artifact, *texts: str) -> None:
    artifact["held_out"].append(said(*LONG))
    artifact["rows"].append(said(*texts))


@mutant("ML633", "N26", says="nearly the same row is trained on")
def held_out_but_for_a_word_of_the_question(artifact: Artifact) -> None:
    """A held-out row is trained on with one word of its question changed."""
    _nearly_held_out(artifact, LONG[0].replace("broken", "cracked"), LONG[1])


@mutant("ML633", "N26", says="nearly the same row is trained on")
def held_out_but_for_words_of_both_texts(artifact: Artifact) -> None:
    """A held-out row is trained on with another word in its question and in its answer, in capitals."""
    _nearly_held_out(artifact, LONG[0].replace("weeks", "days").upper(), LONG[1].replace("mail", "post"))


@mutant("ML633", "N26", says="nearly the same row is trained on")
def held_out_but_for_its_system_prompt(artifact: Artifact) -> None:
    """A held-out row is trained on with another system prompt."""
    artifact["held_out"].append(said(*LONG))
    artifact["rows"].append(said(*LONG, system="You are the assistant of a shop."))
