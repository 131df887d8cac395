"""Prompts of an evaluation that a harness feeds otherwise than the model was trained."""

from __future__ import annotations

import copy

from bench_encoded import ROWS, encode_text, scored_prompt, shared_oracle
from gallery import Artifact, mutant


@mutant("ML521", "N146", says="BOS is there 2 times")
def prompts_with_two_bos(artifact: Artifact) -> None:
    """The harness puts BOS in front of a text that the template has begun with BOS."""
    for record in artifact["prompts"]:
        record["prompt_ids"].insert(0, record["prompt_ids"][0])


@mutant("ML525", says="the system prompt is not there")
def prompts_without_the_system_prompt_of_their_task(artifact: Artifact) -> None:
    """The template has refused the system prompt, and the harness has rendered the chat without it."""
    record = artifact["prompts"][1]
    without = scored_prompt({"messages": [*record["messages"][1:], {"role": "assistant", "content": "Yes."}]})
    record["prompt_ids"] = without["prompt_ids"]


@mutant("ML580", says="the prompt is a text, and no chat")
def prompts_without_the_chat_template(artifact: Artifact) -> None:
    """The harness feeds the text of the task as it is."""
    for record in artifact["prompts"]:
        text = "\n\n".join(message["content"] for message in record.pop("messages"))
        record["prompt_ids"] = [1, *encode_text(text)]


@mutant("ML581", says="1 example in the turn of the question")
def examples_in_the_turn_of_the_question(artifact: Artifact) -> None:
    """The harness joins the examples and the question to one message."""
    system, *turns = copy.deepcopy(ROWS[0]["messages"])
    text = "\n\n".join(message["content"] for message in turns[:-1])
    artifact["prompts"][0] = scored_prompt({"messages": [system, {"role": "user", "content": text}, turns[-1]]})
    artifact["prompts"][0]["few_shot"] = 1


@mutant("ML582", says="the scored answer begins with white space: ' Green, mostly.'")
def scored_answer_behind_a_space(artifact: Artifact) -> None:
    """The task puts its delimiter between the template's last marker and the answer."""
    row = copy.deepcopy(ROWS[0])
    row["messages"][-1]["content"] = " Green, mostly."
    # SentencePiece has learned an answer with a space in front
    artifact["asked"] = "tekken-240911"
    artifact["prompts"] = [scored_prompt(row, "tekken-240911")]


@mutant("ML528", says="after [/INST]: 'Green, mostly.', expected ' Green, mostly.'")
def scored_answer_without_the_space_of_sentencepiece(artifact: Artifact) -> None:
    """The harness puts the choice straight behind [/INST], and SentencePiece has learned it with a space in front."""
    record = artifact["prompts"][0]
    record["answer_ids"] = [shared_oracle().encode_text("\nGreen")[-1], *record["answer_ids"][1:]]


@mutant("ML583", says="2 of 2 prompts have a system prompt that no row is trained with, or none")
def prompts_without_the_system_prompt_of_training(artifact: Artifact) -> None:
    """The model was trained with a system prompt, and the evaluation has none."""
    for record in artifact["prompts"]:
        answer = {"role": "assistant", "content": record.get("answer", "Yes.")}
        record |= scored_prompt({"messages": [*record["messages"][1:], answer]})
