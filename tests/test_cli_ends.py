"""How each verb of the command line ends: exit codes, signals, pipes and full disks."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import run_forked
from hypothesis.internal.conjecture import junkdrawer
from refusing_disks import largest_file
from sampling import sampled_case
from verb_words import VERB_OF, WORDS

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError, MergeError, Terminated


def cli(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest_mistral_lora.cli", *words]


def raised(error: BaseException) -> Callable[[object], int]:
    def run(args: object) -> int:
        raise error

    return run


def torch_out_of_memory(args: object) -> int:
    """Run out of the host's memory as torch itself does: 2 ** 60 bytes."""
    return len(torch.empty(1 << 60, dtype=torch.uint8))


def signalled(number: int) -> Callable[[object], int]:
    def run(args: object) -> int:
        signal.raise_signal(number)
        time.sleep(10)
        return 0

    return run


ENDS: dict[str, tuple[Callable[[object], int], int, str]] = {
    "bad input": (raised(InputError("a bad key", place="recipe.yaml")), 2, "error: recipe.yaml: a bad key\n"),
    "no such file": (raised(FileNotFoundError(2, "No such file or directory", "x.jsonl")), 2, "'x.jsonl'"),
    "a path that the system refuses": (
        raised(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)),
        2,
        f"error: File name too long: '{'a' * 300}'\n",
    ),
    "a full disk": (
        raised(OSError(errno.ENOSPC, "No space left on device", "x.html")),
        1,
        "error: No space left on device: 'x.html'\n",
    ),
    "a copy on a full disk": (
        raised(OSError(errno.EFBIG, "File too large", "tekken.json", None, "/tmp/x")),
        1,
        "error: File too large: '/tmp/x'\n",
    ),
    "a library's write on a full disk": (
        raised(OSError(errno.EFBIG, "File too large")),
        1,
        "error: a file that a library writes: File too large\n",
    ),
    "no temporary folder": (
        raised(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")),
        2,
        "error: No usable temporary directory found in ['/tmp']. Set TMPDIR to a folder",
    ),
    "foreign code that exits": (raised(SystemExit(0)), 2, "sys.exit(0)"),
    "may not": (
        raised(PermissionError(13, "Permission denied", "x.html")),
        2,
        "error: Permission denied: 'x.html'\n",
    ),
    "failed": (raised(MergeError("another answer")), 1, "error: another answer\n"),
    "host memory": (raised(MemoryError()), 3, "error: out of memory\n"),
    "torch's host memory": (torch_out_of_memory, 3, "error: out of memory: "),
    "device memory": (raised(torch.OutOfMemoryError("CUDA out of memory.")), 3, "error: out of memory: CUDA out of"),
    "interrupted": (raised(KeyboardInterrupt()), 130, "error: interrupted\n"),
    "terminated": (raised(Terminated()), 143, "error: terminated\n"),
    "SIGINT": (signalled(signal.SIGINT), 130, "error: interrupted\n"),
    "SIGTERM": (signalled(signal.SIGTERM), 143, "error: terminated\n"),
    "finding": (lambda args: 1, 1, ""),
}


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("verb", "end"),
    [
        # one function ends all verbs: one verb has every end, and every verb has two of them
        sampled_case(verb, end, name=f"{verb}-{end}", is_kept=verb == "check" or end in ("failed", "SIGTERM"))
        for verb in VERB_OF
        for end in ENDS
    ],
)
def test_every_verb_ends_with_the_code_of_the_table(
    verb: str, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, code, message = ENDS[end]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(VERB_OF[verb], "run", run)
    assert main([verb, *WORDS[verb]]) == code
    assert message in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_runs_out_comes_with_the_advice_of_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, option in (("smoke", "--device cpu"), ("merge", "--dtype"), ("verify", "--rerun")):
        monkeypatch.setattr(VERB_OF[verb], "run", torch_out_of_memory)
        assert main([verb, *WORDS[verb]]) == 3
        assert option in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VERB_OF["rules"], "run", raised(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["rules"])


FORKED = """
import os, signal, sys, time
from pytest_mistral_lora import cli

def run(args):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(reading, 1)  # Python drops signals that reach a child before it has begun
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

cli.rules.VERB.run = run
sys.exit(cli.main(["rules"]))
"""


def test_a_forked_child_is_terminated_quietly() -> None:
    result = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (143, "", "")


COLLECTED = """
import signal, sys
from hypothesis.internal.conjecture import junkdrawer
from pytest_mistral_lora import cli

clock = junkdrawer._perf_counter

def interrupted_clock():
    if sys._getframe(1).f_code.co_name == "gc_callback":
        junkdrawer._perf_counter = clock
        signal.raise_signal(int(sys.argv[1]))
    return clock()

junkdrawer._perf_counter = interrupted_clock
sys.exit(cli.main(["check", "spm-v1", "--examples", "1"]))
"""
"""Sends a signal to the callback of Hypothesis, where one is heard that came while garbage was collected."""


@pytest.mark.skipif(not hasattr(junkdrawer, "gc_cumulative_time"), reason="this Hypothesis has no such callback")
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_check_that_is_stopped_while_garbage_is_collected(number: int, code: int) -> None:
    command = [sys.executable, "-c", COLLECTED, str(int(number))]
    result = run_forked(command)
    said = "interrupted" if number == signal.SIGINT else "terminated"
    assert (result.returncode, result.stderr) == (code, f"error: {said}\n")
    assert result.stdout == "spm-v1: a tokenizer that mistral-common ships\n"


def test_a_locale_without_the_characters_or_a_closed_stream_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "usér", "content": "x"}]}\n', encoding="utf-8")
    words = ["check", str(file), "--tokenizer", "spm-v3"]
    printed = io.BytesIO()
    # as Python opens it under LC_ALL=C, and on Windows in a pipe
    for given in (
        io.TextIOWrapper(printed, "ascii", errors="surrogateescape"),
        io.TextIOWrapper(io.BytesIO(), "cp1252"),
        None,
    ):
        monkeypatch.setattr(sys, "stdout", given)
        assert main(words) == 1
        if given is None:
            sys.stdout.close()
    assert b"messages[0].role: 'us\\xe9r'" in printed.getvalue()


