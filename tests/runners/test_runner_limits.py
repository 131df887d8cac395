"""Trainer scripts that take more than they may: each is ended with all of its processes, and the error says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_runners as hostile
import psutil
import pytest

from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.runners import extract as extraction
from pytest_mistral_lora.runners.extract import extract
from pytest_mistral_lora.runners.process import Ended, Limits, run_limited
from pytest_mistral_lora.runners.trainer import find_runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory and processes")

MIB = 1 << 20
Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script of the interface of a runner, without a tokenizer."""
    (tmp_path / "config").touch()
    (tmp_path / "rows").write_text("{}\n{}\n")
    work = tmp_path / "work"
    (work / "tmp").mkdir(parents=True)

    def run(body: str, *, seconds: float = 20, **limits: int) -> Ended:
        words = [sys.executable, hostile.script(tmp_path, body), "--checkpoint", "none"]
        words += ["--rows", tmp_path / "rows", "--config", tmp_path / "config", "--output", work / "encoded.jsonl"]
        environment = {**os.environ, "TMPDIR": str(work / "tmp")}
        options: dict[str, Any] = {"folder": tmp_path, "environment": environment, "output": work}
        return run_limited(words, seconds=seconds, limits=Limits(**limits), **options)

    return run


def _left(folder: Path) -> list[psutil.Process]:
    """Return the processes that are still of a script, by its path or by the file that it wrote."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_of_script = str(folder) in " ".join(process.info["cmdline"] or ())
        if is_of_script and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    file = folder / "config.child"
    if file.exists() and psutil.pid_exists(int(file.read_text())):
        child = psutil.Process(int(file.read_text()))
        found += [child] if child.status() != psutil.STATUS_ZOMBIE else []
    return found


def _assert_nothing_is_left(folder: Path) -> None:
    for _ in range(40):
        if not _left(folder):
            return
        time.sleep(0.05)
    assert _left(folder) == []


@pytest.mark.parametrize(
    ("body", "limits", "reason"),
    [
        (hostile.TAKES_MEMORY, {"memory": 200 * MIB}, "takes more than 200 MiB of memory"),
        (hostile.PRINTS, {"printed": 8 * MIB}, "prints more than 8 MiB"),
        (hostile.WRITES_ELSEWHERE, {"written": 16 * MIB}, "writes more than 16 MiB"),
        (hostile.FORKS, {"processes": 20}, "has more than 20 processes at once"),
    ],
    ids=["memory", "log", "files", "processes"],
)
def test_a_script_that_passes_a_limit_is_ended_with_all_it_started(
    body: str, limits: dict[str, int], reason: str, run: Run, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(RunnerError) as caught:
        run(body, **limits)
    assert time.monotonic() - started < 15
    assert caught.value.found.startswith(reason)
    assert "was ended" in caught.value.found
    assert str(caught.value.place) == str(tmp_path / "mine.py")
    _assert_nothing_is_left(tmp_path)


def test_one_file_is_no_larger_than_the_limit(run: Run, tmp_path: Path) -> None:
    """Whatever it is faster than: the system refuses the next byte."""
    ended = run(hostile.WRITES, written=4 * MIB)
    assert ended.code == 1
    assert "File too large" in ended.reason
    assert (tmp_path / "work" / "encoded.jsonl").stat().st_size == 4 * MIB


def test_a_script_within_its_limits_is_not_ended(run: Run, tmp_path: Path) -> None:
    body = "time.sleep(1.2); taken = b'x' * (50 << 20); print('x' * 1000); " + hostile.SOUND
    ended = run(body, memory=400 * MIB, printed=MIB, written=MIB, processes=4)
    assert (ended.code, ended.tail) == (0, "x" * 500)


def test_memory_that_processes_share_counts_once(run: Run) -> None:
    forks = "for _ in range(6):\n    if not os.fork():\n        time.sleep(30)\n        os._exit(0)\n"
    body = f"taken = b'x' * (100 << 20)\n{forks}time.sleep(1.5)"
    assert run(body, memory=300 * MIB).code == 0


@pytest.mark.parametrize("body", [hostile.LEAVES_A_DAEMON, hostile.LEAVES_A_CHILD], ids=["daemon", "child"])
def test_a_daemon_in_a_session_of_its_own_ends_with_the_script(body: str, run: Run, tmp_path: Path) -> None:
    assert run(body).code == 0
    assert (tmp_path / "config.child").read_text()
    _assert_nothing_is_left(tmp_path)


def test_a_daemon_ends_with_the_time_of_the_script(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="not done after 3 seconds"):
        run(hostile.LEAVES_A_DAEMON.replace("write(lines)", "time.sleep(600)"), seconds=3)
    assert (tmp_path / "config.child").read_text()
    _assert_nothing_is_left(tmp_path)


def test_a_script_that_ends_its_watcher_is_ended_too(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="ends the process that watches it"):
        run(hostile.ENDS_ITS_WATCHER)
    _assert_nothing_is_left(tmp_path)


def test_a_script_that_stops_its_watcher_is_ended_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.runners.process._PATIENCE", 1.0)
    with pytest.raises(RunnerError, match="not done after 1 seconds"):
        run(hostile.STOPS_ITS_WATCHER, seconds=1)
    _assert_nothing_is_left(tmp_path)


_KILLED = """
import sys
from pathlib import Path
from pytest_mistral_lora.runners.process import run_limited
run_limited([sys.executable, "-c", sys.argv[1]], seconds=600, folder=Path.cwd(), environment={})
"""


def test_a_script_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    child = f"open({str(tmp_path / 'config.child')!r}, 'w').write(str(__import__('os').getpid())); "
    words = [sys.executable, "-c", _KILLED, child + "__import__('time').sleep(600)"]
    with subprocess.Popen(words, cwd=tmp_path) as process:
        for _ in range(400):
            if (tmp_path / "config.child").exists() and (tmp_path / "config.child").read_text():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    _assert_nothing_is_left(tmp_path)


def test_the_folder_of_the_output_is_watched_in_a_run(
    tmp_path: Path, checkpoint: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*words: Any, **options: Any) -> Ended:
        return run_limited(*words, **options, limits=Limits(written=16 * MIB))

    monkeypatch.setattr(extraction, "run_limited", limited)
    runner = find_runner(str(hostile.script(tmp_path, hostile.WRITES_ELSEWHERE)))
    with pytest.raises(RunnerError, match="writes more than 16 MiB"):
        extract(runner, rows, checkpoint, tmp_path / "out.jsonl", time_limit=60)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_limits_of_a_run_are_those_of_the_documentation() -> None:
    limits = Limits()
    assert (limits.printed, limits.written, limits.processes) == (64 * MIB, 8 << 30, 512)
    assert limits.most_memory == min(32 << 30, psutil.virtual_memory().total * 3 // 4)
