"""Merges that end early, or that have nowhere to go: the output is whole or absent, and what was there stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusing_disks import largest_file, read_only_folder, without_privileges

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import DiskError, InputError
from pytest_mistral_lora.records.files import listing
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.merge import run as merging
from pytest_mistral_lora.training.run import RunResult


def test_an_output_that_exists_is_not_touched(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="out: exists already"):
        merge(tmp_path / "no-adapter", tmp_path / "out", tmp_path / "no-base")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_two_merges_into_one_output_do_not_meet(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, met = merging.write_weights, []

    def write_while_another_begins(*given: Any, **named: Any) -> None:
        with pytest.raises(InputError, match="out: another process writes it at this moment"):
            merge(run.output, tmp_path / "out", run.base_folder, golden=one)
        met.append(given)
        write(*given, **named)

    monkeypatch.setattr(merging, "write_weights", write_while_another_begins)
    merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert len(met) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_during_a_merge_is_kept(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_mine(*given: Any) -> tuple[str, ...]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        return ()

    monkeypatch.setattr(merging, "_write_manifest", make_mine)
    with pytest.raises(InputError, match="out: was made by another process"):
        merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_an_output_inside_what_is_merged_is_refused(run: RunResult, where: str) -> None:
    folder = {"adapter": run.output, "base": run.base_folder}[where]
    before = listing(folder)
    with pytest.raises(InputError, match=r"is inside .*, which a merge does not change"):
        merge(run.output, folder / "sub" / "merged", run.base_folder)
    assert listing(folder) == before


def test_a_folder_that_may_not_be_written(run: RunResult) -> None:
    denied = pytest.raises(InputError, match="cannot be written: Permission denied")
    with read_only_folder() as folder, without_privileges(), denied:
        merge(run.output, folder / "merged", run.base_folder)


def test_a_disk_that_is_too_small_is_found_before_any_work(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.delattr(merging, "write_weights")
    with pytest.raises(DiskError, match=r"5\.1 MB; 0\.0 MB are free there"):
        merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_a_disk_that_is_full_leaves_nothing(run: RunResult, one: Path, tmp_path: Path, size: int) -> None:
    before = listing(run.output)
    with largest_file(size), pytest.raises(DiskError) as caught:
        merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert "out: cannot be written: File too large" in str(caught.value)
    assert "Make room" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []
    assert listing(run.output) == before


def stopped(run: RunResult, one: Path, output: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[..., Any]) -> int:
    """Merge by the command line until the weights are written, where this happens; return the exit code."""
    monkeypatch.setattr(merging, "prove", how)
    words = [run.output, output, "--base", run.base_folder, "--golden", one]
    return main(["merge", *map(str, words)])


def test_a_signal_leaves_nothing(run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    terminated = stopped(run, one, tmp_path / "out", monkeypatch, lambda *given, **named: signal.raise_signal(15))
    assert terminated == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error", [MemoryError(), pytest.param(torch.OutOfMemoryError("CUDA out of memory"), marks=pytest.mark.slow)]
)
def test_memory_that_runs_out_is_said(
    run: RunResult,
    one: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def raising(*given: Any, **named: Any) -> None:
        raise error

    assert stopped(run, one, tmp_path / "out", monkeypatch, raising) == 3
    assert "A merge loads the base with the adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_our_own_is_not_hidden(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*given: Any, **named: Any) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        stopped(run, one, tmp_path / "out", monkeypatch, raising)
    assert list(tmp_path.iterdir()) == []


def killed(run: RunResult, one: Path, folder: Path, *points: int | str) -> str:
    """Merge in processes that are killed at their k-th operation on a folder's files; return what is printed."""
    script = Path(__file__).with_name("dying_merges.py")
    words = [run.output, run.base_folder, one, folder, *points]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_moment_the_output_is_whole_or_absent(run: RunResult, one: Path, tmp_path: Path) -> None:
    before = listing(run.output)
    assert killed(run, one, tmp_path, 3, 30) == ""
    assert listing(run.output) == before


@pytest.mark.slow
def test_killed_at_every_operation_the_output_is_whole_or_absent(run: RunResult, one: Path, tmp_path: Path) -> None:
    assert int(killed(run, one, tmp_path, "every")) > 30