CLOSED = """
import json, os, sys, tempfile
from pytest_mistral_lora import cli

ends = []
for verb, words in json.loads(sys.argv[1]):
    for size in (1, 100_000):
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                reading, writing = os.pipe()
                os.close(reading)
                os.dup2(writing, 1)
                os.dup2(errors.fileno(), 2)
                for group in cli.VERBS.values():
                    for one in group.values():
                        one.run = lambda args: int(bool(print("x" * size)))
                sys.exit(cli.main([verb, *words]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            ends.append([verb, size, code, errors.read().decode()])
print(json.dumps(ends))
"""


@pytest.mark.of_field
def test_a_closed_pipe_is_no_traceback() -> None:
    # in copies of one process, which end as a process of its own does; one function ends all verbs
    verbs = [(verb, WORDS[verb]) for verb in ("check", "train")]
    command = [sys.executable, "-c", CLOSED, json.dumps(verbs)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[verb, size, 1, ""] for verb, _ in verbs for size in (1, 100_000)]


@pytest.mark.of_field
@pytest.mark.parametrize("words", [("--help",), ("rules",), ("rules", "--json"), ("runner", "list")])
def test_a_real_pipe_that_is_closed(words: tuple[str, ...], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "MISTRAL_LORA_CACHE": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, argparse itself passes over the error
    result = subprocess.run(cli(*words), stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full, on Linux")
def test_an_output_on_a_full_disk_is_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(cli("rules"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")


def test_a_disk_that_refuses_each_file_is_no_traceback_and_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]})
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is found again
    check = ["check", str(rows), "--tokenizer", "spm-v3", "--no-cache"]
    with largest_file(0):
        assert main(check) == 0  # rows of one process need no file
        assert main([*check, "--report", "x.html"]) == 2
        assert main(["template", "--tokenizer", "tekken-240911", "--output", "t.jinja"]) == 1
        # transformers loads such a tokenizer from a copy
        assert main(["check", "spm-v3", "--no-cache"]) == 2
    out, err = capsys.readouterr()
    assert "ML201" not in out
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert ["x.html" in lines[0], "t.jinja" in lines[1], "TMPDIR" in lines[2]] == [True] * 3
    with largest_file(1024):
        assert main(["check", "spm-v3", "--no-cache"]) == 1
    # where the copy fails, or, if it is loaded already, where it is saved
    assert re.search(r"^error: .*File too large", capsys.readouterr().err, flags=re.MULTILINE)
    assert sorted(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize("words", [["nope.yaml"], []])
def test_the_module_that_launchers_start_is_the_verb_train(words: list[str], tmp_path: Path) -> None:
    results = [
        subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        for command in (cli("train", *words), [sys.executable, "-m", "pytest_mistral_lora.training", *words])
    ]
    assert [one.returncode for one in results] == [2, 2]
    assert results[0].stderr == results[1].stderr != ""
