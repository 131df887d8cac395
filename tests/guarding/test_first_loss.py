"""The loss of the first step is compared with that of the labels, in the trainer's own call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import chat_rows, encoded, lora_model, losses_of, make_trainer
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from pytest_mistral_lora import GuardError, MistralGuard, Verdict, guard
from pytest_mistral_lora.chat.oracle import Oracle

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

CASE = "trainer::train::first-loss"

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8))


def _verdict(trainer: Any, **settings: Any) -> Verdict:
    """Run the first step of a trainer with the guard."""
    callback = guard(trainer, on_finding="warn", **settings)
    trainer.train()
    assert callback.verdict is not None
    return callback.verdict


def _found(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.rule, finding.place) for finding in verdict.findings]


def _loss(logits: torch.Tensor, labels: torch.Tensor, *, by: int = 1, **named: Any) -> torch.Tensor:
    """Return the cross entropy of labels that stand `by` places further on."""
    size = logits.shape[1] - by
    wanted = labels[:, by:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :size].reshape(len(wanted), -1).float(), wanted, **named)


def _divided(summed: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
    return summed / ((labels[:, 1:] != -100).sum() if items is None else items)


# functions of a trainer's `compute_loss_func`


def _shifted_twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return ForCausalLMLoss(
        outputs.logits[:, :-1].contiguous(), labels[:, 1:], outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch
    )


def _not_shifted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return _divided(_loss(outputs.logits, labels, by=0, reduction="sum"), labels, num_items_in_batch)


def _mask_not_shifted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    ids = torch.where(labels == -100, outputs.ids, labels)
    losses = _loss(outputs.logits, ids, reduction="none")
    mask = (labels != -100)[:, :-1].reshape(-1)
    return (losses * mask).sum() / mask.sum()


def _sound(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return _divided(_loss(outputs.logits, labels, reduction="sum"), labels, num_items_in_batch)


def _sound_mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return _loss(outputs.logits, labels)


def _sum(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return _loss(outputs.logits, labels, reduction="sum")


@pytest.mark.parametrize(
    ("function", "words"), [(_shifted_twice, "labels that are shifted twice"), (_not_shifted, "not shifted")]
)
def test_a_loss_function_with_another_shift_is_an_error(
    function: Callable[..., Any], words: str, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = function
    verdict = _verdict(trainer)
    assert _found(verdict) == [("ML326", "compute_loss_func")]
    assert words in verdict.findings[0].found
    assert not verdict.ok
    assert "ML326" in (tmp_path / "mistral-guard.json").read_text()


@pytest.mark.parametrize("function", [_sound, _sound_mean])
def test_a_sound_loss_function_is_silent(
    function: Callable[..., Any], base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = function
    verdict = _verdict(trainer)
    assert (verdict.findings, verdict.ok) == ((), True)
    assert CASE not in verdict.not_checked
    assert verdict.facts[CASE]["loss"] == pytest.approx(verdict.facts[CASE]["loss of the labels"], rel=1e-5)


def test_another_loss_is_a_note_with_both_numbers(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = _sum
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    [finding] = callback.verdict.findings
    facts = callback.verdict.facts[CASE]
    assert (finding.rule, finding.severity) == ("ML327", "note")
    assert f"{facts['loss']:.4f}" in finding.found
    assert f"{facts['loss of the labels']:.4f}" in finding.expected
    assert len(losses_of(trainer)) == 1


class Overridden(Trainer):  # type: ignore[misc]
    """A trainer with a loss of its own, as `change` makes it of the model's logits and the batch."""

    change: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = type(self).change(outputs.logits, batch)
        return (loss, outputs) if return_outputs else loss


def _overridden(base: Path, rows: Rows, folder: Path, change: Any, **settings: Any) -> Any:
    trainer = make_trainer(base, rows, folder, max_steps=1, **settings)
    trainer.__class__ = type("Overridden", (Overridden,), {"change": staticmethod(change)})
    return trainer


