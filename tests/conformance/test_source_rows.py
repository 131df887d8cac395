"""The rows of a source that the lines of an encoded file are matched with: each once, and how the work grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.conformance.encoded.file_faults import SourceTracker
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.places import Place


class Number(int):
    """A number that counts its comparisons with others."""

    compared: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        Number.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}


def tracker(path: Path, texts: list[str]) -> SourceTracker:
    path.write_text("".join(json.dumps(said(text)) + "\n" for text in texts))
    return SourceTracker((path,))


def line(text: str, number: int, *, numbered: bool = True, conversations: int = 0) -> EncodedLine:
    row = parse_row(said(text), place=f"rows:{number}")
    rows = (row,) * (conversations or 1)
    return EncodedLine(f"rows:{number}", Number(number), rows, numbered=numbered, packed=conversations > 0)


def rules(source: SourceTracker, lines: list[EncodedLine], path: Path) -> list[str]:
    findings = [finding for given in lines for finding in source.take(source.numbered(given))]
    return [finding.rule for finding in [*findings, *source.missing_findings(Place.of(path))]]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("step", [1, -1])
def test_the_work_grows_with_the_number_of_equal_rows(numbered: bool, step: int, tmp_path: Path) -> None:
    compared = []
    for count in (100, 200):
        path = tmp_path / f"{count}.jsonl"
        source = tracker(path, ["Hello"] * count)
        Number.compared = 0
        found = rules(source, [line("Hello", n, numbered=numbered) for n in range(count)][::step], path)
        # without numbers, each line is the next of the equal rows
        assert found == (["ML504"] * (count - 1) if numbered and step < 0 else [])
        assert not list(source.missing_rows())
        compared.append(Number.compared)
    assert compared[1] <= 3 * compared[0]


def test_a_row_is_matched_once(tmp_path: Path) -> None:
    texts = ["Hello", "Bye", "Hello", "Hello"]
    path = tmp_path / "rows.jsonl"
    # the third and the first by their numbers, and the others by their texts
    lines = [line("Hello", 0), line("Bye", 1), line("Hello", 2), line("Hello", 3)]
    assert rules(tracker(path, texts), [*lines[2:3], *lines[:2], lines[3]], path) == ["ML504", "ML504"]
    source = tracker(path, texts)
    assert rules(source, [line("Hello", 7, numbered=False) for _ in range(4)], path) == ["ML505", "ML502"]
    assert [str(row.place) for row in source.missing_rows()] == [f"{path}:2"]


def test_conversations_of_sequences_are_matched_as_often_as_the_source_has_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["Hello", "Bye", "Hello", "Hello"]
    source = tracker(path, texts)
    assert rules(source, [line("Hello", 0, conversations=2), line("Hello", 1, conversations=1)], path) == ["ML502"]
    assert [str(row.place) for row in source.missing_rows()] == [f"{path}:2"]
    source = tracker(path, texts)
    assert rules(source, [line("Hello", 0, conversations=4)], path) == ["ML505", "ML502"]
