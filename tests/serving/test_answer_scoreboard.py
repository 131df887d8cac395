"""The recorded answers of real servers: the page has what is recorded, and what is recorded is of today's answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from boards import answers, pages
from boards.answers import RECORDED
from boards.inputs import DOCS

from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.serving.servers import SERVERS

FILES = sorted(RECORDED.glob("*.json"))


def test_the_page_is_up_to_date() -> None:
    assert FILES
    assert pages.filled("answers") == (DOCS / pages.page_of("answers")).read_text(encoding="utf-8")


def test_the_page_has_each_difference_of_a_record() -> None:
    page = (DOCS / pages.page_of("answers")).read_text(encoding="utf-8")
    sections = page.partition("<!-- answers-differences: start -->")[2].split("\n## ")[1:]
    recorded = answers.read()
    assert len(sections) == len(recorded)
    for data, section in zip(recorded, sections, strict=True):
        shown = re.findall(r"^\| ([a-z][\w-]+) \| (?=as |\[|whole|streamed)", section, flags=re.MULTILINE)
        assert shown == [name for name, answer in data["answers"].items() if answer["whole"] or answer["streamed"]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_record_has_known_answers_and_the_rules_that_they_break(file: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    names = {answer.name for answer in known_answers()}
    assert data["kind"] in SERVERS
    assert data["answers"].keys() | set(data["not_said"]) <= names
    labels = {label for answer in data["answers"].values() for way in ("whole", "streamed") for label in answer[way]}
    rules = {rule.id for rule in RULES.of("answer")}
    assert {label for label in labels if not label.startswith("as ")} <= rules
