"""The most memory that a process of a test run has held: a line in the summary.

With MISTRAL_LORA_MEMORY=FILE, each process also writes a line into FILE for each test module: the memory that it holds
at its end, and what it and its tests' peak have grown by, in MiB.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

_PEAK = "peak_mib"
_KIB_OF_UNIT = 1 / 1024 if sys.platform == "darwin" else 1
"""KiB of what the system counts the peak in: macOS counts bytes."""


class WorkerMemory:
    """Hooks that note the memory of this process, and in the first process that of each worker."""

    def __init__(self, config: pytest.Config) -> None:
        self._worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        self._peaks: dict[str, tuple[int, str]] = {}
        runs_tests = config.getoption("dist", "no") == "no"  # the first process of pytest-xdist only hears of them
        self._file = os.environ.get("MISTRAL_LORA_MEMORY", "") if runs_tests else ""
        self._module = ""
        self._held, self._start_peak = _held(), _peak()
        self._peak = (self._start_peak, "its start")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note the test that raised the peak, and the end of a module."""
        module, peak = nodeid.partition("::")[0], _peak()
        if self._file and module != self._module:
            self._write()
            self._module, self._start_peak = module, self._peak[0]
        if peak > self._peak[0]:
            self._peak = (peak, nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Send the peak of a worker to the first process."""
        if self._file:
            self._write()
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_PEAK] = self._peak
        elif not self._peaks:
            self._peaks["this process"] = self._peak

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the peak of a worker of pytest-xdist."""
        peak = getattr(node, "workeroutput", {}).get(_PEAK)  # a crashed worker has none
        if peak is not None:
            self._peaks[node.gateway.id] = tuple(peak)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the peaks."""
        for name, (peak, nodeid) in sorted(self._peaks.items()):
            terminalreporter.write_line(f"most memory of {name}: {peak:,} MiB, after {nodeid}")

    def _write(self) -> None:
        if not self._module:
            return
        held = _held()
        grown = f"{held - self._held:+} {self._peak[0] - self._start_peak:+}"
        self._held = held
        with Path(self._file).open("a", encoding="utf-8") as file:  # a short line is written whole
            file.write(f"{self._worker} {held} {grown} {self._module}\n".lstrip())


def _peak() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset) >> 20
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB_OF_UNIT) >> 10


def _held() -> int:
    return int(psutil.Process().memory_info().rss) >> 20
