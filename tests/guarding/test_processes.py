"""Two processes: each judges its own rows, the first reports, and all of them stop together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked

from pytest_mistral_lora.guarding.run_judge import REPORTS

HERE = Path(__file__).parent
PAIR = """
import os, runpy, socket, sys, traceback

with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = str(unused.getsockname()[1])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
script, support, *given = sys.argv[1:]
sys.path.insert(0, support)
children = []
for rank in "01":
    child = os.fork()
    if not child:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        sys.argv = [script, *given]
        code = 1
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""Two processes with the environment of `torchrun`, which itself would have three interpreters import torch anew."""


def _run(base: Path, output: Path, how: str) -> list[dict[str, Any]]:
    output.mkdir()
    script = HERE / "guarded_process.py"
    done = run_forked([sys.executable, "-c", PAIR, script, HERE.parent / "support", base, output, how])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"process-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_fault_in_the_rows_of_one_process_stops_both(base: Path, tmp_path: Path) -> None:
    first, second = _run(base, tmp_path / "stop", "stop")
    assert (first["ok"], second["ok"]) == (True, False)
    assert first["stopped"] == second["stopped"]
    assert "process 1 of 2" in first["stopped"]
    assert "ML546 train_dataset[1]" in first["stopped"]
    assert first["losses"] == second["losses"] == []


@pytest.mark.slow
def test_each_process_judges_the_loss_of_its_own_first_step(base: Path, tmp_path: Path) -> None:
    for found in _run(base, tmp_path / "loss", "stop at the loss"):
        assert "ML326 compute_loss_func" in found["stopped"]
        assert found["losses"] == []


@pytest.mark.slow
def test_a_frozen_tensor_that_moves_in_one_process_stops_both(base: Path, tmp_path: Path) -> None:
    first, second = _run(base, tmp_path / "weights", "stop at the weights")
    assert (first["ok"], second["ok"]) == (True, False)
    assert first["stopped"] == second["stopped"]
    assert "after the first steps (process 1 of 2)" in first["stopped"]
    assert "ML302 model" in first["stopped"]


@pytest.mark.slow
def test_a_fault_of_one_process_at_a_later_step_stops_both(base: Path, tmp_path: Path) -> None:
    first, second = _run(base, tmp_path / "late", "stop at a later step")
    assert first["stopped"] == second["stopped"]
    assert "at step 2, before its weights move" in first["stopped"]
    assert "(process 1 of 2)" in first["stopped"]
    assert "ML546" in first["stopped"]
    assert len(first["losses"]) == 1


@pytest.mark.slow
def test_two_processes_have_the_same_losses(base: Path, tmp_path: Path) -> None:
    unguarded, _ = _run(base, tmp_path / "unguarded", "unguarded")
    warned, _ = _run(base, tmp_path / "warn", "warn")
    assert warned["losses"] != unguarded["losses"]  # another row
    sound, _ = _run(base, tmp_path / "sound", "stop without a fault")
    assert sound["losses"] == unguarded["losses"]
    assert len(sound["losses"]) == 3
    assert all((tmp_path / "warn" / name).is_file() for name in REPORTS)
