"""Encoded rows have one verdict, however many processes judge them and however the file is cut into parts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import said, v3
from encoded_files import write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.conformance.encoded import audit as audits
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.formats.row_sources import FileRows

Data = dict[str, Any]

WORDS = "and more words of an old house near the wide river that people call a home"
ROWS = [
    *(said(f"What is {number}?", f"It is {number}.") for number in range(12)),
    # repeats, prompts with two answers, and what the share of rows in a file decides
    *(said(f"What is {number}?", f"Perhaps {number}.") for number in (3, 5)),
    *(said(f"What is {number}?", f"It is {number}.") for number in (2, 4, 2)),
    *(said(f"Spell {number}.", f"caf\\u00e9 number {number}") for number in range(4)),
    *(
        said(f"Tell {number}.", f"It is {number}. {' '.join((WORDS.split() * 4)[number:])}"[:150])
        for number in range(6)
    ),
    *(said(f"Say {number}.", "See the book of rules, on the page about numbers.") for number in range(14)),
    said("Où est la gare ?", "Voilà la rÃ©ponse."),
]
BROKEN = ("{", "", "  ", "\u3000", "[1]", '{"input_ids": "1 2", "labels": []}', "\ufeff{}", '{"a": 1, "a": 2}')
"""Lines that are blank, or that cannot be read."""


def encoded(row: Data) -> Data:
    made = v3().oracle.encode(row)
    return {"input_ids": list(made.input_ids), "labels": list(made.labels or ())}


def packed(*rows: Data) -> Data:
    parts = [encoded(row) for row in rows]
    return {key: [value for part in parts for value in part[key]] for key in ("input_ids", "labels")} | {
        "position_ids": [position for part in parts for position in range(len(part["labels"]))]
    }


def lines(*, messages: bool) -> list[Any]:
    found: list[Any] = [row | encoded(row) if messages else encoded(row) for row in ROWS]
    for number, line in enumerate(BROKEN):
        found.insert(4 * number + 1, line)
    # numbers that come again and fall, packed rows, and labels that lack their EOS
    found += [encoded(ROWS[index]) | {"row": number} for index, number in ((0, 7), (1, 7), (6, 1))]
    if not messages:
        found += [packed(*ROWS[:2]), packed(*ROWS[4:7])]
    cut = encoded(ROWS[8])
    return [*found, cut | {"labels": [*cut["labels"][:-1], -100]}]


def verdicts(audit: Audit) -> tuple[list[Any], Data, str]:
    """Return the findings of each line and of the file as plain data, and the figures."""
    found = [
        (str(verdict.place), verdict.index, verdict.state, [finding.to_json() for finding in verdict.findings])
        for verdict in audit.verdicts()
    ]
    return found, audit.summary(), audit.rows_line


@pytest.fixture(scope="module", params=[True, False], ids=["with messages", "ids alone"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows"), lines(messages=request.param))


@pytest.fixture(scope="module")
def expected(path: Path) -> tuple[list[Any], Data, str]:
    return verdicts(Audit(FileRows(path), v3().oracle))


def test_the_lines_show_what_parts_could_spoil(path: Path, expected: tuple[list[Any], Data, str]) -> None:
    found, figures, _ = expected
    rules = {finding["rule"] for _, _, _, findings in found for finding in findings}
    assert rules >= {"ML501", "ML503", "ML504", "ML608", "ML609", "ML624", "ML636", "ML644", "ML645"}
    unreadable = [place for place, _, _, findings in found if findings and findings[0]["rule"] == "ML501"]
    written = path.read_text(encoding="utf-8").splitlines()
    bad = [number for number, line in enumerate(written, start=1) if line.strip() and line in BROKEN]
    assert [place.partition(",")[0] for place in unreadable] == [f"{path}:{number}" for number in bad]
    assert figures["rows"] == sum(bool(line.strip()) for line in written)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.integers(1, 60))
def test_parts_of_any_size_have_one_verdict(size: int, path: Path, expected: tuple[list[Any], Data, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "CHUNK_LINES", size)
        assert verdicts(Audit(FileRows(path), v3().oracle)) == expected


def by_processes(processes: int, path: Path) -> tuple[list[Any], Data, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "CHUNK_LINES", 5)
        return verdicts(Audit(FileRows(path), v3().oracle, tokenizer=v3(), processes=processes))


def test_two_processes_have_the_verdict_of_one(tmp_path: Path) -> None:
    alone = write_lines(tmp_path, lines(messages=False))
    assert by_processes(2, alone) == verdicts(Audit(FileRows(alone), v3().oracle))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_verdict_of_one(
    processes: int, path: Path, expected: tuple[list[Any], Data, str]
) -> None:
    assert by_processes(processes, path) == expected


def test_lines_of_a_compressed_file_have_the_same_verdict(path: Path, expected: tuple[list[Any], Data, str]) -> None:
    folder = path.with_name("gz")
    folder.mkdir()
    (folder / path.name).write_bytes(gzip.compress(path.read_bytes()))
    found, figures, _ = verdicts(Audit(FileRows(folder / path.name), v3().oracle))
    assert json.dumps(found).replace(str(folder), str(path.parent)) == json.dumps(expected[0])
    assert figures == expected[1]


def test_lines_are_parsed_where_they_are_judged(path: Path) -> None:
    values = [record.given for record in FileRows(path).records()]
    assert sum(isinstance(value, dict | list) for value in values) == 1  # [1], which begins with no brace
    assert [type(record.value) for record in FileRows(path).records()].count(dict) > 40
