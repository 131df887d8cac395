"""CI runs the environments of tox.ini by default, each with its reason, and their tests are there."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOX = ConfigParser()
TOX.read(ROOT / "tox.ini", encoding="utf-8")
SECTIONS = [name for name in TOX.sections() if name.startswith("testenv")]
RUN = ROOT / ".ci" / "run"


@pytest.mark.parametrize("section", SECTIONS)
def test_an_environment_has_its_reason_and_its_tests(section: str) -> None:
    assert TOX[section].get("description")
    for path in re.findall(r"\btests/[\w/.]*\w", TOX[section].get("commands", "")):
        assert (ROOT / path).exists(), path


def test_an_environment_that_ci_leaves_out_is_on_demand() -> None:
    listed = TOX["tox"]["env_list"]
    for section in SECTIONS[1:]:
        name = section.removeprefix("testenv:")
        on_demand = TOX[section]["description"].startswith("on demand: ")
        assert on_demand is not bool(re.search(rf"\b{re.escape(name.partition('{')[0])}", listed)), name


def test_an_environment_of_each_week_is_in_a_workflow() -> None:
    workflows = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    for section in SECTIONS:
        if TOX[section].get("description", "").startswith("on demand: each week"):
            assert section.removeprefix("testenv:").partition("{")[0] in workflows, section


def test_every_mutant_runs() -> None:
    assert TOX["testenv:gallery"]["commands"] == 'pytest -n 2 -m "gallery and not slow" {posargs:tests/mutants}'
    files = set((ROOT / "tests").rglob("test_*.py")) - {Path(__file__)}
    assert {path.parent.name for path in files if "mark.gallery" in path.read_text(encoding="utf-8")} == {"mutants"}


def test_ci_takes_the_lines_of_the_readme_and_the_environments_of_tox() -> None:
    script = RUN.read_text(encoding="utf-8")
    pattern = re.escape(r"s/^\$ \(pip install -e .*\)$/\1/p")
    assert re.search(rf"sed -n '{pattern}' README\.md", script)
    assert re.search(r"^(?:time )?tox run-parallel(?! .*-[ef] )", script, flags=re.MULTILINE)
