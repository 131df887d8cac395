"""Twenty thousand sound rows over every tokenizer, by their ids and labels alone: no false alarm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from each_oracle import ALL, oracle_named
from encoded_files import write_lines
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from read_back_limits import looks_like_a_fault

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.strategies import rows, tool_rows

pytestmark = pytest.mark.slow

STRATEGIES: dict[str, tuple[st.SearchStrategy[dict[str, Any]], int]] = {
    "plain": (rows(), 600),
    "weights": (rows(weights=True), 400),
    "calls": (tool_rows(weights=True), 550),
    "parallel calls": (tool_rows(parallel=True), 550),
    "thinking": (rows(tools=None, parallel=True, thinking=True, any_ids=True), 550),
}


@cache
def drawn(name: str) -> list[dict[str, Any]]:
    """Return the rows of a strategy: the same for each tokenizer, because drawing takes longer than encoding."""
    strategy, count = STRATEGIES[name]
    made: list[dict[str, Any]] = []

    @seed(1)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @given(strategy)
    def collect(row: dict[str, Any]) -> None:
        made.append(row)

    collect()
    return made


def names_for(oracle: Oracle) -> list[str]:
    if oracle.facts.tools_in is None:
        return ["plain", "weights"]
    if not oracle.facts.parallel_calls:
        return ["plain", "weights", "calls"]
    return ["plain", "weights", "parallel calls", *(["thinking"] if oracle.features.thinking else [])]


@pytest.mark.parametrize("name", ALL)
def test_sound_rows_without_messages_are_sound(name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    made = [row for strategy in names_for(oracle) for row in drawn(strategy) if not looks_like_a_fault(row, oracle)]
    encoded = [oracle.encode(row) for row in made]
    # a row that teaches nothing is a finding, whoever made it
    lines = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded if row.supervised_tokens]
    audit = Audit(FileRows(write_lines(tmp_path, lines)), oracle)
    found = [finding.text() for verdict in audit.verdicts() for finding in verdict.findings]
    assert found == []
    assert (audit.judged, audit.totals.figures.read_back) == (len(lines), len(lines))