def _masked(name: str) -> Any:
    def change(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = _loss(logits, batch["input_ids"], reduction="none")
        mask = batch[name][:, 1:].reshape(-1)
        return (losses * mask).sum() / mask.sum()

    return change


def _cut_mask(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = _loss(logits, batch["input_ids"], reduction="none")
    mask = (batch["labels"] != -100)[:, :-1].reshape(-1)
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits, batch: _loss(logits, batch["input_ids"]), "every token, the prompt included ("),
        (lambda logits, batch: _loss(logits, batch["input_ids"], ignore_index=0), "every token but padding"),
        (
            lambda logits, batch: _loss(logits, batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)),
            "the labels and the padding",
        ),
        (lambda logits, batch: _loss(logits, batch["input_ids"], by=0), "every token, the prompt included, not shifted"),
        (lambda logits, batch: _loss(logits, batch["labels"], by=2), "labels that are shifted twice"),
        (_cut_mask, "the mask of the labels, not shifted"),
    ],
)
def test_another_mask_is_an_error(change: Any, words: str, base: Path, rows: Rows, tmp_path: Path) -> None:
    verdict = _verdict(_overridden(base, rows, tmp_path, change))
    assert _found(verdict) == [("ML326", "Overridden.compute_loss")]
    assert words in verdict.findings[0].found


def _with_column(trainer: Any, values: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Let the collator write a column `loss_mask` that is made of the labels."""
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (batch := collate(rows)) | {"loss_mask": values(batch["labels"])}
    trainer.args.remove_unused_columns = False
    return trainer


def test_a_mask_that_only_the_loss_reads_is_an_error(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = _overridden(base, rows, tmp_path / "wide", _masked("loss_mask"))
    verdict = _verdict(_with_column(trainer, lambda labels: torch.ones_like(labels).index_fill(1, torch.tensor([0, 1]), 0)))
    assert _found(verdict) == [("ML326", "Overridden.compute_loss")]
    assert "the tokens that `loss_mask` marks" in verdict.findings[0].found
    trainer = _overridden(base, rows, tmp_path / "same", _masked("loss_mask"))
    assert _found(_verdict(_with_column(trainer, lambda labels: (labels != -100).long()))) == []
    # weights, but no other tokens
    trainer = _overridden(base, rows, tmp_path / "weights", _masked("loss_mask"))
    assert _found(_verdict(_with_column(trainer, lambda labels: (labels != -100) * (1 + labels % 3 / 2)))) == []


class Relabelled(Trainer):  # type: ignore[misc]
    """A trainer that changes the labels, and lets the model compute the loss."""

    def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
        labels = inputs["labels"]
        inputs["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        return super().compute_loss(model, inputs, **named)


def test_labels_that_are_shifted_before_the_model_shifts_them_are_an_error(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.__class__ = Relabelled
    verdict = _verdict(trainer)
    assert _found(verdict) == [("ML326", "Relabelled.compute_loss")]
    assert "shifted twice" in verdict.findings[0].found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 1},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_a_declared_loss_is_silent(settings: dict[str, Any], base: Path, rows: Rows, tmp_path: Path) -> None:
    verdict = _verdict(make_trainer(base, rows, tmp_path, max_steps=1, **settings))
    assert (verdict.findings, verdict.ok) == ((), True)
    assert CASE not in verdict.not_checked
    assert "loss" in verdict.facts[CASE]


def test_it_stops_before_a_weight_moves_and_leaves_the_trainer_as_it_was(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    model = lora_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(base, rows, tmp_path, model=model)
    trainer.compute_loss_func = _shifted_twice
    callback = guard(trainer)
    with pytest.raises(GuardError, match=r"(?s)before a weight moves.*ML326") as caught:
        trainer.train()
    assert caught.value.verdict is callback.verdict
    assert (losses_of(trainer), trainer.state.global_step) == ([], 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "compute_loss" not in vars(trainer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_callback_finds_its_trainer(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = _shifted_twice
    trainer.add_callback(MistralGuard())
    with pytest.raises(GuardError, match="ML326"):
        trainer.train()
