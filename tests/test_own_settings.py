"""What `tests/conftest.py` gives every test: a time limit, and an interrupt that is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).with_name("support")
CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")

TESTS = """
import signal, subprocess, sys, time
import pytest

def test_that_hangs():
    while True:
        time.sleep(0.1)

def test_whose_child_hears_an_interrupt():
    child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], stdout=-1)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode in (1, 130, -signal.SIGINT)
"""


SWALLOWS = """
import time

def test_that_swallows_its_limit():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def _run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests with the settings of this folder, a limit of one second, and interrupts ignored."""
    pytest.importorskip("pytest_timeout")
    # without the fixtures, whose imports may take longer
    settings = CONFTEST
    for old, new in (
        ("_SECONDS, _LONG_SECONDS = 300, 1800", "_SECONDS, _LONG_SECONDS = 1, 1"),
        ("_limit(item)))", "_limit(item), func_only=True))"),
        ("_GRACE = 60", "_GRACE = 9"),
    ):
        assert settings.count(old) == 1, old
        settings = settings.replace(old, new)
    (folder / "conftest.py").write_text(settings)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {SUPPORT}\n")
    (folder / "test_it.py").write_text(tests)
    words = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

    # as a shell starts a script's job in the background
    def ignore_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=60, preexec_fn=ignore_interrupts
    )


def test_a_test_that_hangs_ends_and_a_child_hears_an_interrupt(tmp_path: Path) -> None:
    done = _run(tmp_path, TESTS)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "Timeout" in done.stdout


def test_the_process_of_a_test_that_swallows_its_limit_ends_with_its_stack(tmp_path: Path) -> None:
    done = _run(tmp_path, SWALLOWS)
    assert done.returncode == 1
    assert " passed" not in done.stdout
    assert "in test_that_swallows_its_limit" in done.stderr
