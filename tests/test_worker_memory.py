from __future__ import annotations

import re
from pathlib import Path

import pytest
import worker_memory


def test_the_summary_has_the_peak_of_each_process_and_a_file_that_of_each_module(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pytester.path / "memory.txt"
    monkeypatch.setenv("MISTRAL_LORA_MEMORY", str(file))
    monkeypatch.setenv("PYTHONPATH", str(Path(worker_memory.__file__).parent))
    pytester.makeconftest("""
        from worker_memory import WorkerMemory

        def pytest_configure(config):
            config.pluginmanager.register(WorkerMemory(config))
    """)
    pytester.makepyfile(
        test_a="def test_large(): assert len(bytearray(b'x') * (200 << 20))", test_b="def test_small(): pass"
    )
    result = pytester.runpytest_subprocess("-p", "xdist", "-n", "2", "--dist", "loadfile")
    text = "\n".join(result.outlines)
    peaks = {
        name: int(size.replace(",", "")) for name, size in re.findall(r"most memory of (gw\d): ([\d,]+) MiB", text)
    }
    assert peaks.keys() == {"gw0", "gw1"}
    assert max(peaks.values()) > 200
    lines = {line.split()[-1]: line.split() for line in file.read_text(encoding="utf-8").splitlines()}
    assert lines.keys() == {"test_a.py", "test_b.py"}
    assert int(lines["test_a.py"][3]) > 150  # its peak; it holds less at its end
    assert int(lines["test_a.py"][2]) < 150
