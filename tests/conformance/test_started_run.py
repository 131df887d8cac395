"""The process of the first tiny run: a copy where that changes nothing, else a new interpreter."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pytest_mistral_lora.conformance.train import started_run
from pytest_mistral_lora.conformance.train.saved_adapter import ForkedProcess

SCRIPT = """
import json, os, sys, time
from pathlib import Path

import pytest_mistral_lora.conformance.train.tiny_run as tiny_run
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.started_run import start

folder = Path(sys.argv[1])


def attempt(oracle, work_folder, *, device, kind, is_new):
    print("written by the copy", flush=True)
    libraries = sorted({"torch", "peft"} & sys.modules.keys())
    # what transformers would import, and a tiny run does not need
    hides_datasets = sys.modules.get("datasets", 0) is None
    found = [os.getppid(), is_new, device, oracle.path.name, libraries, hides_datasets]
    (work_folder / "part.json").write_text(json.dumps(found))
    (work_folder / "part.json").rename(work_folder / "found.json")
    time.sleep(600)


tiny_run.attempt = attempt
end = start(Target("spm-v1"), folder, device="cpu")
while not (folder / "found.json").exists():
    time.sleep(0.01)
end()
print(json.dumps([os.getpid(), *json.loads((folder / "found.json").read_text())]))
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@linux_only
def test_a_process_without_the_libraries_is_copied_with_them(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA does not work in a forked process")
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    # one line: nothing of what the copy writes appears
    (line,) = done.stdout.splitlines()
    process: Any = json.loads(line)
    assert process[0] == process[1]
    assert process[2:] == [True, "cpu", "tokenizer.model.v1", ["torch"], True]


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process on Linux that has not imported the libraries, without a thread and a tracer."""
    for name in ("torch", "transformers", "peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(started_run, "import_module", lambda name: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ForkedProcess, "is_possible", staticmethod(lambda: True))
    return monkeypatch


def test_a_process_that_nobody_changed_can_be_copied(unused: pytest.MonkeyPatch) -> None:
    assert started_run._can_be_copied()


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_a_process_whose_conftest_has_used_a_library_is_not_copied(unused: pytest.MonkeyPatch, name: str) -> None:
    unused.setitem(sys.modules, name, ModuleType(name))
    assert not started_run._can_be_copied()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (threading, "active_count", lambda: 2),
        (sys, "gettrace", lambda: print),
        (sys, "platform", "darwin"),
        (ForkedProcess, "is_possible", staticmethod(lambda: False)),
    ],
    ids=["thread", "tracer", "macOS", "CUDA"],
)
def test_a_process_that_cannot_be_copied_soundly_is_not(
    unused: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    unused.setattr(owner, name, value)
    assert not started_run._can_be_copied()
