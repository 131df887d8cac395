"""Trainers without a tokenizer, a configuration or other parts: what needs them is not checked, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, errors_of, lora_model, losses_of, make_trainer
from sampling import sampled
from transformers import CLIPImageProcessor

from pytest_mistral_lora import GuardError, MistralGuard, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance import trainer as trainer_checks
from pytest_mistral_lora.guarding import run_judge

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8), messages=True)


def _collate(items: Rows) -> dict[str, torch.Tensor]:
    """Pad rows, by a function that has no tokenizer."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*item[key], *[value] * (longest - len(item[key]))] for item in items])

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def _without_tokenizer(base: Path, rows: Any, work: Path, *, collator: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(base, rows, work, max_steps=1, **settings)
    trainer.processing_class = trainer.callback_handler.processing_class = None
    if collator is not None:
        trainer.data_collator = collator
    return trainer


def test_a_named_tokenizer_is_enough(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = _without_tokenizer(base, rows, tmp_path, collator=_collate)
    callback = guard(trainer, tokenizer="spm-v3")
    trainer.train()
    assert len(losses_of(trainer)) == 1
    assert callback.verdict is not None
    assert (callback.verdict.ok, callback.verdict.findings) == (True, ())
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 4
    assert "processing_class" in callback.verdict.not_checked["trainer::tokenizer::bos-eos-unk"]
    assert "chat template" in callback.verdict.not_checked["trainer::adapter::template-of-base"]
    assert "trainer::tokenizer::model-config" not in callback.verdict.not_checked


def test_a_fault_is_found_without_a_tokenizer(base: Path, rows: Rows, tmp_path: Path) -> None:
    rows[3]["labels"][-1] = -100
    model = lora_model(base)
    model.config.eos_token_id = 5
    trainer = _without_tokenizer(base, rows, tmp_path, collator=_collate, model=model)
    verdict = begin(trainer, tokenizer="spm-v3", on_finding="warn").verdict
    assert errors_of(verdict) == {("ML546", "train_dataset[3]"), ("ML217", "model.config")}


def test_the_tokenizer_is_recognised_by_that_of_the_collator(base: Path, rows: Rows, tmp_path: Path) -> None:
    model = lora_model(base)
    model.config._name_or_path = ""
    verdict = begin(_without_tokenizer(base, rows, tmp_path, model=model)).verdict
    assert verdict is not None
    assert verdict.ok
    assert "32,768 of 32,768 ids are the same" in str(verdict.facts["trainer::tokenizer::oracle"])


def test_the_tokenizer_is_recognised_by_the_folder_of_the_model(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = _without_tokenizer(base, rows, tmp_path, collator=_collate)
    assert trainer.model.config._name_or_path == str(base)
    assert errors_of(begin(trainer).verdict) == set()


def test_no_tokenizer_at_all_is_never_a_pass(base: Path, rows: Rows, tmp_path: Path) -> None:
    model = lora_model(base)
    model.config._name_or_path = ""
    trainer = _without_tokenizer(base, rows, tmp_path, collator=_collate, model=model)
    with pytest.raises(GuardError, match=r"ML229 processing_class: "):
        begin(trainer)


class BareTokenizer:
    """A processing class that is no tokenizer of transformers."""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [1]}


@pytest.mark.parametrize("made", [BareTokenizer, CLIPImageProcessor], ids=["bare", "images"])
def test_a_processing_class_without_a_tokenizer_is_not_checked(
    made: Any, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = _without_tokenizer(base, rows, tmp_path, collator=_collate)
    trainer.processing_class = made()
    verdict = begin(trainer, tokenizer="spm-v3").verdict
    assert verdict is not None
    assert verdict.ok
    assert "processing_class" in verdict.not_checked["trainer::tokenizer::bos-eos-unk"]
    # and it is not the tokenizer that is recognised
    assert errors_of(begin(trainer).verdict) == set()


class OwnModel(torch.nn.Module):
    """A model of the user's, without a configuration and without named embeddings."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_of_a_users_class_is_not_checked(base: Path, rows: Rows, tmp_path: Path) -> None:
    rows[3]["labels"][-1] = -100
    trainer = make_trainer(base, rows, tmp_path, model=OwnModel(lora_model(base)), max_steps=1)
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert errors_of(callback.verdict) == {("ML546", "train_dataset[3]")}
    assert callback.verdict is not None
    assert "trainer::tokenizer::model-config" in callback.verdict.not_checked


def test_a_check_of_ours_that_ends_with_an_error_is_not_checked(
    base: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(target: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'bos_token_id'")

    monkeypatch.setattr(trainer_checks, "_placement", breaks)
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    callback = guard(trainer)
    trainer.train()
    assert len(losses_of(trainer)) == 1
    assert callback.verdict is not None
    reason = callback.verdict.not_checked["trainer::adapter::placement"]
    assert "AttributeError" in reason
    assert "'bos_token_id'" in reason
    assert reason[:40] in capsys.readouterr().out


def test_an_error_of_the_whole_judgement_is_not_checked(
    base: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)

    def breaks(*given: Any, **named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("pytest_mistral_lora.guarding.verdict.opened_session", breaks)
    callback = guard(trainer)
    trainer.train()
    assert len(losses_of(trainer)) == 1
    assert callback.verdict is None
    assert "not checked: the guard ended with MemoryError" in caplog.text


@pytest.mark.parametrize("name", ["next_batches", "undisturbed", "rows_of"])
def test_an_error_of_the_reading_ends_no_run(
    name: str, base: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: Any, **named: Any) -> Any:
        raise KeyError(name)

    monkeypatch.setattr(run_judge, name, breaks)
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    guard(trainer)
    trainer.train()
    assert len(losses_of(trainer)) == 1


def test_arguments_that_lack_everything_are_enough(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    callback = MistralGuard(tokenizer="spm-v3")
    bare = SimpleNamespace(global_step=0)
    loader = trainer.get_train_dataloader()
    callback.on_train_begin(bare, bare, bare, model=trainer.model, train_dataloader=loader)
    assert callback.verdict is not None
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 8
    callback.on_train_end(bare, bare, bare)


@pytest.mark.parametrize("has_mask", sampled([True, False], {"False"}))
def test_a_new_pad_with_embeddings_of_its_own_is_sound(has_mask: bool, base: Path, rows: Rows, tmp_path: Path) -> None:
    tokenizer = BaseFolder(base).tokenizer().fast
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = lora_model(base, adapter=False)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    trainer = make_trainer(base, rows, tmp_path, model=model, tokenizer=tokenizer)
    if not has_mask:
        pads = trainer.data_collator
        trainer.data_collator = lambda items: {k: v for k, v in pads(items).items() if k != "attention_mask"}
    verdict = begin(trainer).verdict
    assert errors_of(verdict) == set()
    for row in rows:
        row.pop("messages")
    assert errors_of(begin(trainer).verdict) == set()
