"""`guard.watch(model)`: a step of a loop of your own is judged before its optimizer moves a weight."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from guarded_runs import chat_rows, encoded, errors_of, fast_tokenizer, lora_model
from test_guard_examples import EXAMPLES
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DataCollatorForSeq2Seq

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.guarding.loop import LoopWatch
from pytest_mistral_lora.guarding.steps import LOSS

# PEFT and transformers warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
Loss = Callable[[Any, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def batches(base: Path, oracle: Oracle) -> list[dict[str, Any]]:
    tokenizer = fast_tokenizer(base)
    tokenizer.pad_token = "<unk>"
    collate = DataCollatorForSeq2Seq(tokenizer)
    rows = encoded(oracle, chat_rows(12))
    return [dict(collate(rows[first : first + 2])) for first in range(0, 12, 2)]


def own(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch).loss


def shifted_twice(model: Any, batch: dict[str, Any]) -> Any:
    logits = model(**batch).logits
    return cross_entropy(logits[:, :-2].flatten(0, 1), batch["labels"][:, 2:].flatten())


def without_labels(model: Any, batch: dict[str, Any]) -> Any:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def run(
    base: Path, batches: list[dict[str, Any]], losses: list[Loss], *, steps_within: bool = True, **settings: Any
) -> tuple[LoopWatch, list[float], Any]:
    """Train in a loop, and return the watch, the loss of each step and the model; `GuardError` is raised."""
    model = lora_model(base, lora_dropout=0.0)
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-3)
    watch = guard.watch(model, **{"tokenizer": fast_tokenizer(base), **settings})
    model.train()
    seen = []
    for batch, loss_of in zip(batches, losses, strict=False):
        with watch:
            if loss_of is without_labels:
                watch.use_batch(batch)
            loss = loss_of(model, batch)
            loss.backward()
            if steps_within:
                optimizer.step()
        if not steps_within:
            optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss))
    return watch, seen, model


@pytest.mark.parametrize("loss_of", [own, without_labels])
def test_a_sound_loop_is_judged_and_not_changed(
    loss_of: Loss, base: Path, batches: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    watch, losses, model = run(base, batches, [loss_of] * 4, every=2)
    assert watch.verdict is not None
    assert (watch.verdict.ok, watch.verdict.findings) == (True, ())
    assert watch.verdict.facts[f"trainer::train::{LOSS}"]["compared"] > 10
    assert watch.verdict.facts["batches::encoded::labels"]["judged"] == 2
    assert not any(name.startswith("trainer::tokenizer") for name in watch.verdict.not_checked)
    assert capsys.readouterr().out.startswith("mistral guard: 2 rows judged (1 batch, ")
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
    unwatched = lora_model(base, lora_dropout=0.0).train()
    optimizer = torch.optim.AdamW((weight for weight in unwatched.parameters() if weight.requires_grad), lr=1e-3)
    for batch, expected in zip(batches, losses, strict=False):
        loss = loss_of(unwatched, batch)
        assert float(loss) == expected
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps_within", [True, False])
def test_a_wrong_loss_raises_before_a_weight_moves(
    steps_within: bool, base: Path, batches: list[dict[str, Any]]
) -> None:
    steps: list[Any] = []
    hook = register_optimizer_step_post_hook(lambda *given: steps.append(given))
    with pytest.raises(GuardError, match="the run is stopped at step 1\n") as stopped:
        run(base, batches, [shifted_twice], steps_within=steps_within)
    hook.remove()
    assert steps == []
    assert errors_of(stopped.value.verdict) == {("ML326", "loss")}
    assert "the first step trains on labels that are shifted twice" in str(stopped.value)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    optimizer.step()  # no hook is left behind


def test_a_later_step_and_wrong_rows_are_named(
    base: Path, batches: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GuardError, match="the run is stopped at step 3\n") as stopped:
        run(base, batches, [own, shifted_twice, shifted_twice], every=2)
    assert "step 3 trains on labels that are shifted twice" in str(stopped.value)
    faulty = {**batches[0], "labels": batches[0]["labels"].masked_fill(batches[0]["labels"] == 2, -100)}
    with pytest.raises(GuardError) as stopped:
        run(base, [faulty], [own])
    assert errors_of(stopped.value.verdict) == {("ML546", "batches[0][0]"), ("ML546", "batches[0][1]")}
    watch, losses, _ = run(base, [faulty, batches[1]], [own, own], on_finding="warn", every=1)
    assert (errors_of(watch.verdict), len(losses)) == (errors_of(stopped.value.verdict), 2)
    assert "the guard warns" in caplog.text


def test_what_a_loop_does_not_show_is_not_checked(base: Path, batches: list[dict[str, Any]]) -> None:
    batch = {name: values for name, values in batches[0].items() if name != "labels"}

    def of_all(model: Any, given: dict[str, Any]) -> Any:
        return model(**given).logits.float().logsumexp(-1).mean()

    watch, _, _ = run(base, [batch], [of_all])
    assert watch.verdict is not None
    assert watch.verdict.ok
    assert "has no `labels`" in watch.verdict.not_checked[f"trainer::train::{LOSS}"]
    watch = guard.watch(lora_model(base), tokenizer="spm-v3")
    with watch:
        pass
    assert watch.verdict is not None
    assert "did not call the model with a batch" in watch.verdict.not_checked[f"trainer::train::{LOSS}"]
    compiled = guard.watch(torch.compile(lora_model(base).train(), backend="eager"), tokenizer="spm-v3")
    with compiled:
        pass
    assert compiled.verdict is not None
    assert "a compiled model is not watched" in compiled.verdict.not_checked[f"trainer::train::{LOSS}"]


class Wrapped(torch.nn.Module):
    """Calls a model, as the wrappers of PyTorch for several devices do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, **named: Any) -> Any:
        return self.module(**named)


def test_the_model_in_a_wrapper_is_watched(base: Path, batches: list[dict[str, Any]]) -> None:
    model = Wrapped(lora_model(base)).train()
    with pytest.raises(GuardError, match="ML326 loss"), guard.watch(model, tokenizer="spm-v3"):
        shifted_twice(model, batches[0]).backward()


def test_an_error_in_the_block_is_the_users_own(base: Path, batches: list[dict[str, Any]]) -> None:
    watch = guard.watch(lora_model(base), tokenizer="spm-v3")
    with pytest.raises(KeyError), watch:
        raise KeyError("of the loop")
    assert watch.verdict is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": 0}, "every=: 0"), ({"on_finding": "ask"}, "on_finding=: 'ask'"), ({"tokenizer": 3}, "tokenizer=")],
)
def test_an_argument_with_another_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        guard.watch(torch.nn.Linear(2, 2), **settings)


@pytest.mark.parametrize("name", ["pytorch_loop.py", "accelerate_loop.py", "fabric_loop.py"])
def test_a_loop_trains_and_prints_its_verdict(name: str, saved_base: Path, tmp_path: Path) -> None:
    if name.startswith("fabric"):
        pytest.importorskip("lightning_fabric", reason="Lightning Fabric is not installed here")
    lines = [json.dumps({"messages": list(row.messages)}) for row in chat_rows(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = [sys.executable, EXAMPLES / name, saved_base, tmp_path / "rows.jsonl"]
    done = run_forked(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mistral guard: 2 rows judged" in done.stdout
    assert "0 findings" in done.stdout
    assert "trainer: the run has not come" not in done.stdout
