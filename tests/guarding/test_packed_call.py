"""Packed rows in the first call of the model: what is accused leaks, and what is silent does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import chat_rows, encoded, lora_model, losses_of, make_trainer
from transformers import DataCollatorWithFlattening, MistralForCausalLM, Trainer

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.guarding.packing import judge_call
from pytest_mistral_lora.guarding.steps import LOSS, PACKING, TrainerWatch

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST, SECOND = 9, 7


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, base: Path) -> Any:
    return MistralForCausalLM.from_pretrained(base, attn_implementation=request.param)


def _call(model: Any, **call: Any) -> tuple[Result, float]:
    """Return the judgement of a first call with two packed rows, and by how much it moves the second row's logits."""
    watch = TrainerWatch(None, model, None, lambda batch: None)
    model.train()
    ids = torch.arange(5, 5 + FIRST + SECOND)[None]
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
    packed = model(**{"input_ids": ids, "position_ids": positions, **call}).logits[:, FIRST:]
    result = watch.results()[PACKING]
    watch.leave()
    with torch.no_grad():
        alone = model(input_ids=ids[:, FIRST:], use_cache=False).logits
    return result, float((packed - alone).abs().max())


def _set_cache(model: Any) -> dict[str, Any]:
    model.config.use_cache = True
    return {}


def _checkpointed(model: Any) -> dict[str, Any]:
    model.config.use_cache = True
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return {}


def _blocks(model: Any) -> dict[str, Any]:
    tril = (torch.ones(size, size, dtype=torch.bool).tril() for size in (FIRST, SECOND))
    allowed = torch.block_diag(*tril)[None, None]
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    return {"attention_mask": mask, "use_cache": True}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda model: {"use_cache": False}, ""),
        (lambda model: {"use_cache": True}, "model(…, use_cache=True)"),
        (_set_cache, "model.config"),
        (_checkpointed, ""),
        (_blocks, ""),
    ],
    ids=["no cache", "argument", "configuration", "checkpointing", "block mask"],
)
def test_an_accused_call_leaks_and_a_silent_one_does_not(
    change: Callable[[Any], dict[str, Any]], place: str, model: Any
) -> None:
    model.config.use_cache = False
    try:
        result, apart = _call(model, **change(model))
    finally:
        model.config.use_cache = False
        model.gradient_checkpointing_disable()
    assert result.not_checked == ""
    assert [(finding.rule, str(finding.place)) for finding in result.findings] == ([("ML313", place)] if place else [])
    assert (apart > 0.1) if place else (apart < 1e-3)


def test_rows_that_are_not_packed_may_have_a_cache(model: Any) -> None:
    positions = torch.arange(FIRST + SECOND)[None]
    assert _call(model, position_ids=positions, use_cache=True)[0] == Result()
    assert _call(model, position_ids=None, use_cache=True)[0] == Result()
    padded = torch.cat([torch.arange(FIRST), torch.zeros(SECOND, dtype=torch.int64)])[None]
    assert _call(model, position_ids=padded, use_cache=True)[0] == Result()


def test_flash_attention_keeps_conversations_apart_by_their_positions(base: Path) -> None:
    # its kernels are not run here: transformers gives them the edges that the positions have
    model = MistralForCausalLM.from_pretrained(base)
    call = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True}
    for attention, reason in (("flash_attention_2", ""), ("mine", "the attention 'mine' is not known")):
        model.config._attn_implementation = attention
        result = judge_call(model.get_decoder(), call)
        assert (result.findings, result.not_checked[: len(reason) or 1]) == ((), reason)


def _packed_trainer(base: Path, oracle: Oracle, folder: Path, *, model: Any = None, **settings: Any) -> Trainer:
    trainer = make_trainer(base, encoded(oracle, chat_rows(8)), folder, model=model, max_steps=1, **settings)
    trainer.data_collator = DataCollatorWithFlattening()
    return trainer


def test_a_trainer_that_asks_for_a_cache_is_stopped(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    trainer = _packed_trainer(base, oracle, tmp_path / "sound")
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.findings == ()
    assert callback.verdict.facts[f"trainer::train::{PACKING}"] == {"attention": "sdpa"}

    model = lora_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = _packed_trainer(base, oracle, tmp_path / "cache", model=model)
    trainer.model.config.use_cache = True
    guard(trainer)
    with pytest.raises(GuardError, match=r"(?s)before a weight moves.*ML313 model\.config") as caught:
        trainer.train()
    assert [finding.rule for finding in caught.value.verdict.findings] == ["ML313"]
    assert losses_of(trainer) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.mistral_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
def test_a_packed_step_in_bfloat16_is_judged_on_a_gpu(
    is_fused: bool, base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    if is_fused:
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed here; tox run -e gpu")
    settings = {"use_cpu": False, "bf16": True, "use_liger_kernel": is_fused}
    trainer = _packed_trainer(base, oracle, tmp_path / "sound", **settings)
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.findings == ()
    facts = callback.verdict.facts[f"trainer::train::{LOSS}"]
    assert facts["labels"] == facts["positions with a gradient"] == facts["compared"] > 10

    faulty = _packed_trainer(base, oracle, tmp_path / "faulty", **settings)
    own = faulty.compute_loss

    def of_every_token(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        return own(model, {**inputs, "labels": inputs["input_ids"].clone()}, *given, **named)

    faulty.compute_loss = of_every_token
    guard(faulty)
    with pytest.raises(GuardError, match="ML326"):
        faulty.train()
    assert losses_of(faulty) == []


def test_the_text_model_in_a_model_of_images_is_judged(oracle: Oracle, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    wrapped = Architecture(TEXT_MODELS["mistral"], is_wrapped=True)
    base = write_tiny_base(tmp_path / "base", oracle.path, architecture=wrapped)
    model = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="sdpa")
    for use_cache in (False, True):
        model.config.use_cache = model.config.text_config.use_cache = use_cache
        result, apart = _call(model)
        assert [finding.rule for finding in result.findings] == ["ML313"] * use_cache
        assert (apart > 0.1) if use_cache else (apart < 1e-3)
