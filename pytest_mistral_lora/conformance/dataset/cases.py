"""The checks of rows by name: a rule names its check in `rules/dataset.toml`."""

from __future__ import annotations

CASES = (
    "rows-are-valid",
    "split-has-rows",
    "laws-hold",
    "backends-agree",
    "something-is-supervised",
    "nothing-is-cut",
    "no-duplicates",
    "no-leakage",
    "no-near-leakage",
    "no-control-literals",
    "turns-stay-apart",
    "answers-are-not-empty",
    "texts-are-whole",
    "tool-calls-fit-the-tools",
    "answers-are-read-back",
    "decoding-allows-answers",
    "statistics",
)
"""Every case, in the order of the report."""

OF_ENCODED_ROWS = {
    "no-duplicates": "no-duplicates",
    "no-control-literals": "no-control-literals",
    "turns-stay-apart": "turns-stay-apart",
    "answers-are-not-empty": "answers-are-not-empty",
    "texts-are-whole": "texts-are-whole",
    "tool-calls-fit-the-tools": "tool-calls-fit-the-tools",
    "statistics": "statistics",
    "answers-are-read-back": "answers",
    "decoding-allows-answers": "decoding",
    "something-is-supervised": "labels",
}
"""The cases that judge the conversations of encoded rows, too, with the name of each there."""

OF_A_RECIPE = ("split-has-rows", "nothing-is-cut", "no-leakage", "no-near-leakage")
"""Cases about a split or a length, which need a recipe."""

OF_AN_ORACLE = ("answers-are-read-back", "decoding-allows-answers")
"""Cases about what mistral-common makes of answers, which need a Mistral tokenizer."""

OF_CONVERSATIONS = (
    "backends-agree",
    "tool-calls-fit-the-tools",
    "answers-are-read-back",
    "decoding-allows-answers",
)
"""Cases about turns, which rows of other kinds do not have."""

OF_KEPT_ROWS = ("split-has-rows", "no-duplicates", "no-leakage", "no-near-leakage", "statistics")
"""Cases about rows that are trained on or held out; the other cases also judge dropped rows."""
