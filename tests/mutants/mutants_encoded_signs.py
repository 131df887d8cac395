"""Encoded rows that have a fault in common, which their ids alone show only over the whole file."""

from __future__ import annotations

from bench_encoded import TOKENIZER, Data, encode_with, hold_pairs, shared_oracle
from gallery import Artifact, mutant
from mutants_dataset_signs import COUNT, THINGS
from preference_records import kto, texts_pair

LENGTH = 16


def asked(thing: str, question: str = "What is a {}?", answer: str = "A {} is a thing, and {} is its name.") -> Data:
    """A row about a thing."""
    texts = (("user", question.format(thing)), ("assistant", answer.replace("{}", thing)))
    return {"messages": [{"role": role, "content": text} for role, text in texts]}


def hold_rows(artifact: Artifact, rows: list[Data], ids_of: list[Data] | None = None, name: str = TOKENIZER) -> None:
    """Let the first file hold rows with the ids of other rows, and the second file one of them."""
    artifact["tokenizer"] = name
    encoded = [encode_with(name, row) for row in ids_of or rows]
    artifact["lines"] = [{"row": n, **pair[0], **pair[1]} for n, pair in enumerate(zip(rows, encoded, strict=True))]
    _pack_one(artifact, rows[0], name)
    artifact["dataset"] = rows


def _pack_one(artifact: Artifact, row: Data, name: str = TOKENIZER) -> None:
    """Let the second file hold one sequence of one row."""
    whole = encode_with(name, row)
    packed = {"conversations": [row], **whole, "position_ids": [*range(len(whole["input_ids"]))]}
    artifact["packed"] = [{"row": 0, **packed}]


def hold_sides(artifact: Artifact, *pairs: Data) -> None:
    """Let the first file hold pairs, and the second file a row."""
    hold_pairs(artifact, *pairs)
    _pack_one(artifact, asked(THINGS[0]))


def asked_twice(thing: str) -> Data:
    """A conversation of two answers."""
    first, second = asked(thing), asked(thing, "Is it a {}?", "It is one, a {}.")
    return {"messages": [*first["messages"], *second["messages"]]}


@mutant("ML528", says="after [INST]")
def spaces_of_a_template_in_all_rows(artifact: Artifact) -> None:
    """A template writes a space behind every marker."""
    rows = [asked(thing) for thing in THINGS]
    hold_rows(
        artifact, rows, [asked(thing, " What is a {}?", " A {} is a thing, and {} is its name.") for thing in THINGS]
    )


@mutant("ML661", says="'\\n' behind each answer (12)")
def line_breaks_of_the_texts_in_all_rows(artifact: Artifact) -> None:
    """The texts themselves end with a line break, and so do their ids."""
    hold_rows(artifact, [asked(thing, answer="A {} is a thing.\n") for thing in THINGS])


@mutant("ML551 ML506", says="masked")
def first_answers_alone_in_all_rows(artifact: Artifact) -> None:
    """The labels of all rows are on the first answer alone."""
    hold_rows(artifact, [asked_twice(thing) for thing in THINGS])
    eos = shared_oracle().eos_id
    for line in artifact["lines"]:
        end = line["input_ids"].index(eos) + 1
        line["labels"] = line["labels"][:end] + [-100] * (len(line["labels"]) - end)


@mutant("ML663", says="'You are terse.' and a blank line begin the user's first text in each of 12 rows")
def a_system_prompt_in_each_encoded_request(artifact: Artifact) -> None:
    """A converter joined the system prompt to each question, although the tokenizer has a turn for it."""
    hold_rows(artifact, [asked(thing, "You are terse.\n\nWhat is a {}?") for thing in THINGS], name="spm-v7")


@mutant("ML531 ML506", says="cut")
def rows_closed_where_they_are_cut(artifact: Artifact) -> None:
    """Each row is cut at one length, and its last token is then EOS."""
    longer = "A {} is a thing. It stands here and there, and nobody asks for more."
    hold_rows(artifact, [asked(thing, f"What {'is ' * (n % 4)}a {{}}?", longer) for n, thing in enumerate(THINGS)])
    eos = shared_oracle().eos_id
    for line in artifact["lines"]:
        for key in ("input_ids", "labels"):
            line[key] = [*line[key][: LENGTH - 1], eos]


@mutant("ML665", says="the rejected answer of each of 12 pairs is 'I have no idea.'")
def one_text_for_all_encoded_rejected_sides(artifact: Artifact) -> None:
    """The rejected answers of all pairs are one text."""
    hold_sides(
        artifact, *(texts_pair(f"What is a {thing}?", f"It is a {thing}.", "I have no idea.") for thing in THINGS)
    )


@mutant("ML666", says="begins with 'Answer: '")
def one_prefix_of_all_encoded_chosen_sides(artifact: Artifact) -> None:
    """The chosen answers of all pairs begin with one word."""
    hold_sides(
        artifact, *(texts_pair(f"What is a {thing}?", f"Answer: a {thing}.", f"Not a {thing}, no.") for thing in THINGS)
    )


@mutant("ML667", says="all 12 rated answers are wanted")
def all_encoded_answers_are_wanted(artifact: Artifact) -> None:
    """The label of all rated answers is true."""
    pairs = [texts_pair(f"What is a {thing}?", f"A {thing}.", f"Not a {thing}.") for thing in THINGS]
    hold_sides(artifact, *pairs)
    artifact["lines"] = [kto(line)[0] for line in artifact["lines"]]
    assert len(artifact["lines"]) == COUNT
