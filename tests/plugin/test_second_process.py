"""The checks of a session are judged from both ends, in two processes: each once, wherever that fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.conformance.checks import Check
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.plugin import second_process
from pytest_mistral_lora.plugin.second_process import SecondProcess

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone"),
    # a worker of pytest-xdist has threads, which do nothing in these checks
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
HERE = os.getpid()


FINDING = Finding("ML101", "the labels are not those of the spans", "rows.jsonl:1", row="{}")


def pid() -> Result:
    return Result((FINDING,), facts=(("process", os.getpid()),))


def meeting(folder: Path) -> Callable[[], Result]:
    """Return a check that waits until both processes have begun one."""

    def judge() -> Result:
        names = ["here", "there"] if os.getpid() == HERE else ["there", "here"]
        own, other = (folder / name for name in names)
        own.touch()
        deadline = time.monotonic() + 60
        while not other.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return pid()

    return judge


def fails() -> Result:
    raise RuntimeError("a fault of our own")


def dies() -> Result:
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return pid()


@contextmanager
def judging(folder: Path, *judges: Callable[[], Result]) -> Iterator[Callable[[int], int]]:
    """Return a function that judges a check by its number, and tells the process in which that was done."""
    # the tiny train of a tokenizer that is not there fails at once: its own check reports it
    target = Target("none", folder / "none")
    checks = [Check(target, "mask", str(number), judge) for number, judge in enumerate(judges)]
    second = SecondProcess([*checks, Check(target, "train", "learned", fails)], folder, "cpu")

    def judge(number: int) -> int:
        found = second.result_of(checks[number])
        result = found[0] if found else checks[number].run()
        assert result.findings == (FINDING,)
        process: int = dict(result.facts)["process"]
        return process

    try:
        yield judge
    finally:
        second.end()


def test_the_checks_are_shared_from_both_ends(tmp_path: Path) -> None:
    with judging(tmp_path, *[meeting(tmp_path)] * 30) as judge:
        processes = [judge(number) for number in range(30)]
    others = [process != HERE for process in processes]
    assert others == sorted(others)
    assert not others[0]
    assert others[-1]


def test_an_error_is_raised_here(tmp_path: Path) -> None:
    with judging(tmp_path, pid, fails) as judge:
        assert judge(0)
        with pytest.raises(RuntimeError, match="a fault of our own"):
            judge(1)


def test_where_the_second_process_is_killed_the_rest_is_judged_here(tmp_path: Path) -> None:
    with judging(tmp_path, pid, pid, dies, pid) as judge:
        assert [judge(number) for number in range(3)] == [HERE] * 3
        assert judge(3)


def test_where_the_second_process_hangs_the_rest_is_judged_here(tmp_path: Path, monkeypatch: Any) -> None:
    begun = tmp_path / "begun"

    def hangs() -> Result:
        if os.getpid() != HERE:
            begun.touch()
            time.sleep(600)
        return pid()

    monkeypatch.setattr(second_process, "PATIENCE", 1.0)
    with judging(tmp_path, pid, pid, hangs) as judge:
        while not begun.exists():
            time.sleep(0.01)
        assert [judge(number) for number in (2, 0, 1)] == [HERE] * 3


def test_a_second_process_that_is_stopped_can_be_ended(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def stops() -> Result:
        if os.getpid() != HERE:
            begun.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return pid()

    with judging(tmp_path, pid, stops):
        while not begun.exists():
            time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_where_it_is_killed_in_the_midst_of_a_result_the_check_is_judged_here(tmp_path: Path) -> None:
    def talks() -> Result:
        return Result((FINDING,), facts=(("process", os.getpid()), ("text", "x" * 10**7)))  # more than a pipe holds

    with judging(tmp_path, pid, talks) as judge:
        [child] = multiprocessing.active_children()
        while not Path(f"/proc/{child.pid}/wchan").read_text().endswith("pipe_write"):
            time.sleep(0.01)
        os.kill(child.pid or 0, signal.SIGKILL)
        assert judge(1) == HERE


def test_a_train_that_hangs_there_is_made_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(second_process, "PATIENCE", 1.0)
    monkeypatch.setattr(SecondProcess, "_train", lambda self: time.sleep(600))
    train = Check(Target("none", tmp_path / "none"), "train", "learned", pid)
    second = SecondProcess([train], tmp_path, "cpu")
    try:
        assert second.result_of(train) is None
        assert not multiprocessing.active_children()
    finally:
        second.end()


def test_a_process_with_threads_is_not_forked() -> None:
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        assert not SecondProcess.is_possible()
    finally:
        waiting.set()
        thread.join()
