"""examples/maintainers: the files to copy have the pin of the newest rules, and nothing of this project's own tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_sections import section

from pytest_mistral_lora.conformance.rule_set import newest_rules

ROOT = Path(__file__).parents[1]
PAGE = section("guard.md", "In the tests of a trainer")
FILES = sorted((ROOT / "examples" / "maintainers").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_can_be_pasted_as_it_stands(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"^RULES = (\S+)", text, flags=re.MULTILINE) == [f'"{newest_rules()}"']
    imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    trainer = file.stem.removeprefix("test_")
    assert set(imported) <= {"typing", "json", "pytest", "datasets", "transformers", "pytest_mistral_lora", trainer}
    asserts = re.findall(r"^    assert_\w+\(.*", text, flags=re.MULTILINE)
    assert asserts
    assert [line for line in asserts if not line.endswith("rules=RULES)")] == []


def test_the_page_has_each_file_and_the_pin() -> None:
    assert set(re.findall(r"examples/maintainers/(test_\w+\.py)", PAGE)) == {file.name for file in FILES}
    assert re.findall(r"--mistral-rules (\S+)", PAGE) == [newest_rules()]
