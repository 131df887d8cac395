"""Encoded preference pairs with a fault of a side, or of both sides together."""

from __future__ import annotations

from collections.abc import Callable

from bench_encoded import CALL, TOOL, Data, encode_text, hold_pairs
from gallery import Artifact, mutant
from preference_records import kto, pair, said, texts_pair

LONG = "Yes, that is so, and for more than one reason, as far as I know."
COUNT = 10
"""The pairs of a file whose lengths are compared."""


def asked(chosen: str = "Blue, mostly.", rejected: str = "I do not know.") -> Data:
    """A pair whose prompt has an answer of its own."""
    history = [said("user", "Which colour is grass?"), said("assistant", "Green."), said("user", "And the sky?")]
    return pair(history, [said("assistant", chosen)], [said("assistant", rejected)])


def _of_two_prompts(artifact: Artifact) -> None:
    """Write the pair as ORPO does: each answer behind a prompt of its own."""
    [record] = artifact["lines"]
    prompt = record.pop("prompt_ids")
    for name in ("chosen", "rejected"):
        ids = record.pop(f"{name}_ids")
        record[f"{name}_input_ids"] = prompt + ids
        record[f"{name}_labels"] = [-100] * len(prompt) + ids


def hold_two_prompts(artifact: Artifact, change: Callable[[list[int]], list[int]]) -> None:
    """Hold a pair in the form of ORPO, with a change of the ids before its rejected answer."""
    hold_pairs(artifact, asked())
    _of_two_prompts(artifact)
    record = artifact["lines"][0]
    start = sum(label == -100 for label in record["rejected_labels"])
    prompt = change(record["rejected_input_ids"][:start])
    record["rejected_input_ids"][:start] = prompt
    record["rejected_labels"][:start] = [-100] * len(prompt)


def hold_cut(artifact: Artifact, length: int) -> None:
    """Hold a pair whose answers are cut after some tokens."""
    hold_pairs(artifact, asked("It is the colour of a clear sea.", "It is the colour of a ripe lemon."))
    for key in ("chosen_ids", "rejected_ids"):
        artifact["lines"][0][key] = artifact["lines"][0][key][:length]


@mutant("ML565 ML534", says="before the rejected one")
def another_question_before_the_rejected_answer(artifact: Artifact) -> None:
    """The rejected answer of a pair is encoded behind another question."""
    sky, sea = encode_text("And the sky?"), encode_text("And the sea?")
    hold_two_prompts(artifact, lambda prompt: [*prompt[: -len(sky) - 1], *sea, prompt[-1]])


@mutant("ML655", says="both answers are")
def pair_that_differs_in_a_space(artifact: Artifact) -> None:
    """The rejected answer of a pair is the chosen one with a space at its end."""
    hold_pairs(artifact, asked("Blue, mostly.", "Blue,  mostly."))


@mutant("ML655")
def pair_of_one_answer(artifact: Artifact) -> None:
    """The rejected answer of a pair is the chosen one."""
    hold_pairs(artifact, asked("Blue, mostly.", "Blue, mostly."))


@mutant("ML567", says="nothing but EOS")
def pair_whose_rejected_answer_is_empty(artifact: Artifact) -> None:
    """The rejected answer of a pair is EOS alone."""
    hold_pairs(artifact, asked())
    artifact["lines"][0] |= {"rejected": [said("assistant", "")], "rejected_ids": [2]}


@mutant("ML567 ML531 ML544 ML506", "I06", says="the answer has no token")
def pair_whose_answers_are_cut_away(artifact: Artifact) -> None:
    """The maximal length of a pair ends with its prompt."""
    hold_cut(artifact, 0)


@mutant("ML568 ML531 ML506", says="nothing is left of their difference")
def pair_cut_before_it_differs(artifact: Artifact) -> None:
    """The maximal length of a pair ends before its answers differ."""
    hold_cut(artifact, 5)


@mutant("ML531 ML506", "N147", says="cut at the end")
def rejected_answer_that_is_cut(artifact: Artifact) -> None:
    """The rejected answer of a pair is cut, and the chosen one is whole."""
    hold_pairs(artifact, asked(rejected=LONG))
    artifact["lines"][0]["rejected_ids"] = artifact["lines"][0]["rejected_ids"][:5]


@mutant("ML553", "N148", says="a second </s> stands behind an answer's own")
def second_eos_behind_both_answers(artifact: Artifact) -> None:
    """The template closes an answer, and the trainer puts EOS behind it once more."""
    hold_pairs(artifact, asked())
    for key in ("chosen_ids", "rejected_ids"):
        artifact["lines"][0][key].append(2)


@mutant("ML547", says="of: tool")
def result_of_a_tool_is_scored(artifact: Artifact) -> None:
    """The chosen side is a call, its result and an answer, and each of its tokens is scored."""
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sky": "clear"}'}
    chosen = [{"role": "assistant", "tool_calls": [CALL]}, result, said("assistant", "It is.")]
    hold_pairs(artifact, pair([said("user", "Is it warm?")], chosen, [said("assistant", "I cannot know.")], [TOOL]))


@mutant("ML545", says="the first of an answer, is masked")
def first_token_of_an_answer_in_the_prompt(artifact: Artifact) -> None:
    """Prompt and answer are cut one token too late, where both answers have the same token."""
    hold_pairs(artifact, asked("It is blue.", "It is a bird."))
    record = artifact["lines"][0]
    record["prompt_ids"].append(record["chosen_ids"][0])
    for key in ("chosen_ids", "rejected_ids"):
        del record[key][0]


@mutant("ML547", says="of: user")
def last_token_of_the_prompt_in_the_answers(artifact: Artifact) -> None:
    """Prompt and answer are cut one token too early."""
    hold_pairs(artifact, asked())
    record = artifact["lines"][0]
    token = record["prompt_ids"].pop()
    for key in ("chosen_ids", "rejected_ids"):
        record[key].insert(0, token)


@mutant("ML523", says="text became the control token </s>")
def text_of_a_prompt_becomes_a_token(artifact: Artifact) -> None:
    """The prompt is tokenized with its markers, and `</s>` in the user's text becomes EOS."""
    hold_pairs(artifact, texts_pair("What is </s> for?", "It ends an answer.", "Nothing."))
    record = artifact["lines"][0]
    record["prompt_ids"] = [1, 3, *encode_text("What is"), 2, *encode_text(" for?"), 4]


@mutant("ML505", says="the label is not that of row 1")
def label_of_an_answer_is_turned(artifact: Artifact) -> None:
    """The label of a rated answer is true, and false in the dataset."""
    hold_pairs(artifact, asked())
    lines = [record | {"row": number} for number, record in enumerate(kto(artifact["lines"][0]))]
    artifact["dataset"] = [{key: line[key] for key in ("prompt", "completion", "label")} for line in lines]
    artifact["lines"] = [line | {"label": True} for line in lines]
