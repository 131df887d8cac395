"""Preference pairs and rated answers that teach nothing, or something else than their prompts and answers show."""

from __future__ import annotations

import copy
from typing import Any

from bench_dataset import TOOLS
from gallery import Artifact, mutant

_TOPICS = (
    "a river",
    "a bridge",
    "a clock",
    "a violin",
    "a lamp",
    "a garden",
    "a letter",
    "a ladder",
    "a kettle",
    "a map",
)
_SHORT, _LONG = "It is {}.", "It is {}, and nothing else that I know of would be the right answer to this question."


def use_pairs(artifact: Artifact, count: int = 4, *, longer: str = "") -> list[dict[str, Any]]:
    """Put sound pairs in the place of the rows, judged without a recipe, and return them.

    Args:
        artifact: The artifact.
        count: Number of pairs.
        longer: The side whose answers are the longer ones; empty for each side in turn.
    """
    artifact["alone"] = True
    artifact["rows"] = [_pair(number, longer or ("chosen", "rejected")[number % 2]) for number in range(count)]
    rows: list[dict[str, Any]] = artifact["rows"]
    return rows


def _pair(number: int, longer: str) -> dict[str, Any]:
    thing = f"{_TOPICS[number % len(_TOPICS)]} of the {number // len(_TOPICS) + 1}. kind"
    answers = {
        side: [{"role": "assistant", "content": (_LONG if longer == side else _SHORT).format(named)}]
        for side, named in (("chosen", thing), ("rejected", f"not {thing}"))
    }
    return {"prompt": [{"role": "user", "content": f"What is thing {number}?"}], **answers}


def use_rated(artifact: Artifact) -> list[dict[str, Any]]:
    """Put rated answers in the place of the rows, half of them good, and return them."""
    pairs = use_pairs(artifact)
    artifact["rows"] = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": number % 2 == 0}
        for number, pair in enumerate(pairs)
    ]
    rows: list[dict[str, Any]] = artifact["rows"]
    return rows


def long_prompt(artifact: Artifact, words: int) -> None:
    """Give the first pair a prompt of many words."""
    pair = use_pairs(artifact)[0]
    pair["prompt"][0]["content"] = " ".join(["word"] * words)


@mutant("ML655", "N160", says="the same messages")
def sides_of_equal_answers(artifact: Artifact) -> None:
    """Both answers of a pair are one text."""
    pair = use_pairs(artifact)[1]
    pair["rejected"] = copy.deepcopy(pair["chosen"])


@mutant("ML655 ML648", "N160", says="other messages with the same tokens")
def sides_that_differ_in_spaces_at_the_end(artifact: Artifact) -> None:
    """The chosen answer has two spaces more at its end, which no tokenizer encodes."""
    pair = use_pairs(artifact)[1]
    pair["rejected"] = copy.deepcopy(pair["chosen"])
    pair["chosen"][0]["content"] += "  "


@mutant("ML655", "N160", says="other white space or ids of calls alone")
def sides_that_differ_in_white_space(artifact: Artifact) -> None:
    """The rejected answer has a line break more, and two spaces between words."""
    pair = use_pairs(artifact)[1]
    pair["rejected"] = copy.deepcopy(pair["chosen"])
    pair["rejected"][0]["content"] = "\n" + pair["chosen"][0]["content"].replace("It is", "It  is")


@mutant("ML655", "N160", says="other white space or ids of calls alone")
def sides_of_one_call(artifact: Artifact) -> None:
    """Both answers are one call, which has two ids."""
    pair = use_pairs(artifact)[1]
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    for side, call_id in (("chosen", "a1B2c3D4e"), ("rejected", "e4D3c2B1a")):
        pair[side] = [{"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}]
    pair["tools"] = copy.deepcopy(TOOLS)


@mutant("ML656", "N161", says="the rejected answer is empty")
def rejected_answer_is_empty(artifact: Artifact) -> None:
    """The rejected answer has no text, and the rest of the pair is sound."""
    use_pairs(artifact)[0]["rejected"][0]["content"] = ""


@mutant("ML656", "N161", says="the chosen answer is empty")
def chosen_answer_of_spaces(artifact: Artifact) -> None:
    """The chosen answer is a space."""
    use_pairs(artifact)[0]["chosen"][0]["content"] = " "


@mutant("ML656", "N161", says="the unwanted answer is empty")
def rated_answer_is_empty(artifact: Artifact) -> None:
    """An answer that is rated as bad is empty."""
    use_rated(artifact)[1]["completion"][0]["content"] = ""


@mutant("ML657", "N160", says="do not tell them apart")
def sides_that_part_behind_the_cut(artifact: Artifact) -> None:
    """A prompt fills all tokens that TRL keeps by default."""
    long_prompt(artifact, 1200)


@mutant("ML658", says="the same answers on the other side")
def pair_and_its_opposite(artifact: Artifact) -> None:
    """A pair is there again with its answers swapped."""
    pairs = use_pairs(artifact)
    pairs.append({**pairs[0], "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]})


@mutant("ML658", says="the same answers on the other side")
def rated_answer_as_good_and_as_bad(artifact: Artifact) -> None:
    """One answer has both labels."""
    rows = use_rated(artifact)
    rows.append({**rows[0], "label": False})


@mutant("ML659", "N162", says="the chosen one is longer in 20 of 20 pairs")
def chosen_answers_are_longer(artifact: Artifact) -> None:
    """Each chosen answer is three times as long as the rejected one."""
    use_pairs(artifact, 20, longer="chosen")


@mutant("ML608", says="the row is there 2 times")
def pair_twice(artifact: Artifact) -> None:
    """A pair is there twice."""
    pairs = use_pairs(artifact)
    pairs.append(copy.deepcopy(pairs[0]))


@mutant("ML601", says="'user'")
def request_in_an_answer(artifact: Artifact) -> None:
    """The chosen side is the whole conversation, with the prompt in it again."""
    pair = use_pairs(artifact)[0]
    pair["chosen"] = [*pair["prompt"], *pair["chosen"]]


@mutant("ML601", says="this is a preference pair")
def pairs_in_a_recipe(artifact: Artifact) -> None:
    """A recipe names pairs, of which a trainer of single answers knows neither side."""
    artifact["rows"].append(_pair(0, "chosen"))


@mutant("ML618", says="calls 'forecast'")
def chosen_call_of_an_unknown_tool(artifact: Artifact) -> None:
    """The chosen answer calls a tool that the record does not offer; the rejected one may."""
    pair = use_pairs(artifact)[0]
    for side, city in (("chosen", "Rome"), ("rejected", "Pisa")):
        function = {"name": "forecast", "arguments": {"city": city}}
        pair[side] = [
            {"role": "assistant", "tool_calls": [{"id": "a1B2c3D4e", "type": "function", "function": function}]}
        ]
    pair["tools"] = copy.deepcopy(TOOLS)


@mutant("ML617", says="U+FFFD")
def chosen_answer_is_damaged(artifact: Artifact) -> None:
    """The chosen answer has a replacement character; the rejected one may be damaged."""
    pair = use_pairs(artifact)[0]
    for side in ("chosen", "rejected"):
        pair[side][0]["content"] += " It costs 5 \ufffd."
