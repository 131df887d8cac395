"""The packaged pairs, which trainers are given: turns, texts, markers, tools and results."""

from __future__ import annotations

from preference_records import Data

from pytest_mistral_lora.chat.kinds.rated import RATED
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.records.goldens import packaged_pairs

SIDES = ("chosen", "rejected")

_CASES = [case for case in packaged_pairs() if not case.needs]
ROWS: dict[str, Data] = {case.name: case.rows[0].kind.record(case.rows) for case in _CASES if not case.is_refused}
"""The pairs of every version from v2 on, by name."""
[EMPTY] = [case.rows[0].kind.record(case.rows) for case in _CASES if case.is_refused]
"""The pair whose bad answer has no text."""


def rated(pair: Data) -> list[Data]:
    """Return the two rated answers of a pair."""
    return [RATED.record([row]) for row in RATED.of_pair(parse_rows(pair))]
