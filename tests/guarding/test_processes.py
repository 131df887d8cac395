"""Two processes: each judges its own rows, the first reports, and all of them stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.guarding.callback import REPORTS

HERE = Path(__file__).parent


def _run(base: Path, output: Path, how: str) -> list[dict[str, Any]]:
    output.mkdir()
    paths = os.pathsep.join([str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(HERE / "guarded_process.py"), str(base), str(output), how],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
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
def test_two_processes_have_the_same_losses(base: Path, tmp_path: Path) -> None:
    unguarded, _ = _run(base, tmp_path / "unguarded", "unguarded")
    warned, _ = _run(base, tmp_path / "warn", "warn")
    assert warned["losses"] != unguarded["losses"]  # another row
    sound, _ = _run(base, tmp_path / "sound", "stop without a fault")
    assert sound["losses"] == unguarded["losses"]
    assert len(sound["losses"]) == 3
    assert all((tmp_path / "warn" / name).is_file() for name in REPORTS)
