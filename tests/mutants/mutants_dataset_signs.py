"""What every text, row or pair of a file has in common: white space, one turn, a system prompt, one side."""

from __future__ import annotations

from bench_dataset import said, shared_tokenizer
from gallery import Artifact, mutant
from mutants_dataset_pairs import use_pairs

COUNT = 12
THINGS = ("clock", "bridge", "kettle", "violin", "lamp", "garden", "letter", "ladder", "map", "river", "spoon", "kite")


def ask(artifact: Artifact, question: str = "What is a {}?", answer: str = "A {} is a thing.") -> None:
    """Put a question and an answer about each thing in the place of the rows."""
    artifact["rows"] = [said(question.format(thing), answer.format(thing)) for thing in THINGS]


def ask_twice(artifact: Artifact, *weights: int) -> None:
    """Put conversations of two answers in the place of the rows, with a weight for each."""
    artifact["rows"] = [
        said(f"What is a {thing}?", f"A {thing} is a thing.", f"Is it a {thing}?", f"It is one: a {thing}.")
        for thing in THINGS
    ]
    for row in artifact["rows"]:
        for message, weight in zip(row["messages"][1::2], weights, strict=True):
            message["weight"] = weight


@mutant("ML661", says="' ' in front of each text of the user (12), ' ' in front of each answer (12)")
def a_space_in_front_of_every_text(artifact: Artifact) -> None:
    """A template left its spaces in the texts."""
    ask(artifact, " What is a {}?", " A {} is a thing.")


@mutant("ML661", says="'\\n' behind each text of the user (12), ' ' in front of each answer (12)")
def a_line_break_and_a_space(artifact: Artifact) -> None:
    """A converter joined each question to an empty input, and each answer begins with a space."""
    ask(artifact, "What is a {}?\n", " A {} is a thing.")


@mutant("ML661", says="'\\n' behind each answer (12)")
def a_line_break_before_every_eos(artifact: Artifact) -> None:
    """Each answer ends with a line break."""
    ask(artifact, answer="A {} is a thing.\n")


@mutant("ML662", says="the first answer alone is trained on in each of 12 conversations")
def first_answers_alone(artifact: Artifact) -> None:
    """A script wrote a weight of 0 to each answer but the first."""
    ask_twice(artifact, 1, 0)


@mutant("ML663", says="'You are terse.' and a blank line begin the user's first text in each of 12 rows")
def a_system_prompt_in_each_request(artifact: Artifact) -> None:
    """A converter joined the system prompt to each question."""
    ask(artifact, "You are terse.\n\nWhat is a {}?")


@mutant("ML663", says="'detailed thinking off'")
def an_invented_system_prompt_in_each_request(artifact: Artifact) -> None:
    """A converter wrote a system prompt of another model to each question."""
    ask(artifact, "detailed thinking off\n\nDescribe a {}.")


@mutant("ML663", says="'Antworte immer höflich.'")
def a_german_system_prompt_in_each_request(artifact: Artifact) -> None:
    """A converter joined a German system prompt to each question."""
    ask(artifact, "Antworte immer höflich.\n\nWie heißt {} auf Deutsch?")


STORY = "The {} is a thing of this house, and it stands beside the oven since the owner brought it here."


def cut_rows(artifact: Artifact, tokens: int = 24) -> None:
    """Put rows of one number of tokens in the place of the rows, with answers of several lengths."""
    oracle = shared_tokenizer().oracle
    artifact["rows"] = []
    for number, thing in enumerate(THINGS):
        question = f"What is {'really ' * (number % 4)}a {thing}?"
        encoded = oracle.encode(said(question, STORY.format(thing)))
        labels = [label for label in encoded.labels or () if label != -100]
        kept = labels[: tokens - 1 - len(encoded.input_ids) + len(labels)]
        artifact["rows"].append(said(question, oracle.decode(kept)))


@mutant("ML664", says="each of 12 rows has 24 tokens")
def rows_cut_at_one_length(artifact: Artifact) -> None:
    """Each row was cut at one length, and its last token is EOS."""
    cut_rows(artifact)


@mutant(
    "ML665",
    says="the rejected answer of each of 12 pairs is 'I have no idea what that may be, and I cannot find it out.'",
)
def one_text_for_all_rejected_sides(artifact: Artifact) -> None:
    """A script wrote the same rejected answer to each pair."""
    for row in use_pairs(artifact, COUNT):
        row["rejected"][0]["content"] = "I have no idea what that may be, and I cannot find it out."


@mutant("ML666", says="each of 12 chosen answers begins with 'Answer: ', and no rejected one does")
def one_prefix_of_all_chosen_sides(artifact: Artifact) -> None:
    """The chosen answers were written with a word in front of them."""
    for row in use_pairs(artifact, COUNT):
        row["chosen"][0]["content"] = f"Answer: {row['chosen'][0]['content']}"


@mutant("ML666", says="each of 12 chosen answers begins with ' ', and no rejected one does")
def a_space_before_all_chosen_sides(artifact: Artifact) -> None:
    """The chosen answers alone begin with a space."""
    for row in use_pairs(artifact, COUNT):
        row["chosen"][0]["content"] = f" {row['chosen'][0]['content']}"


def rate(artifact: Artifact, *labels: bool) -> None:
    """Put rated answers in the place of the rows."""
    pairs = use_pairs(artifact, len(labels))
    artifact["rows"] = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": label}
        for pair, label in zip(pairs, labels, strict=True)
    ]


@mutant("ML667", says="all 12 rated answers are wanted")
def all_rated_answers_are_wanted(artifact: Artifact) -> None:
    """A filter kept the wanted answers alone."""
    rate(artifact, *[True] * COUNT)


@mutant("ML668", says="is letters, 'bad' or 'good'")
def labels_as_letters(artifact: Artifact) -> None:
    """The label of each answer is a word, and bad answers are read as conversations."""
    ask(artifact)
    artifact["alone"] = True
    for number, row in enumerate(artifact["rows"]):
        row["label"] = ("good", "bad")[number % 3 == 0]


def declare(artifact: Artifact, key: str, *values: object) -> None:
    """Put a key beside each answer, with the values in turn."""
    ask(artifact, answer="A {} is a thing, and it has a name.")
    artifact["alone"] = True
    for number, row in enumerate(artifact["rows"]):
        row[key] = values[number % len(values)]


@mutant("ML668", says="`label` is 1 or -1 in 12 rows, and the answers of 6 with -1")
def labels_of_one_and_minus_one(artifact: Artifact) -> None:
    """A reward script wrote 1 or -1 beside each answer."""
    declare(artifact, "label", 1, -1)


@mutant("ML668", says="`score`, from 0.2 to 0.9")
def scores_that_nothing_reads(artifact: Artifact) -> None:
    """Each answer has a score, which no training reads."""
    declare(artifact, "score", 0.2, 0.9, 0.4, 0.6, 0.8)


@mutant("ML669", says="an answer that was cut, as its row says, in 4 of 12 answers")
def answers_cut_by_the_limit_of_a_server(artifact: Artifact) -> None:
    """Every third answer ended at the limit of tokens of the server that wrote it."""
    declare(artifact, "finish_reason", "length", "stop", "stop")
