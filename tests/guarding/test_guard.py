"""What the guard finds in a run that has not begun, and what it does then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, errors_of, lora_model, losses_of, make_trainer
from torch.utils.data import IterableDataset

from pytest_mistral_lora import GuardError, MistralGuard, guard
from pytest_mistral_lora.chat.kinds.fim import FimRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.finding import RULES, _read_rules
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.guarding.batches import ModelBatch
from pytest_mistral_lora.guarding.run_judge import REPORTS

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.mistral_gpu, NO_CUDA])]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8), messages=True)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return BaseFolder(base).tokenizer().fast


def test_a_guard_judges_by_the_rules_of_a_version(
    base: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows[0]["labels"] = [*rows[0]["labels"][:-1], -100]
    trainer = make_trainer(base, rows, tmp_path)
    with pytest.raises(GuardError) as stopped:
        begin(trainer, rules="0.1")
    broken = {found.rule for found in stopped.value.verdict.findings if found.severity == "error"}
    for rule in broken:
        monkeypatch.setitem(_read_rules(RULES[rule].subject), rule, replace(RULES[rule], since="0.2"))
    callback = begin(make_trainer(base, rows, tmp_path), rules="0.1")
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert {found.rule for found in callback.verdict.findings} >= broken
    with pytest.raises(InputError, match=r"^rules=: "):
        MistralGuard(rules="0.9")


@pytest.mark.parametrize("device", DEVICES)
def test_a_sound_run_with_the_callback_alone_goes_on(device: str, base: Path, oracle: Oracle, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "use_cpu": device == "cpu"}
    trainer = make_trainer(base, encoded(oracle, chat_rows(8)), tmp_path, **settings)
    callback = MistralGuard()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.verdict is not None
    assert (callback.verdict.ok, callback.verdict.findings) == (True, ())
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 8
    assert "trained on" not in str(callback.verdict)
    assert "guard: 8 rows of" in str(callback.verdict)
    assert len(losses_of(trainer)) == 1
    assert not any((tmp_path / name).exists() for name in REPORTS)


@pytest.mark.parametrize("device", DEVICES)
def test_a_fault_stops_the_run_before_a_weight_moves(device: str, base: Path, rows: Rows, tmp_path: Path) -> None:
    rows[5]["labels"][-1] = -100
    model = lora_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(base, rows, tmp_path, model=model, use_cpu=device == "cpu")
    callback = guard(trainer)
    with pytest.raises(GuardError, match="before a weight moves") as caught:
        trainer.train()
    assert caught.value.verdict is callback.verdict
    assert errors_of(callback.verdict) == {("ML546", "train_dataset[5]")}
    assert (losses_of(trainer), trainer.state.global_step) == ([], 0)
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in model.state_dict().items())


def test_a_warning_lets_the_run_go_on_and_writes_the_verdict(
    base: Path, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows[5]["labels"][-1] = -100
    trainer = make_trainer(base, rows, tmp_path / "out", max_steps=1)
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert len(losses_of(trainer)) == 1
    assert errors_of(callback.verdict) == {("ML546", "train_dataset[5]")}
    assert "ML546 train_dataset[5]" in caplog.text
    report = json.loads((tmp_path / "out" / REPORTS[0]).read_text())
    assert [cause["rule"] for cause in report["causes"]] == ["ML546"]
    assert "ML546" in (tmp_path / "out" / REPORTS[1]).read_text()


@pytest.mark.parametrize("has_texts", [True, False], ids=["with texts", "ids alone"])
def test_gaps_are_compared_with_the_texts_beside_them(
    has_texts: bool, base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    gaps = [FimRow.of(f"def f{n}(x):\n    return ", "\n\nprint(f())\n", f"x + {n}") for n in range(4)]
    rows = encoded(oracle, gaps)
    if has_texts:
        rows = [row | gap.to_json() for row, gap in zip(rows, gaps, strict=True)]
    assert errors_of(begin(make_trainer(base, rows, tmp_path)).verdict) == set()
    # a sound gap, but of another row
    rows[2] |= {key: rows[1][key] for key in ("input_ids", "labels")}
    verdict = begin(make_trainer(base, rows, tmp_path), on_finding="warn").verdict
    assert errors_of(verdict) == ({("ML534", "train_dataset[2]")} if has_texts else set())


@pytest.mark.parametrize("messages", [True, False])
def test_an_id_without_a_row_is_found_with_the_number_of_rows(
    messages: bool, base: Path, oracle: Oracle, tokenizer: Any, tmp_path: Path
) -> None:
    rows = encoded(oracle, chat_rows(4), messages=messages)
    rows[1]["input_ids"][6] = 40_000
    verdict = begin(make_trainer(base, rows, tmp_path, tokenizer=tokenizer), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML520", "train_dataset[1]")}
    assert verdict is not None
    assert ("40000" in verdict.findings[0].found, "32,768 rows" in verdict.findings[0].next_step) == (True, True)
    assert "\N{REPLACEMENT CHARACTER}" not in str(verdict)


def test_a_run_without_an_adapter_says_so(base: Path, tokenizer: Any, rows: Rows, tmp_path: Path) -> None:
    model = lora_model(base, adapter=False)
    verdict = begin(make_trainer(base, rows, tmp_path, model=model, tokenizer=tokenizer)).verdict
    assert verdict is not None
    assert verdict.ok
    assert verdict.not_checked["trainer::train::only-lora-changed"] == "the model has no LoRA adapter"


def test_a_pad_that_is_eos_is_a_fault_only_if_no_label_is_eos(
    base: Path, rows: Rows, tmp_path: Path, tokenizer: Any
) -> None:
    pad = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        model = lora_model(base)
        model.config.pad_token_id = tokenizer.pad_token_id
        sound = make_trainer(base, rows, tmp_path, model=model, tokenizer=tokenizer)
        assert errors_of(begin(sound).verdict) == set()
        for row in rows:
            row["labels"][-1] = -100
        masked = make_trainer(base, rows, tmp_path, model=model, tokenizer=tokenizer)
        found = errors_of(begin(masked, on_finding="warn").verdict)
        assert {rule for rule, _ in found} == {"ML204", "ML546"}
    finally:
        tokenizer.pad_token = pad


def test_another_chat_template_is_found(base: Path, rows: Rows, tmp_path: Path, tokenizer: Any) -> None:
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("[INST] ", "[INST]")
    assert tokenizer.chat_template != template
    try:
        trainer = make_trainer(base, rows, tmp_path, tokenizer=tokenizer)
        found = errors_of(begin(trainer, on_finding="warn").verdict)
    finally:
        tokenizer.chat_template = template
    assert found == {("ML442", "processing_class, chat_template")}


def test_an_unknown_tokenizer_is_never_a_pass(base: Path, rows: Rows, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    unknown = PreTrainedTokenizerFast(tokenizer_object=tiny, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    trainer = make_trainer(base, rows, tmp_path, tokenizer=unknown)
    with pytest.raises(GuardError, match=r"guard\(trainer, tokenizer="):
        begin(trainer)
    verdict = begin(trainer, on_finding="warn").verdict
    assert verdict is not None
    assert not verdict.ok
    assert errors_of(verdict) == {("ML229", "processing_class")}
    assert "batches::encoded::ids" in verdict.not_checked
    named = begin(trainer, tokenizer="spm-v3", on_finding="warn").verdict
    assert named is not None
    assert named.facts["batches::encoded::labels"]["judged"] == 8


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_a_stream_is_judged_as_it_comes(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = encoded(oracle, chat_rows(12))
    rows[9]["labels"] = list(rows[9]["input_ids"])
    trainer = make_trainer(base, Stream(rows), tmp_path, max_steps=3)
    callback = guard(trainer, batches=6)
    with pytest.raises(GuardError, match=r"(?s)is stopped at batch 5\n.*batches\[4\]\[1\]"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert errors_of(callback.verdict) == {("ML543", "batches[4][1]")}


def test_an_error_of_the_guard_stops_and_is_logged_by_a_warning(
    base: Path, rows: Rows, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(base, rows, tmp_path, tokenizer=tokenizer)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GuardError, match="empty"):
        begin(trainer, tokenizer=empty)
    assert begin(trainer, tokenizer=empty, on_finding="warn").verdict is None
    assert "the guard could not judge the run" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": 0}, "batches=: 0"),
        ({"on_finding": "ask"}, "on_finding=: 'ask'"),
        ({"tokenizer": "spm-v33"}, r"spm-v33: no such file or folder \(did you mean 'spm-v3'\?\)"),
        ({"tokenizer": "models/dmo"}, "models/dmo: no such file or folder"),
    ],
)
def test_a_wrong_argument_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MistralGuard(**settings)


def test_a_block_mask_numbers_the_conversations_of_a_row() -> None:
    blocks = torch.block_diag(*(torch.ones(size, size).tril() for size in (2, 3)), torch.zeros(1, 1)).bool()
    ids = torch.arange(6)[None]
    batch = ModelBatch({"input_ids": ids, "labels": ids, "attention_mask": blocks[None, None]})
    assert batch.records()[0]["attention_mask"] == [1, 1, 2, 2, 2, 0]
    additive = torch.where(blocks, 0.0, torch.finfo(torch.float32).min)[None, None]
    batch = ModelBatch({"input_ids": ids, "labels": ids, "attention_mask": additive})
    assert batch.records()[0]["attention_mask"] == [1, 1, 2, 2, 2, 0]


def test_a_token_that_does_not_attend_to_itself_is_hidden() -> None:
    """A mask with true where a token must not attend: transformers takes true for a token that attends."""
    ids = torch.arange(4)[None]
    batch = ModelBatch({"input_ids": ids, "labels": ids, "attention_mask": ~torch.ones(1, 1, 4, 4).tril().bool()})
    assert batch.records()[0]["attention_mask"] == [0, 0, 0, 0]


def test_a_block_mask_numbers_from_one_behind_padding() -> None:
    blocks = torch.block_diag(torch.zeros(2, 2), *(torch.ones(size, size).tril() for size in (2, 1))).bool()
    ids = torch.arange(5)[None]
    batch = ModelBatch({"input_ids": ids, "labels": ids, "attention_mask": blocks[None, None]})
    assert batch.records()[0]["attention_mask"] == [0, 0, 1, 1, 2]
