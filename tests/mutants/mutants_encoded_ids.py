"""Ids of a cut row, of other control tokens, or of another tokenizer."""

from __future__ import annotations

import json
from typing import Any

from bench_encoded import encode, encode_text, encode_with, render, shared_oracle
from gallery import Artifact, mutant


@mutant("ML522", "I02", says="a </s> is missing")
def no_eos(artifact: Artifact) -> None:
    """Texts are joined without EOS."""
    line = artifact["lines"][0]
    kept = [n for n, token in enumerate(line["input_ids"]) if token != 2]
    for key in ("input_ids", "labels"):
        line[key] = [line[key][n] for n in kept]


@mutant("ML522", "I02", "I34", says="the EOS at the end is missing")
def last_eos_dropped(artifact: Artifact) -> None:
    """The maximal length cuts the last EOS off."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key].pop()


@mutant("ML531 ML544 ML506", "I06", says="cut at the end")
def cut_before_the_answer(artifact: Artifact) -> None:
    """The maximal length ends before the first answer."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key] = artifact["lines"][0][key][:8]


@mutant("ML531 ML506", "I34", "I06", says="cut at the end")
def cut_inside_an_answer(artifact: Artifact) -> None:
    """The maximal length ends inside the last answer: no EOS."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key] = artifact["lines"][0][key][:-2]


@mutant("ML531 ML506", "I34", says="EOS put there")
def cut_and_closed(artifact: Artifact) -> None:
    """A row is cut inside its last answer, and EOS is put there."""
    line = artifact["lines"][3]
    line["input_ids"] = [*line["input_ids"][:-4], 2]
    line["labels"] = [*line["labels"][:-4], 2]


@mutant("ML531 ML506", says="cut at the start")
def cut_at_the_left(artifact: Artifact) -> None:
    """What is too long is cut at the start: half an answer is trained on."""
    line = artifact["lines"][0]
    start = next(n for n, label in enumerate(line["labels"]) if label != -100) + 1
    for key in ("input_ids", "labels"):
        line[key] = line[key][start:]


@mutant("ML521", "I03", says="BOS is there 2 times")
def double_bos(artifact: Artifact) -> None:
    """The template writes BOS, and the tokenizer adds one."""
    for line in artifact["lines"]:
        line["input_ids"].insert(0, 1)
        line["labels"].insert(0, -100)


@mutant("ML521 ML522", "I03", says="BOS is missing")
def neither_bos_nor_eos(artifact: Artifact) -> None:
    """The template's bos_token and eos_token are not set, and render as nothing."""
    line = artifact["lines"][3]
    for key in ("input_ids", "labels"):
        line[key] = line[key][1:-1]


@mutant("ML523", "I22", says="text became the control token </s>, [INST]")
def injection_in_the_user_text(artifact: Artifact) -> None:
    """A fast tokenizer finds control tokens in the text of a user."""
    line = artifact["lines"][3]
    marker, end = encode_text("[INST]"), encode_text("</s>")
    for literal, token in ((marker, 3), (end, 2)):
        at = next(n for n in range(len(line["input_ids"])) if line["input_ids"][n : n + len(literal)] == literal)
        line["input_ids"][at : at + len(literal)] = [token]
        line["labels"][at : at + len(literal)] = [-100]


@mutant("ML524 ML544 ML506", says="is there as text")
def rendered_and_encoded_again(artifact: Artifact) -> None:
    """A rendered text is encoded by a tokenizer that takes control tokens for letters."""
    line = artifact["lines"][0]
    line["input_ids"] = encode_text(render(line))
    line["labels"] = [-100] * len(line["input_ids"])


@mutant("ML507", "I14", says="call_1")
def call_id_of_another_vendor(artifact: Artifact) -> None:
    """Tool calls have ids that Mistral's own validation refuses."""
    text = json.dumps(artifact["lines"][1]["messages"]).replace("abcdefghi", "call_1")
    artifact["lines"][1]["messages"] = artifact["dataset"][1]["messages"] = json.loads(text)


@mutant("ML532", "I51", says="these are the ids of spm-v1")
def stale_cache(artifact: Artifact) -> None:
    """The rows were encoded with the tokenizer of another base, and kept."""
    for line in artifact["lines"]:
        if "tools" not in line:
            line.update(encode_with("spm-v1", line))


