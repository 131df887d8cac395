"""What `tests/conftest.py` gives every test: a time limit, and an interrupt that is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_test_that_hangs_ends_and_a_child_hears_an_interrupt(tmp_path: Path) -> None:
    pytest.importorskip("pytest_timeout")
    limits = "_SECONDS, _LONG_SECONDS = 300, 1800"
    assert limits in CONFTEST
    # without the fixtures, whose imports may take longer
    marked = CONFTEST.replace(limits, "_SECONDS, _LONG_SECONDS = 1, 1").replace(
        "_SECONDS)))", "_SECONDS), func_only=True))"
    )
    assert "func_only" in marked
    (tmp_path / "conftest.py").write_text(marked)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

    # as a shell starts a script's job in the background
    def ignore_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=60, preexec_fn=ignore_interrupts
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "Timeout" in done.stdout
