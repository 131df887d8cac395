"""The page of a guard shows the first batch: mistral-common's labels, those of the batch, and what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from guarded_runs import chat_rows, encoded, make_trainer
from torch.nn.functional import cross_entropy

from pytest_mistral_lora import guard
from pytest_mistral_lora.chat.oracle import Oracle

# PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

SIDES = ("mistral-common", "labels of the batch", "trained on, by the gradient")


def _on_each(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.clamp(min=0)[:, 1:].flatten())


@pytest.mark.parametrize("loss", [None, _on_each])
def test_each_token_has_a_line_for_each_side(loss: Any, base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = encoded(oracle, chat_rows(4), messages=True)
    trainer = make_trainer(base, rows, tmp_path, max_steps=1, train_sampling_strategy="sequential")
    trainer.compute_loss_func = loss
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok is (loss is None)
    shown = callback.verdict._rows[:2]
    assert [row.title for row in shown] == ["train_dataset[0], in the step", "train_dataset[1], in the step"]
    for row, shown_row in zip(rows, shown, strict=False):
        assert shown_row.sides == SIDES
        counts = {name: trained for name, _, trained in shown_row.counts()}
        answer = sum(label != -100 for label in row["labels"])
        assert (counts[SIDES[0]], counts[SIDES[1]]) == (answer, answer)
        # the first token is predicted from nothing
        assert counts[SIDES[2]] == (answer if loss is None else len(shown_row.columns) - 1)
        assert shown_row.wrong == (0 if loss is None else len(shown_row.columns) - 1 - answer)
    page = (tmp_path / "mistral-guard.rows.html").read_text()
    assert all(name in page for name in SIDES)
