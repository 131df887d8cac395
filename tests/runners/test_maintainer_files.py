"""The files of examples/maintainers, run with the trainer itself: green as they stand, and red for each fault of it.

Left out, with the reason, where a trainer is not installed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trainer_faults import FAULTS

# trainers and the libraries that they import warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

FILES = Path(__file__).parents[2] / "examples" / "maintainers"
_ERROR = re.compile(r"^E +(?:[\w.]+\.)?(\w+): (ML\d+)?", flags=re.MULTILINE)


@dataclass
class Reports:
    """What the tests of a file reported.

    Attributes:
        passed: The number of tests that passed.
        failed: The functions of those that failed, each with the rules that their messages begin with, or the class of
            another error.
    """

    passed: int = 0
    failed: dict[str, set[str]] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            function = report.nodeid.rpartition("::")[2].partition("[")[0]
            error = _ERROR.search(report.longreprtext)
            assert error is not None, report.longreprtext
            self.failed.setdefault(function, set()).add(error[2] or error[1])
        elif report.when == "call":
            self.passed += 1


def run(trainer: str, folder: Path, edits: tuple[tuple[str, str], ...] = (), select: str = "") -> Reports:
    """Run a file from a folder of its own, as its trainer's tests would: without this project's configuration."""
    text = (FILES / f"test_{trainer}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / f"test_{trainer}.py"
    file.write_text(text, encoding="utf-8")
    reports = Reports()
    # the name of the module has that of the folder in it: no earlier one is found in its place
    words = ["-c", os.devnull, "--rootdir", folder.parent, "--import-mode=importlib", "-p", "no:cacheprovider", "-qs"]
    pytest.main([*map(str, words), "-k", select, str(file)], plugins=[reports])
    return reports


_ONE_TOKENIZER = {"trl": "[spm-v3", "axolotl": "[mistral_v2v3 or [chatml or [spm-v3", "llamafactory": "[mistral"}
"""The tests of one tokenizer, as for `-k`."""


@pytest.fixture
def trainer(request: pytest.FixtureRequest, scripts: None) -> str:
    """Return the name of a trainer that is installed."""
    name: str = request.param
    environment = "runner-trl" if name == "trl" else f"maintainers-{name}"
    pytest.importorskip(name, reason=f"{name} is not installed here; tox run -e {environment}")
    if name == "llamafactory":
        from llamafactory_rows import stand_in_for_torchaudio

        stand_in_for_torchaudio()
    return name


@pytest.mark.parametrize("trainer", FAULTS, indirect=True)
def test_a_file_is_green_as_it_stands(trainer: str, tmp_path: Path) -> None:
    reports = run(trainer, tmp_path)
    assert reports.failed == {}
    assert reports.passed


@pytest.mark.parametrize(
    ("trainer", "name"), [(trainer, name) for trainer in FAULTS for name in FAULTS[trainer]], indirect=["trainer"]
)
def test_a_file_is_red_for_each_fault(trainer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[trainer][name]
    if fault.plant is not None:
        fault.plant(monkeypatch)
    assert run(trainer, tmp_path, fault.edits, _ONE_TOKENIZER[trainer]).failed == fault.red
