"""Encoded fill-in-the-middle rows: sound ones by any tokenizer, the faults of trainers, and rows of ids alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from each_oracle import of_each, oracle_named
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.kinds.fim import FimRow, parse_fim_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.judging import audit
from pytest_mistral_lora.strategies import fim_rows

GAPS = [
    FimRow.of(f"def area_{n}(a, b):\n    ", f"return area_{n}\n", f"area_{n} = a * b\n    ", place=f"row {n}")
    for n in range(3)
]


def line_of(row: FimRow, oracle: Oracle, **changes: Any) -> dict[str, Any]:
    encoded = oracle.encode(row)
    return {**row.to_json(), "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ()), **changes}


def audited(folder: Path, lines: Iterable[dict[str, Any]], oracle: Oracle, dataset: tuple[Path, ...] = ()) -> Audit:
    path = folder / "encoded.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    found = Audit(FileRows(path), oracle, dataset)
    for _ in found.verdicts():
        pass
    return found


def rules(row: FimRow, ids: Iterable[int], oracle: Oracle, labels: Iterable[int] | None = None) -> list[str]:
    """Return the rules that some ids of a row break."""
    ids = list(ids)
    return [
        finding.rule for finding in row_findings(row, ids, [-100] * len(ids) if labels is None else [*labels], oracle)
    ]


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(fim_rows(), min_size=5, max_size=10))
@of_each("spm-v3", "tekken-240911")
def test_sound_rows_have_no_findings(oracle: Oracle, rows: list[dict[str, Any]]) -> None:
    for row in map(parse_fim_row, rows):
        encoded = oracle.encode(row)
        assert rules(row, encoded.input_ids, oracle, encoded.labels) == []


@pytest.mark.parametrize("name", ["spm-v3", "spm-v7", "tekken-240911"])
def test_a_file_with_rows_beside_the_ids_is_judged(name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    found = audited(tmp_path, [{"row": n, **line_of(row, oracle)} for n, row in enumerate(GAPS)], oracle)
    assert (found.states["sound"], found.counts.total()) == (3, 0)
    assert found.not_checked.keys() == {"answers", "decoding"}
    assert found.totals.figures.supervised == sum(oracle.encode(row).supervised_tokens for row in GAPS)


def test_ids_are_judged_by_the_rows_of_a_dataset(tmp_path: Path) -> None:
    oracle = oracle_named("spm-v3")
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(f"{row.to_jsonl()}\n" for row in GAPS), encoding="utf-8")
    alone = [{key: line_of(row, oracle)[key] for key in ("input_ids", "labels")} for row in GAPS]
    found = audited(tmp_path, alone, oracle, (dataset,))
    assert (found.states["sound"], found.counts.total()) == (3, 0)
    found = audited(tmp_path, [line_of(row, oracle) for row in GAPS[:2]], oracle, (dataset,))
    assert dict(found.counts) == {"ML502": 1, "ML506": 1}


@pytest.mark.parametrize("name", [pytest.param("spm-v3", marks=pytest.mark.slow), "tekken-240911"])
def test_a_row_is_read_back_from_its_ids(name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    for row in GAPS:
        encoded = oracle.encode(row)
        assert read_back(encoded.input_ids, oracle, encoded.labels) == row
    alone = [{key: line_of(row, oracle)[key] for key in ("input_ids", "labels")} for row in GAPS]
    found = audited(tmp_path, alone, oracle)
    assert (found.states["sound"], found.totals.figures.read_back, found.counts.total()) == (3, 3, 0)
    assert audit(alone, tokenizer=name).ok


@settings(max_examples=30, deadline=None)
@given(data=fim_rows())
@of_each("spm-v3", "tekken-240911")
def test_a_row_that_is_read_back_has_the_same_ids(oracle: Oracle, data: dict[str, Any]) -> None:
    encoded = oracle.encode(parse_fim_row(data))
    assert oracle.encode(read_back(encoded.input_ids, oracle, encoded.labels)) == encoded


def test_ids_without_a_label_do_not_tell_their_completion() -> None:
    oracle = oracle_named("spm-v3")
    encoded = oracle.encode(GAPS[0])
    for labels in (None, (-100,) * len(encoded.input_ids), encoded.input_ids):
        with pytest.raises(UnreadableIdsError):
            read_back(encoded.input_ids, oracle, labels)
    with pytest.raises(UnreadableIdsError):
        read_back(encoded.input_ids[:3], oracle, encoded.labels)


@pytest.mark.parametrize("name", [pytest.param("spm-v3", marks=pytest.mark.slow), "tekken-240911"])
def test_the_faults_of_trainers_are_named(name: str) -> None:
    oracle = oracle_named(name)
    row = FimRow.of("The sky is bl", "today.", "ue ")
    encoded, text = oracle.encode(row), oracle.encode_text
    marker = oracle.control_ids
    suffix, prefix = [oracle.bos_id, marker["[SUFFIX]"]], marker["[PREFIX]"]
    ids = list(encoded.input_ids)
    start = len(ids) - encoded.supervised_tokens
    joined = [*ids[: ids.index(prefix) + 1], *text(row.prompt + row.completion), oracle.eos_id]
    assert "ML575" in rules(row, [*ids[:start], marker["[MIDDLE]"], *ids[start:]], oracle)
    order = [oracle.bos_id, prefix, *text(row.prompt), suffix[1], *text(row.suffix), *ids[start:]]
    assert "ML575" in rules(row, order, oracle)
    assert "ML576" in rules(row, oracle.encode(FimRow.of(row.suffix, row.prompt, row.completion)).input_ids, oracle)
    assert "ML577" in rules(row, [oracle.bos_id, *text(row.prompt), *ids[start:]], oracle)
    assert "ML579" in rules(row, joined, oracle)
    assert "ML522" in rules(row, ids[:-1], oracle)
    assert "ML531" in rules(row, ids[:-3], oracle)
    assert "ML531" in rules(row, ids[:3], oracle)
    assert "ML521" in rules(row, [oracle.bos_id, *ids], oracle)
    assert "ML523" in rules(FimRow.of("a </s> b", "c", "d"), _with_control_token(oracle), oracle)


def _with_control_token(oracle: Oracle) -> list[int]:
    """Return the ids of a row whose letters of EOS became EOS."""
    ids, letters = list(oracle.encode(FimRow.of("a </s> b", "c", "d")).input_ids), list(oracle.encode_text("a </s> b"))
    start = next(n for n in range(len(ids)) if ids[n : n + len(letters)] == letters)
    first, last = oracle.encode_text("a "), oracle.encode_text(" b")
    return [*ids[:start], *first, oracle.eos_id, *last, *ids[start + len(letters) :]]


def test_a_space_of_sentencepiece_is_named() -> None:
    oracle = oracle_named("spm-v3")
    row, text = GAPS[0], oracle.encode_text
    ids = list(oracle.encode(row).input_ids)
    start = len(ids) - oracle.encode(row).supervised_tokens
    assert "ML578" in rules(row, [*ids[:start], *text(row.completion), oracle.eos_id], oracle)


def test_labels_of_prompt_and_suffix_are_found() -> None:
    oracle = oracle_named("spm-v3")
    encoded = oracle.encode(GAPS[0])
    ids, labels = list(encoded.input_ids), list(encoded.labels or ())
    assert rules(GAPS[0], ids, oracle, ids) == ["ML543"]
    assert rules(GAPS[0], ids, oracle, [-100, -100, *ids[2:]]) == ["ML547"]
    assert rules(GAPS[0], ids, oracle, [*labels[:-1], -100]) == ["ML546"]


def test_render_shows_the_parts_of_a_stored_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "encoded.jsonl"
    path.write_text(f"{json.dumps(line_of(GAPS[0], oracle_named('spm-v3')))}\n", encoding="utf-8")
    assert main(["render", str(path), "--tokenizer", "spm-v3"]) == 0
    assert "turn 2: completion, trained on" in capsys.readouterr().out


@pytest.mark.parametrize("alone", [False, True], ids=["with texts", "ids alone"])
@pytest.mark.parametrize("name", [pytest.param("spm-v3", marks=pytest.mark.slow), "tekken-240911"])
def test_an_empty_completion_is_found(name: str, alone: bool, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    lines = [line_of(row, oracle) for row in (*GAPS, FimRow.of("def f():\n    return", "\n", ""))]
    if alone:
        lines = [{key: line[key] for key in ("input_ids", "labels")} for line in lines]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    findings = [
        finding
        for verdict in Audit(FileRows(tmp_path / "rows.jsonl"), oracle).verdicts()
        for finding in verdict.findings
    ]
    assert [(finding.rule, finding.place.record) for finding in findings] == [("ML616", 4)]
