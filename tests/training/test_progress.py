"""A run is shown while it goes on: on a terminal and in a pipe, and by the main process alone."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from tiny_runs import HELD_OUT, MakeRecipe, recipe_data, write_rows
from transformers.utils import logging as transformers_logging

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.training.display import RunDisplay, clock_text
from pytest_mistral_lora.training.generate import record as watching
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.progress import (
    ShowProgress,
    answer_lines,
    summary,
    trainable_parameters,
)
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.run import RunResult, train

SNAPSHOT = Path(__file__).with_name("progress.txt")
WATCHED = {"generations": 2, "generation_steps": 2, "max_new_tokens": 8, "checks": ["eos"]}


def write_recipe(folder: Path, base: Path, **training: Any) -> Path:
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "eval.jsonl", HELD_OUT[:2])
    settings = {"steps": 4, "logging_steps": 2, "checkpoint_steps": None, "checkpoint_minutes": 1, **training}
    data = recipe_data(base, training=settings, data={"eval": ["eval.jsonl"]}, evaluation=WATCHED)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def masked(text: str) -> str:
    """Return the lines of a run with a sign for each number that a machine, a version or the weights decide."""
    text = re.sub(r"\d+\.\d+ (GiB|MiB)|\d+ (GiB|MiB)", "SIZE", text)
    text = re.sub(r"\d+:\d\d:\d\d", "TIME", text)
    text = re.sub(r"[\d,]+ supervised tokens/s", "RATE supervised tokens/s", text)
    text = re.sub(r"(loss|grad_norm|learning_rate|eos)(:?) [\d.e+-]+%?( → [\d.e+-]+%?)?", r"\1\2 NUMBER", text)
    text = re.sub(r"(answer \d: ).*", r"\1ANSWER", text)
    text = re.sub(r"weights [0-9a-f]{12}", "weights HASH", text)
    return re.sub(r"CPU, \d+ threads?", "CPU, THREADS", text)


@pytest.fixture
def in_a_pipe(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take a pipe for a terminal
    transformers_logging.disable_progress_bar()  # as the command line does before transformers is imported
    assert main(["train", str(write_recipe(tmp_path, base).name)]) == 0
    transformers_logging.enable_progress_bar()
    return capsys.readouterr()


def test_a_pipe_gets_plain_lines_and_the_path_alone_on_standard_output(in_a_pipe: tuple[str, str]) -> None:
    output, errors = in_a_pipe
    assert output == "out\n"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", errors)
    assert masked(errors) == SNAPSHOT.read_text(encoding="utf-8")


def test_a_terminal_gets_colours_a_bar_and_the_same_lines_and_the_adapter_is_that_of_a_quiet_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, base)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    reading_side, writing_side = pty.openpty()
    parts: list[str] = []
    reader = Thread(target=lambda: parts.extend(read_terminal(reading_side)))
    reader.start()
    with os.fdopen(writing_side, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert main(["train", recipe.name]) == 0
    reader.join()
    os.close(reading_side)
    shown = "".join(parts)
    assert "\x1b[?25l" in shown  # the bar hides the cursor
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and it is there again
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").replace("\r", "\n").splitlines()
    expected = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    assert [line for line in expected if line not in map(masked, lines)] == []
    assert any(re.search(r"━━ step [1-4]/4", line) for line in lines)
    quiet = train(load_recipe(recipe).model_copy(update={"output": tmp_path / "quiet"}))
    for name in ("adapter_model.safetensors", "training_log.jsonl", "training.html"):
        assert (quiet.output / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def read_terminal(file: int) -> Iterator[str]:
    while True:
        try:
            yield os.read(file, 65536).decode("utf-8", "replace")
        except OSError:  # Linux's end of a terminal whose other side is closed
            return


def test_the_header_knows_parameters_and_steps_before_a_weight_is_loaded(make_recipe: MakeRecipe, base: Path) -> None:
    lora = {"r": 4, "dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}
    recipe = make_recipe(training={"steps": None, "epochs": 2.5, "batch_size": 2}, lora=lora)
    prepared = prepare(recipe)
    result = train(recipe)
    parameters = sum(one.numel() for one in load_base(BaseFolder(base), "fp32", "cpu").parameters())
    assert trainable_parameters(prepared) == (result.manifest["lora"]["parameters"], parameters)
    assert recipe.training.planned_steps(len(prepared.data.train.rows)) == result.manifest["training"]["steps"] == 8


def test_supervised_tokens_are_those_of_the_rows(
    make_recipe: MakeRecipe, run: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ShowProgress] = []
    sound = ShowProgress.__init__

    def keep(self: ShowProgress, *given: Any, **named: Any) -> None:
        made.append(self)
        sound(self, *given, **named)

    monkeypatch.setattr(ShowProgress, "__init__", keep)
    epochs = 3
    training = {"steps": None, "epochs": epochs, "batch_size": 2, "logging_steps": 5, "micro_batch_tokens": 16}
    result = train(make_recipe(training=training), display=RunDisplay(io.StringIO()))
    assert made[0].supervised_tokens == epochs * result.manifest["masking"]["supervised_tokens"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_answers_and_evaluations_do_not_lower_the_speed_but_count_for_the_time_left(run: RunResult) -> None:
    class State:
        global_step, max_steps = 0, 10

    clock, state = Clock(), State()
    trainer = type("Trainer", (), {"step_tokens": 30, "args": type("A", (), {"device": run.model.device})})()
    file = io.StringIO()
    nobody: Any = type("Watching", (), {"answers_of": lambda self, step: []})()
    control = type("Control", (), {"should_evaluate": False})
    shown = ShowProgress(RunDisplay(file), trainer, nobody, clock=clock)
    for seconds_of_step, seconds_after in ((3, 17), (3, 7)):
        shown.on_step_begin(None, state, control)
        clock.now += seconds_of_step
        shown.on_optimizer_step(None, state, control)
        state.global_step += 1
        clock.now += seconds_after
        shown.on_step_end(None, state, control)
    shown.on_log(None, state, control, logs={"loss": 1.0})
    # 60 tokens in 6 s; two steps took 30 s with all that came between them
    assert re.search(r"step 2/10: loss 1, 10 supervised tokens/s, .*, 0:02:00 left", file.getvalue())
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert summary(log, shown, 30)["loss"] == "2 → 1"
    assert summary(log[:1], shown, 30)["loss"] == "2 at step 1, the only one that was measured"


def test_other_processes_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    RunDisplay.on_stderr().phase("loading")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    RunDisplay.on_stderr().phase("loading")
    assert capsys.readouterr().err == "0:00:00 loading\n"


def test_the_bar_goes_if_the_run_fails(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(watching, "generate", fails)
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with pytest.raises(RuntimeError, match="a fault"):
        train(make_recipe(training={"steps": 1}, evaluation={"generations": 1}), display=RunDisplay(file))
    assert "\x1b[?25l" in file.getvalue()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_long_answers_are_cut_and_broken_checks_are_named() -> None:
    line = {"step": 2, "row": 0, "text": "x\x1b[31m" * 99, "stop": "length", "equal": False}
    [text] = answer_lines([{**line, "checks": {"eos": "no EOS", "json": "passed"}}], 4)
    assert text.startswith(r"step 2/4: answer 1: 'x\x1b[31mx")
    assert text.endswith("… (not as in the row, ended by length, eos: no EOS)")
    assert len(text) < 200


def test_a_duration_is_shown_as_on_a_clock() -> None:
    assert [clock_text(seconds) for seconds in (0.9, 61, 36_000)] == ["0:00:00", "0:01:01", "10:00:00"]


def test_no_line_of_the_snapshot_is_of_this_machine() -> None:
    assert json.dumps(str(Path.home())) not in SNAPSHOT.read_text(encoding="utf-8")
