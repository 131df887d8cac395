from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from fuzzing import Campaign, MakeCampaign


@pytest.fixture
def campaign(record_property: Callable[[str, object], None]) -> Iterator[MakeCampaign]:
    """Make the campaign of a fuzzer by its name and its number of cases; its counts are printed below the tests."""
    if sys.platform != "linux":
        pytest.skip("needs the limits of Linux")
    made: list[Campaign] = []

    def make(name: str, cases: int) -> Campaign:
        made.append(Campaign(name, cases))
        return made[-1]

    yield make
    for one in made:
        record_property("fuzz", one.line())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # a worker of xdist sends the properties of a test with its report
    lines = {
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "fuzz"
    }
    for line in sorted(lines):
        terminalreporter.write_line(line)
