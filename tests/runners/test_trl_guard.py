"""The guard in TRL's own SFTTrainer. Left out, with the reason, where TRL is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from faulty_templates import CHATML, CHATML_MARKED
from guarded_runs import TRL_SETTINGS, Losses, chat_rows, losses_of
from transformers import MistralForCausalLM

from pytest_mistral_lora import GuardError, guard, training_template
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

trl = pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 64},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("trl") / "base", shipped_tokenizer("spm-v3"))


@pytest.fixture(scope="module")
def template(base: Path) -> str:
    return training_template(base)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return BaseFolder(base).tokenizer().fast


def _trainer(base: Path, tokenizer: Any, template: str, output: Path, **settings: Any) -> Any:
    from peft import LoraConfig
    from transformers import MistralForCausalLM, set_seed

    set_seed(0)
    tokenizer.chat_template, tokenizer.pad_token = template, "<unk>"
    arguments = {
        "assistant_only_loss": True,
        "max_length": None,
        **TRL_SETTINGS,
        **settings,
    }
    return trl.SFTTrainer(
        model=MistralForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(output_dir=str(output), **arguments),
        train_dataset=Dataset.from_list([{"messages": list(row.messages)} for row in chat_rows(16)]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1),
        callbacks=[Losses()],
    )


def _without_space(template: str) -> str:
    return template.replace("[INST] ", "[INST]")


def _stopped(trainer: Any) -> Any:
    """Return the findings for which the guard stops a run before its first step."""
    guard(trainer)
    with pytest.raises(GuardError) as caught:
        trainer.train()
    assert (losses_of(trainer), trainer.state.global_step) == ([], 0)
    return caught.value.verdict.findings


@pytest.mark.parametrize("change", [_without_space, lambda template: CHATML_MARKED], ids=["no space", "ChatML"])
def test_a_template_is_the_one_cause_of_the_rows_that_it_encodes(
    change: Any, base: Path, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    [finding] = _stopped(_trainer(base, tokenizer, change(template), tmp_path))
    assert (finding.rule, str(finding.place)) == ("ML442", "processing_class, chat_template")
    assert sum(count for _, count in finding.covers) >= 16
    assert "chat_template_path" in finding.next_step
    assert "checkpoints/my-mistral" not in finding.next_step


def test_a_second_fault_is_reported_beside_the_template(
    base: Path, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    first, *others = _stopped(_trainer(base, tokenizer, CHATML, tmp_path, assistant_only_loss=False))
    assert first.rule == "ML442"
    assert {finding.rule for finding in others} == {"ML543"}
    assert [str(finding.place) for finding in others] == [f"train_dataset[{number}]" for number in range(16)]


def test_every_token_is_an_error_with_two_ways_out(base: Path, tokenizer: Any, template: str, tmp_path: Path) -> None:
    found = _stopped(_trainer(base, tokenizer, template, tmp_path, assistant_only_loss=False))
    assert {finding.rule for finding in found} == {"ML543"}
    assert all(way in found[0].next_step for way in ("assistant_only_loss: true", "objective='everything'"))
    assert "Tell me of" in found[0].row


def test_assistant_only_loss_declares_the_answers(base: Path, tokenizer: Any, template: str, tmp_path: Path) -> None:
    trainer = _trainer(base, tokenizer, template, tmp_path)
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.facts["batches::encoded::labels"]["objective"] == "answers (assistant_only_loss: true)"


@pytest.mark.parametrize("packing", [False, True])
def test_answers_of_a_prompt_have_no_loss_and_are_no_fault(
    packing: bool, base: Path, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    prompt = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "I guess."}]
    prompt += [{"role": "user", "content": "Sure?"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": f"Yes, {n}."}]} for n in range(8)]
    tokenizer.chat_template, tokenizer.pad_token = template, "<unk>"
    trainer = trl.SFTTrainer(
        model=MistralForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            max_length=64 if packing else None,
            packing=packing,
            **TRL_SETTINGS,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok


def test_ids_have_the_labels_of_whoever_made_them_whatever_an_argument_says(
    base: Path, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    trainer = _trainer(base, tokenizer, template, tmp_path)
    chat = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "I guess.", "weight": 0}]
    chat += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    encoded = BaseFolder(base).tokenizer().oracle.encode(Row.from_dict({"messages": chat}))
    row = {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}
    trainer.train_dataset = Dataset.from_list([row] * 8)
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert "objective" not in callback.verdict.facts["batches::encoded::labels"]


def test_a_masked_eos_is_stopped(base: Path, tokenizer: Any, template: str, tmp_path: Path) -> None:
    trainer = _trainer(base, tokenizer, template, tmp_path)

    def mask(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [-100 if label == tokenizer.eos_token_id else label for label in row["labels"]]}

    trainer.train_dataset = trainer.train_dataset.map(mask)
    guard(trainer)
    with pytest.raises(GuardError, match=r"ML546 train_dataset\[\d+\]") as caught:
        trainer.train()
    assert losses_of(trainer) == []
    assert "columns of `labels`" in caught.value.verdict.findings[0].next_step


def test_packing_that_leaks_is_stopped(base: Path, tokenizer: Any, template: str, tmp_path: Path) -> None:
    trainer = _trainer(base, tokenizer, template, tmp_path, packing=True, packing_strategy="wrapped", max_length=64)
    guard(trainer)
    with pytest.raises(GuardError) as caught:
        trainer.train()
    assert losses_of(trainer) == []
    assert "ML513" in {finding.rule for finding in caught.value.verdict.findings}


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_trained_on_if_that_is_declared(
    shape: str, base: Path, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    trainer = _trainer(base, tokenizer, template, tmp_path, **SHAPES[shape], assistant_only_loss=False)
    callback = guard(trainer, objective="everything")
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    trainer = _trainer(base, tokenizer, template, tmp_path, **SHAPES[shape])
    guard(trainer, objective="everything")
    words = r"two objectives are declared: everything \(objective=\) and answers \(assistant_only_loss: true\)"
    # packed rows do not tell whether the trainer has made them of messages, but the labels contradict the objective
    with pytest.raises(GuardError, match="ML551" if shape == "packed" else words):
        trainer.train()
