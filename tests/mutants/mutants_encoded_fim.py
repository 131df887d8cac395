"""Fill-in-the-middle rows that a trainer has laid out or cut otherwise than mistral-common."""

from __future__ import annotations

from typing import Any

from bench_encoded import TOKENIZER, encode, encode_gap, encode_text, shared_oracle
from gallery import Artifact, mutant

GAP = {"prompt": "def add(a, b):\n    ", "suffix": "return total\n", "completion": "total = a + b\n    "}
WORD = {"prompt": "The sky is bl", "suffix": "today.", "completion": "ue "}
BOS, EOS = 1, 2


def add_gap(artifact: Artifact, row: dict[str, str] = GAP, **encoded: Any) -> dict[str, Any]:
    """Add a fill-in-the-middle row to the lines and to their source, and return its line."""
    line = {"row": len(artifact["lines"]), **row, **encode_gap(row), **encoded}
    artifact["lines"].append(line)
    artifact["dataset"].append(dict(row))
    return line


def marker(name: str) -> int:
    return shared_oracle().control_ids[f"[{name}]"]


def laid_out(before: list[int], completion: list[int]) -> dict[str, list[int]]:
    """Return the ids and labels of a completion with EOS, behind other ids."""
    answer = [*completion, EOS]
    return {"input_ids": [*before, *answer], "labels": [-100] * len(before) + answer}


def completion_ids(row: dict[str, str] = GAP) -> list[int]:
    """Return the ids of a completion without EOS, as they should be."""
    return [label for label in encode_gap(row)["labels"] if label not in (-100, EOS)]


@mutant("ML575", "N181", says="[PREFIX] comes before [SUFFIX]")
def the_prompt_before_the_suffix(artifact: Artifact) -> None:
    """The parts are in the order of StarCoder: prefix, suffix, middle."""
    before = [BOS, marker("PREFIX"), *encode_text(GAP["prompt"]), marker("SUFFIX"), *encode_text(GAP["suffix"])]
    add_gap(artifact, **laid_out(before, completion_ids()))


@mutant("ML575", "N181", says="[MIDDLE] stands before")
def a_marker_before_the_completion(artifact: Artifact) -> None:
    """The completion follows [MIDDLE]."""
    line = add_gap(artifact)
    start = line["labels"].count(-100)
    line["input_ids"].insert(start, marker("MIDDLE"))
    line["labels"].insert(start, -100)


@mutant("ML576", says="the prompt follows [SUFFIX]")
def prompt_and_suffix_swapped(artifact: Artifact) -> None:
    """The trainer gives the two texts to encode_fim in the wrong order."""
    add_gap(artifact, **encode_gap({**GAP, "prompt": GAP["suffix"], "suffix": GAP["prompt"]}))


@mutant("ML577", says="laid out by [INST], [/INST]")
def a_gap_as_a_chat(artifact: Artifact) -> None:
    """Prompt and completion are rendered as a chat, without the suffix."""
    turns = [{"role": "user", "content": GAP["prompt"]}, {"role": "assistant", "content": GAP["completion"]}]
    add_gap(artifact, **encode({"messages": turns}))


@mutant("ML577", "N182", says="a text without markers")
def a_gap_as_a_text(artifact: Artifact) -> None:
    """Prompt and completion are one text, as in pretraining."""
    add_gap(artifact, **laid_out([BOS, *encode_text(GAP["prompt"])], completion_ids()))


@mutant("ML524", says="[SUFFIX], [PREFIX] is there as text")
def markers_as_letters(artifact: Artifact) -> None:
    """The markers are letters of a text."""
    text = f"[SUFFIX]{GAP['suffix']}[PREFIX]{GAP['prompt']}"
    add_gap(artifact, **laid_out([BOS, *encode_text(text)], completion_ids()))


@mutant("ML578", says="completion has the space")
def completion_with_a_space(artifact: Artifact) -> None:
    """The completion is encoded as a text of its own."""
    before = encode_gap(GAP)["input_ids"][: encode_gap(GAP)["labels"].count(-100)]
    add_gap(artifact, **laid_out(before, encode_text(GAP["completion"])))


@mutant("ML578", "N180", says="suffix has the space")
def suffix_with_a_space(artifact: Artifact) -> None:
    """The suffix is encoded as a text of its own."""
    before = [BOS, marker("SUFFIX"), *encode_text(GAP["suffix"]), marker("PREFIX"), *encode_text(GAP["prompt"])]
    add_gap(artifact, **laid_out(before, completion_ids()))


@mutant("ML579", says="encoded as one text")
def prompt_and_completion_joined(artifact: Artifact) -> None:
    """Prompt and completion are encoded as one text: a word of both has other tokens."""
    prompt, joined = encode_text(WORD["prompt"]), encode_text(WORD["prompt"] + WORD["completion"])
    start = next(n for n, pair in enumerate(zip(prompt, joined, strict=False)) if pair[0] != pair[1])
    suffix = encode_gap(WORD)["input_ids"][: -len(prompt) - len(completion_ids(WORD)) - 1]
    add_gap(artifact, WORD, **laid_out([*suffix, *joined[:start]], joined[start:]))


@mutant("ML522", says="the EOS at the end is missing")
def a_gap_without_eos(artifact: Artifact) -> None:
    """The completion does not end."""
    line = add_gap(artifact)
    line["input_ids"].pop()
    line["labels"].pop()


@mutant("ML547", says="trained on of: prompt, suffix")
def loss_on_prompt_and_suffix(artifact: Artifact) -> None:
    """The prompt and the suffix carry loss."""
    line = add_gap(artifact)
    line["labels"][2:] = line["input_ids"][2:]


@mutant("ML543", says="every token is trained on")
def loss_on_a_whole_gap(artifact: Artifact) -> None:
    """Every token carries loss, as in pretraining."""
    line = add_gap(artifact)
    line["labels"] = list(line["input_ids"])


@mutant("ML532", says="these are the ids of tekken-240718")
def a_gap_of_another_tokenizer(artifact: Artifact) -> None:
    """The ids are those of another tokenizer."""
    assert TOKENIZER != "tekken-240911"
    add_gap(artifact, **encode_gap(GAP, "tekken-240911"))
