"""SIGINT and SIGTERM: the step is finished, a checkpoint saved, and the process says how to go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora import cli
from pytest_mistral_lora.cli import rules
from pytest_mistral_lora.errors import Terminated
from pytest_mistral_lora.training.callbacks import StopAtRequest, StopRequest, stop_on_signals
from pytest_mistral_lora.training.run_folder import checkpoints, describe_failure, fault_of, step_of

ENDLESS = {"steps": 1_000_000, "batch_size": 2, "logging_steps": 1_000_000, "checkpoint_steps": 1_000_000}


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest_mistral_lora.training", str(folder / "recipe.yaml")]
    fresh = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, env=fresh, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_a_step(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("step 1/"):
            return
    raise AssertionError("".join(seen))


def write_recipe(folder: Path, base: Path) -> Path:
    write_rows(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(json.dumps(recipe_data(base, training=ENDLESS)))
    return folder / "out.work"


SIGNALLED = """
import os, signal, sys
from pytest_mistral_lora.cli import main

reading, writing = os.pipe()
run = os.fork()
if not run:
    # a shell starts jobs in the background with SIGINT ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(writing, 2)
    code = main(["train", sys.argv[1]])
    sys.stdout.flush()
    os._exit(code)
os.close(writing)
for line in os.fdopen(reading):
    sys.stderr.write(line)
    if line.startswith("step 1/"):
        os.kill(run, int(sys.argv[2]))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    base: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    work = write_recipe(tmp_path, base)
    done = run_forked([sys.executable, "-c", SIGNALLED, tmp_path / "recipe.yaml", int(number)])
    output, errors = done.stdout, done.stderr
    assert done.returncode == code, errors
    assert output == ""
    (checkpoint,) = checkpoints(work)
    assert fault_of(checkpoint) == ""
    assert f"{number.name}: the run stops after this step" in errors
    said = f"error: {work}: stopped by {number.name} after step {step_of(checkpoint)} of 1000000, with a checkpoint. "
    step = f"Go on: mistral-lora train {tmp_path / 'recipe.yaml'} --resume"
    assert f"{said}{step}\n" in errors
    assert "Traceback" not in errors
    failure = json.loads((work / "failure.json").read_text())
    assert (failure["exit_code"], failure["advice"]) == (code, step)
    assert not (tmp_path / "out").exists()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.slow
def test_all_processes_stop_at_the_step_where_one_was_asked_to(base: Path, tmp_path: Path) -> None:
    work = write_recipe(tmp_path, base)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        start(tmp_path, RANK="0", LOCAL_RANK="0", **group) as main,
        start(tmp_path, RANK="1", LOCAL_RANK="1", **group) as other,
    ):
        try:
            wait_for_a_step(main)
            other.send_signal(signal.SIGTERM)
            errors = [process.communicate(timeout=300)[1] for process in (main, other)]
        finally:
            main.kill()
            other.kill()
    assert [main.returncode, other.returncode] == [143, 143], errors
    (checkpoint,) = checkpoints(work)
    assert fault_of(checkpoint) == ""
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}
    assert all(f"after step {step_of(checkpoint)} of" in said for said in errors)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not() -> None:
    with stop_on_signals() as stop:
        with stop.after_the_step():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT: a second signal"):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_where_no_step_is_under_way_a_signal_stops_at_once() -> None:
    with stop_on_signals() as stop:
        with pytest.raises(Terminated) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.signal
    assert describe_failure(caught.value)["exit_code"] == 143


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not interrupt
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_installs_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    def body() -> None:
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_step_is_the_last_where_any_process_was_asked() -> None:
    class Control:
        should_save = should_training_stop = False

    control, stop = Control(), StopRequest()
    StopAtRequest(stop, lambda number, how: max(number, 0)).on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop, stop.signal) == (False, False, 0)
    StopAtRequest(stop, lambda number, how: max(number, 15)).on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop, stop.signal) == (True, True, 15)


def test_an_error_of_a_library_that_a_signal_interrupted_is_the_signal(capsys: Any, monkeypatch: Any) -> None:
    def save(args: Any) -> int:
        try:
            raise Terminated
        except Terminated:
            # torch.save ends so if a signal comes while it writes: its archive has a length that it does not expect
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(rules.VERB, "run", save)
    assert cli.main(["rules"]) == 143
    assert capsys.readouterr().err == "error: terminated\n"
