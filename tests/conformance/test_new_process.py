from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.conformance.train import saved_adapter
from pytest_mistral_lora.conformance.train.saved_adapter import ForkedProcess, in_a_new_process
from pytest_mistral_lora.errors import MistralLoraError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@linux_only
def test_a_forked_process_knows_nothing_that_happens_after_the_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_adapter, "_smoked", lambda folder, device: '{"answered": "before"}')
    process = ForkedProcess()
    monkeypatch.setattr(saved_adapter, "_smoked", lambda folder, device: '{"answered": "after"}')
    assert process.ask(tmp_path, "cpu") == {"answered": "before"}


@linux_only
def test_a_forked_process_that_fails_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(MistralLoraError, match="cannot be used in a new process") as caught:
        ForkedProcess().ask(tmp_path, "cpu")
    assert str(caught.value.place) == str(tmp_path / "adapter")
    assert str(tmp_path) in caught.value.found


@linux_only
def test_a_forked_process_that_is_killed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(folder: Path, device: str) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(saved_adapter, "_smoked", die)
    with pytest.raises(MistralLoraError, match="exit code -9"):
        ForkedProcess().ask(tmp_path, "cpu")


@pytest.mark.slow
def test_a_new_process_that_fails_gives_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(MistralLoraError, match="exit code 2"):
        in_a_new_process(tmp_path, "cpu")