@mutant("ML532", "I51", says="these are the ids of spm-v7")
def stale_template(artifact: Artifact) -> None:
    """The rows were encoded with the template of a newer version, and kept."""
    artifact["lines"][0].update(encode_with("spm-v7", artifact["lines"][0]))


@mutant("ML532", says="same text, different ids")
def other_merges(artifact: Artifact) -> None:
    """The tokenizer cuts a word in another way."""
    line = artifact["lines"][0]
    at = line["input_ids"].index(encode_text("Which")[0])
    line["input_ids"][at : at + 1] = [*encode_text("Wh"), encode_text("aich")[-1]]
    line["labels"].insert(at, -100)


@mutant("ML534", says="Red.")
def another_answer(artifact: Artifact) -> None:
    """An answer is another one."""
    messages = [*artifact["lines"][0]["messages"][:-1], {"role": "assistant", "content": "Red."}]
    artifact["lines"][0].update(encode({"messages": messages}))


@mutant("ML535", "I51", says="no text of the row")
def encodings_mixed_up(artifact: Artifact) -> None:
    """Two rows have the encodings of one another."""
    for one, other in ((0, 2), (2, 0)):
        artifact["lines"][one].update(encode(artifact["dataset"][other]))


@mutant("ML520", says="id 40000")
def added_token(artifact: Artifact) -> None:
    """A token was added to the vocabulary."""
    artifact["lines"][0]["input_ids"][3] = 40000


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def closed_twice(artifact: Artifact) -> None:
    """The template closes the conversation with EOS, and the trainer adds one."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key].append(2)


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def closed_three_times(artifact: Artifact) -> None:
    """Template, tokenizer and trainer each wrote an EOS behind the last answer."""
    for line in artifact["lines"]:
        line["input_ids"] += [2, 2]
        line["labels"] += [2, 2]


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def each_answer_closed_twice(artifact: Artifact) -> None:
    """Each answer has one EOS more, which is not trained on."""
    line = artifact["lines"][0]
    for at in [n + 1 for n, token in enumerate(line["input_ids"]) if token == 2][::-1]:
        line["input_ids"].insert(at, 2)
        line["labels"].insert(at, -100)


def without_messages(artifact: Artifact, row: dict[str, Any]) -> None:
    """Make the second file a single line of a row that has ids alone."""
    artifact["packed"] = [{"row": 0, **encode(row)}]


@mutant("ML560", "I06", says="token 8: the ids end within the part after the [INST] at token 1")
def cut_before_the_answer_without_messages(artifact: Artifact) -> None:
    """The maximal length ends within the question, and the row has no messages."""
    without_messages(artifact, artifact["dataset"][0])
    for key in ("input_ids", "labels"):
        artifact["packed"][0][key] = artifact["packed"][0][key][:8]


@mutant("ML560", says="token 1: the text")
def raw_text_without_messages(artifact: Artifact) -> None:
    """A text without a template is trained on."""
    ids = [1, *encode_text("The sky is blue, and the grass is green."), 2]
    artifact["packed"] = [{"row": 0, "input_ids": ids, "labels": ids}]


@mutant("ML628", says="the text is marked up with <<SYS>>")
def template_of_llama_2_without_messages(artifact: Artifact) -> None:
    """The template of Llama 2 writes a default system prompt before the question, and the rows have no messages."""
    prompt = "<<SYS>>\nBe honest.\n<</SYS>>\n\n"
    questions = [[{"role": "user", "content": f"{prompt}What is {number} + 1?"}] for number in range(2)]
    rows = [{"messages": [*question, {"role": "assistant", "content": "More."}]} for question in questions]
    artifact["packed"] = [{"row": number, **encode(row)} for number, row in enumerate(rows)]


@mutant("ML507", says="tool-call id 'call_1'")
def call_id_of_another_vendor_without_messages(artifact: Artifact) -> None:
    """The ids spell a call id that Mistral's own validation refuses."""
    without_messages(artifact, artifact["dataset"][1])
    line = artifact["packed"][0]
    for before, after in ((6, 7), (5, 2), (8, 9)):
        start = line["input_ids"].index(before) + 1
        end = line["input_ids"].index(after, start)
        text = encode_text(shared_oracle().decode(line["input_ids"][start:end]).replace("abcdefghi", "call_1"))
        line["labels"][start:end] = text if before == 5 else [-100] * len(text)
        line["input_ids"][start:end] = text
