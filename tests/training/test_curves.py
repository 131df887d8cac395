"""The page of a run shows the log, the same for equal runs, and is made while the run goes on."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import HELD_OUT, MakeRecipe, write_rows

from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.training import curves
from pytest_mistral_lora.training.curves import PAGE, charts, round_ticks, short, thinned, training_page
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.generate.record import GENERATIONS, AnsweredRow
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import work_folder
from pytest_mistral_lora.training.step.trainer import LoraTrainer

FACTS = {"base": "<b>tiny</b> & more"}
LOG: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 4.0, "epoch": 0},
    {"step": 1, "loss": 4.0, "grad_norm": 2.0, "learning_rate": 2e-4},
    {"step": 2, "eval_format/eos": 0.5},
    {"step": 2, "loss_scale": 65536.0},
    {"step": 4, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.0},
    {"step": 4, "eval_loss": 2.0},
]


def paths(page: str, kind: str) -> list[str]:
    return [path for path in re.findall(rf'<path class="{kind} k\d" d="([^"]*)"', page) if path != "M0 4L32 4"]


def test_points_are_where_step_and_value_put_them() -> None:
    loss, rates, norm, rate = charts(LOG, 4)
    assert [chart.title for chart in (loss, rates, norm, rate)] == [
        "Loss",
        "Format of the answers",
        "Gradient norm",
        "Learning rate",
    ]
    assert (loss.ticks[0], loss.ticks[-1]) == (1.0, 4.0)
    assert [(curve.name, loss.path(curve)) for curve in loss.curves] == [
        ("training", "M250 0L1000 300"),
        ("held-out rows", "M0 0L1000 200"),
    ]
    assert (rates.ticks[0], rates.ticks[-1]) == (0.0, 1.0)
    assert rates.dots(rates.curves[0]) == "M500 150h0"
    training, held_out = loss.words.split("; ")
    assert training == "training: first 4, last 1, lowest 1, highest 4"
    assert held_out.startswith("held-out rows: first 4, last 2")


def test_the_page_loads_nothing_escapes_names_and_is_well_formed() -> None:
    page = training_page(LOG, 4, FACTS)
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", page))
    assert not re.search(r"<script|<link|<img|url\(|https?:|@import", page)
    assert "&lt;b&gt;tiny&lt;/b&gt; &amp; more" in page
    assert "<dt>skipped because fp16 overflowed</dt><dd>1</dd>" in page
    assert "<h1>Adapter on &lt;b&gt;tiny&lt;/b&gt; &amp; more: loss 4 → 1</h1>" in page
    assert "<dt>held-out loss</dt><dd>4 → 2</dd>" in page
    assert "prefers-color-scheme: dark" in page
    assert len(paths(page, "curve")) == 5
    header, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page))
    assert header == ["step", "loss", "eval_loss", "grad_norm", "learning_rate", "eval_format/eos", "loss_scale"]
    assert rows[1] == ["1", "4", "", "2", "2e-4", "", ""]
    assert len(rows) == len(LOG)


def test_the_page_has_the_first_and_the_last_answers() -> None:
    first = {"step": 2, "row": 0, "text": "No\u202e <i>", "stop": "length", "equal": False, "checks": {"eos": "no EOS"}}
    last = {"step": 4, "row": 0, "text": "Yes.", "stop": "eos", "equal": True, "checks": {"eos": "passed"}}
    page = training_page(LOG, 4, FACTS, [AnsweredRow("Is it <b>?", "Yes.", [first, last])])
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", page))
    texts = re.findall(r"<pre[^>]*>(.*?)</pre>", page)
    assert texts == ["Is it &lt;b&gt;?", "Yes.", "No\\u202e &lt;i&gt;", "Yes."]
    assert re.findall(r"<dt>(step .*?)</dt>", page) == ["step 2", "step 4, equal"]
    assert re.findall(r"<small>(cut .*?|fails .*?)</small>", page) == ["cut at max_new_tokens", "fails eos: no EOS"]
    assert "<pre" not in training_page(LOG, 4, FACTS)


def test_a_run_that_has_only_begun_has_a_page() -> None:
    begun = training_page([], 4, FACTS)
    assert "<p>No step is logged yet.</p>" in begun
    assert "<title>Adapter on &lt;b&gt;tiny&lt;/b&gt; &amp; more</title>" in begun
    page = training_page(LOG[:2], 4, FACTS)
    assert "<dd>1 of 4: the run is not finished</dd>" in page
    assert all("nan" not in path for path in paths(page, "curve"))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.35, 2.6), (5, 5), (0, 0), (-3, -3), (1e-9, 2e-4), (-2, 7), (3, 1e6)]
)
def test_ticks_are_round_few_and_hold_all_values(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    assert all(len(short(tick)) <= 6 for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_a_long_curve_keeps_its_peaks_and_ends() -> None:
    points = [(float(step), 7.0 if step == 60_000 else step % 3) for step in range(100_001)]
    found = thinned(points)
    assert len(found) <= 400
    assert (60_000.0, 7.0) in found
    assert found == sorted(found)
    page = training_page([{"step": int(step), "loss": value} for step, value in points], 100_000, FACTS)
    assert len(page) < 100_000
    assert "Numbers: one of 201 lines of the log" in page


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 0.25, 1.5e-4, -2e-10, 123456.0, 1)] == [
        *("0", "0.25", "1.5e-4", "-2e-10"),
        *("1.2346e+05", "1"),
    ]


def test_the_folder_of_a_run_has_the_page_of_its_log(run: RunResult) -> None:
    page = (run.output / PAGE).read_text(encoding="utf-8")
    assert PAGE in run.manifest["files"]
    losses = [line for line in run.log if "loss" in line]
    assert len(re.findall(r"[ML]", paths(page, "curve")[0])) == len(losses)
    assert f"tiny, weights {run.manifest['base_weights_sha256'][:12]}, MistralForCausalLM" in unescape(page)
    assert str(run.output.parent) not in page
    lines = [json.loads(line) for line in (run.output / GENERATIONS).read_text(encoding="utf-8").splitlines()]
    steps = sorted({line["step"] for line in lines})
    assert f"<dt>step {steps[-1]}" in page
    shown = [unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, flags=re.DOTALL)]
    assert {printable(line["text"]) for line in lines if line["step"] in (steps[0], steps[-1])} <= set(shown)


def test_a_run_that_stops_has_its_page_and_resumes_without_a_point_twice(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_rows(tmp_path / "eval.jsonl", HELD_OUT)
    training = {"steps": 6, "checkpoint_steps": 4, "logging_steps": 1}
    recipe = make_recipe(training=training, data={"eval": ["eval.jsonl"]})
    sound = LoraTrainer.training_step

    def interrupted(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return sound(self, *given, **named)

    # each line of the log finds the page old
    monkeypatch.setattr(curves, "_SECONDS", 0.0)
    monkeypatch.setattr(curves, "_SHARE", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    left = (work_folder(recipe) / PAGE).read_text(encoding="utf-8")
    assert "<dd>5 of 6: the run is not finished</dd>" in left
    shown = io.StringIO()
    resumed = train(recipe, resume=True, display=RunDisplay(shown))
    assert f"going on from step 4, with {work_folder(recipe) / 'checkpoint-4'}" in shown.getvalue()
    assert re.findall(r"^step (\d)/6: loss", shown.getvalue(), flags=re.MULTILINE) == ["5", "6"]
    whole = train(recipe.model_copy(update={"output": tmp_path / "whole"}))
    first, second = ((folder / PAGE).read_text(encoding="utf-8") for folder in (resumed.output, whole.output))
    assert first == second
    steps = re.findall(r'<th scope="row">(\d)</th>', first)
    log = (whole.output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert steps == [str(json.loads(line)["step"]) for line in log]


def test_a_page_that_takes_long_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        is_world_process_zero, global_step, max_steps, log_history = True, 4, 4, LOG

    now, written = 0.0, []

    def write(file: Path, text: str) -> None:
        nonlocal now
        now += 2.0
        written.append(now)

    monkeypatch.setattr(curves, "write_text", write)
    callback = curves.WriteCurves(tmp_path / PAGE, FACTS, clock=lambda: now)
    for _ in range(1000):
        callback.on_log(None, State, None)
        now += 1
    assert len(written) == 5
    callback.on_train_end(None, State, None)
    assert len(written) == 5
    State.max_steps, State.is_world_process_zero = 9, False
    callback.on_train_end(None, State, None)
    assert len(written) == 5
