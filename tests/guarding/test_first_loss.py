"""What the first step trains for is compared with the labels, by the gradient of the trainer's own call."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from guarded_runs import chat_rows, encoded, lora_model, losses_of, make_trainer
from guarded_runs import first_loss as _result
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.training_args import OptimizerNames

from pytest_mistral_lora import GuardError, MistralGuard, Verdict, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.guarding.loss import LossSettings
from pytest_mistral_lora.guarding.run_judge import REPORTS
from pytest_mistral_lora.guarding.steps import LOSS, TrainerWatch

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

CASE = f"trainer::train::{LOSS}"

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8))


def _verdict(trainer: Any) -> Verdict:
    """Run the first step of a trainer with the guard."""
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert callback.verdict is not None
    return callback.verdict


def _pass(batch: Any) -> None:
    """Look at no batch: the gradient is judged alone."""


def _found(judged: Verdict | Result) -> list[tuple[str, str]]:
    return [(finding.rule, str(finding.place)) for finding in judged.findings]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return lora_model(base)


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
        outputs.logits[:, :-1].contiguous(),
        labels[:, 1:],
        outputs.logits.shape[-1],
        num_items_in_batch=num_items_in_batch,
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


def _mean_of_rows(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = _loss(outputs.logits, labels, reduction="none").reshape(len(labels), -1)
    mask = labels[:, 1:] != -100
    return (losses.sum(dim=1) / mask.sum(dim=1)).mean()


def _dynamic(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = _loss(outputs.logits, labels, reduction="none")
    return (losses * torch.exp(-losses.detach())).sum() / (labels[:, 1:] != -100).sum()


def _with_share_of_norms_of_labels(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    norms = torch.logsumexp(outputs.logits.float(), -1)[:, :-1][labels[:, 1:] != -100]
    return _loss(outputs.logits, labels) + 1e-4 * (norms**2).mean()


@pytest.mark.parametrize(
    ("function", "words"), [(_shifted_twice, "labels that are shifted twice"), (_not_shifted, "not shifted")]
)
def test_a_loss_function_with_another_shift_is_an_error(
    function: Callable[..., Any], words: str, base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=model)
    trainer.compute_loss_func = function
    result = _result(trainer)
    assert _found(result) == [("ML326", "compute_loss_func")]
    assert words in result.findings[0].found


def test_a_batch_without_a_label_has_no_loss_to_compare(base: Path, model: Any, rows: Rows, tmp_path: Path) -> None:
    # a label of the first token is predicted from nothing
    unlabelled = [row | {"labels": [row["input_ids"][0], *[-100] * (len(row["labels"]) - 1)]} for row in rows]
    result = _result(make_trainer(base, unlabelled, tmp_path, model=model))
    assert result.findings == ()
    assert "no token of the first batch has a label" in result.not_checked


def test_a_batch_with_one_label_has_a_loss_to_compare(base: Path, model: Any, rows: Rows, tmp_path: Path) -> None:
    one = rows[0] | {"labels": [*[-100] * (len(rows[0]["labels"]) - 1), rows[0]["input_ids"][-1]]}
    result = _result(make_trainer(base, [one], tmp_path, model=model, per_device_train_batch_size=1))
    assert (result.findings, result.not_checked) == ((), "")


@pytest.fixture(scope="module")
def peaked(base: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has learned the rows: most of its next tokens are sure, those of the prompts among them."""
    learned = lora_model(base, adapter=False)
    everything = [row | {"labels": row["input_ids"]} for row in rows]
    settings = {"learning_rate": 3e-3, "num_train_epochs": 20, "max_steps": -1}
    make_trainer(base, everything, tmp_path_factory.mktemp("peaked"), model=learned, **settings).train()
    return learned


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        *product((_sound, _sound_mean, _sum, _mean_of_rows, _dynamic), ("fresh", "peaked")),
        # beside a loss of nearly nothing, the norms decide where the gradient leads
        (_with_share_of_norms_of_labels, "fresh"),
    ],
)
def test_a_sound_loss_function_is_silent(
    function: Callable[..., Any], kind: str, base: Path, rows: Rows, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("model" if kind == "fresh" else "peaked")
    trainer = make_trainer(base, rows, tmp_path, model=model)
    trainer.compute_loss_func = function
    result = _result(trainer)
    assert (result.findings, result.not_checked) == ((), "")
    facts = dict(result.facts)
    assert facts["positions with a gradient"] == facts["labels"]
    assert facts["compared"] > 0


def test_a_warning_is_written_with_the_rest_of_the_verdict(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = _shifted_twice
    verdict = _verdict(trainer)
    assert _found(verdict) == [("ML326", "compute_loss_func")]
    assert not verdict.ok
    assert verdict.facts["batches::encoded::labels"]["judged"] == 8
    report = json.loads((tmp_path / REPORTS[0]).read_text())
    assert [cause["rule"] for cause in report["causes"]] == ["ML326"]
    assert (report["counts"]["not_run"], report["counts"]["failed"]) == (0, 1)


def _weighing_the_last(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = _loss(outputs.logits, labels, reduction="none").reshape(len(labels), -1)
    return (losses * torch.where(labels[:, 1:] == 2, 2.0, 1.0)).sum() / (labels[:, 1:] != -100).sum()


def test_weights_that_nothing_declares_are_a_note(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = _weighing_the_last
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    [finding] = callback.verdict.findings
    assert (finding.rule, finding.severity) == ("ML327", "note")
    assert "from 0.5 to 1 of the largest" in finding.found
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


def _overridden(base: Path, model: Any, rows: Rows, folder: Path, change: Any) -> Any:
    trainer = make_trainer(base, rows, folder, model=model)
    trainer.__class__ = type("Overridden", (Overridden,), {"change": staticmethod(change)})
    return trainer


def _masked(name: str) -> Any:
    def change(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = _loss(logits, batch["input_ids"], reduction="none")
        mask = batch[name][:, 1:].reshape(-1)
        return (losses * mask).sum() / mask.sum()

    return change


def _backwards(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), batch["labels"][:, :-1].flatten())


def _cut_mask(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = _loss(logits, batch["input_ids"], reduction="none")
    mask = (batch["labels"] != -100)[:, :-1].reshape(-1)
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda logits, batch: _loss(logits, batch["input_ids"]),
            "every token, the prompt included: 26 tokens without a label: the first is '[INST]' (3) at row 0, token 1",
        ),
        (
            lambda logits, batch: _loss(logits, batch["input_ids"], ignore_index=0),
            "every token, the prompt included: 24 tokens",
        ),
        (
            lambda logits, batch: _loss(logits, batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)),
            "the padding, 2 tokens",
        ),
        (
            lambda logits, batch: _loss(logits, batch["input_ids"], by=0),
            "labels that are not shifted",
        ),
        (lambda logits, batch: _loss(logits, batch["labels"], by=2), "labels that are shifted twice"),
        (_cut_mask, "the mask of the labels, not shifted"),
        (_backwards, "labels that are shifted the wrong way"),
        (lambda logits, batch: _loss(logits, batch["labels"].clamp(min=0)), "trains for"),
        (lambda logits, batch: -_loss(logits, batch["labels"]), "trains to avoid 30 of 30 labels"),
        (lambda logits, batch: _loss(logits[:1], batch["labels"][:1]), "does not train on"),
        (lambda logits, batch: _loss(logits[:, -2:], batch["labels"][:, -2:]), "does not train on"),
        (lambda logits, batch: logits.sum() * 0, "does not train on 30 of 30 labels"),
        (
            lambda logits, batch: _loss(logits, batch["labels"].masked_fill(batch["labels"] == 2, -100)),
            "does not train on 2 of 30 labels: the first is '</s>' (2) at row 0, token 26",
        ),
        (
            lambda logits, batch: _loss(
                logits, batch["input_ids"].masked_fill((batch["labels"] != -100) | (batch["attention_mask"] == 0), -100)
            ),
            "does not train on 30 of 30 labels",
        ),
    ],
)
def test_another_mask_is_an_error(change: Any, words: str, base: Path, model: Any, rows: Rows, tmp_path: Path) -> None:
    result = _result(_overridden(base, model, rows, tmp_path, change))
    assert _found(result) == [("ML326", "Overridden.compute_loss")]
    assert words in result.findings[0].found


def _with_share_of_norms(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return _loss(logits, batch["labels"]) + 1e-4 * (torch.logsumexp(logits, -1) ** 2).mean()


def _with_share_of_prompt(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return _loss(logits, batch["labels"]) + 0.1 * _loss(logits, batch["input_ids"])


def _with_distance_to_noise(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    other = (logits.detach() + torch.randn_like(logits)).log_softmax(-1)
    apart = torch.nn.functional.kl_div(logits.log_softmax(-1), other, log_target=True, reduction="batchmean")
    return _loss(logits, batch["labels"]) + 1e-3 * apart


@pytest.mark.parametrize("change", [_with_share_of_norms, _with_share_of_prompt, _with_distance_to_noise])
@pytest.mark.parametrize("kind", ["fresh", "peaked"])
def test_another_term_of_the_loss_is_a_note(
    change: Any, kind: str, base: Path, rows: Rows, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("model" if kind == "fresh" else "peaked")
    result = _result(_overridden(base, model, rows, tmp_path, change))
    assert [rule for rule, _ in _found(result)] == ["ML327"]
    assert "another term of the loss reaches 2" in result.findings[0].found
    assert "'[INST]' (3) at row 0, token 1" in result.findings[0].found


def _to_a_teacher(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    has_label = batch["labels"][:, 1:] != -100
    teacher = torch.randn_like(logits[:, :-1]).softmax(-1)
    return -(teacher * logits[:, :-1].log_softmax(-1)).sum(-1)[has_label].mean()


def test_a_distillation_has_no_tokens_to_compare(base: Path, model: Any, rows: Rows, tmp_path: Path) -> None:
    result = _result(_overridden(base, model, rows, tmp_path, _to_a_teacher))
    assert result.findings == ()
    assert "is not that of one token" in result.not_checked


def _with_column(trainer: Any, values: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Let the collator write a column `loss_mask` that is made of the labels."""
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (batch := collate(rows)) | {"loss_mask": values(batch["labels"])}
    trainer.args.remove_unused_columns = False
    return trainer


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda labels: torch.arange(labels.shape[1]).expand_as(labels) > 1, "trains on 24 tokens without a label"),
        (lambda labels: (labels != -100) & (labels != 2), "does not train on 2 of 30 labels"),
        (lambda labels: (labels != -100).long(), ""),
        # weights, but no other tokens
        (lambda labels: (labels != -100) * (1 + labels % 3 / 2), ""),
        (lambda labels: 0.1 + 0.9 * (labels != -100), ""),
    ],
    ids=["wider", "narrower", "the same", "weights", "a weight of the prompt"],
)
def test_a_mask_that_only_the_loss_reads_has_the_tokens_of_the_labels(
    values: Any, words: str, base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    result = _result(_with_column(_overridden(base, model, rows, tmp_path, _masked("loss_mask")), values))
    assert _found(result) == ([("ML326", "Overridden.compute_loss")] if words else [])
    assert words in "".join(finding.found for finding in result.findings)
    assert result.not_checked == ""


class Relabelled(Trainer):  # type: ignore[misc]
    """A trainer that changes the labels, and lets the model compute the loss."""

    def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
        labels = inputs["labels"]
        inputs["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        return super().compute_loss(model, inputs, **named)


def test_labels_that_are_shifted_before_the_model_shifts_them_are_an_error(
    base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=model)
    trainer.__class__ = Relabelled
    result = _result(trainer)
    assert _found(result) == [("ML326", "Relabelled.compute_loss")]
    assert "shifted twice" in result.findings[0].found


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 1},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_a_declared_loss_is_silent(
    settings: dict[str, Any], base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    result = _result(make_trainer(base, rows, tmp_path, model=model, **settings))
    assert (result.findings, result.not_checked) == ((), "")
    assert dict(result.facts)["compared"] == 30


def test_a_step_of_several_batches_with_noise_in_the_embeddings_is_silent(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "neftune_noise_alpha": 5.0}
    verdict = _verdict(make_trainer(base, rows, tmp_path, max_steps=1, **settings))
    assert (verdict.findings, verdict.ok) == ((), True)
    assert CASE not in verdict.not_checked
    assert verdict.facts[CASE]["compared"] == verdict.facts[CASE]["labels"]


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


def test_the_loss_of_experts_is_silent(oracle: Oracle, rows: Rows, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", oracle.path, architecture=Architecture(TEXT_MODELS["mixtral"]))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    model.config.router_aux_loss_coef = 0.5
    trainer = make_trainer(base, rows, tmp_path, model=model)
    result = _result(trainer)
    assert (result.findings, result.not_checked) == ((), "")
    trainer.compute_loss_func = _shifted_twice
    assert _found(_result(trainer)) == [("ML326", "compute_loss_func")]


def test_a_model_in_bfloat16_is_judged(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=lora_model(base, adapter=False).to(torch.bfloat16))
    assert _result(trainer).findings == ()
    trainer.compute_loss_func = _shifted_twice
    assert _found(_result(trainer)) == [("ML326", "compute_loss_func")]
    trainer.compute_loss_func = _half
    assert _result(trainer).findings == ()


@pytest.mark.parametrize(("by", "found"), [(1, []), (2, ["ML326"]), (0, ["ML326"])])
def test_labels_that_the_collator_shifts_are_judged(
    by: int, found: list[str], base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=model)
    collate = trainer.data_collator

    def shifted(batch: Rows) -> dict[str, torch.Tensor]:
        columns = collate(batch)
        ahead = torch.nn.functional.pad(columns["labels"], (0, by), value=-100)[:, by:]
        return {**columns, "shift_labels": ahead.contiguous()}

    trainer.data_collator = shifted
    result = _result(trainer)
    assert ([rule for rule, _ in _found(result)], result.not_checked) == (found, "")
    assert all("shifted" in finding.found for finding in result.findings)


class Looking(Trainer):  # type: ignore[misc]
    """A trainer that looks at the beginning of each row before its loss."""

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :3])
        return super().compute_loss(model, inputs, *given, **named)


def test_a_call_without_a_gradient_is_not_that_of_the_loss(base: Path, model: Any, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=model)
    trainer.__class__ = Looking
    result = _result(trainer)
    assert (result.findings, result.not_checked) == ((), "")
    trainer.compute_loss_func = _shifted_twice
    assert _found(_result(trainer)) == [("ML326", "compute_loss_func")]


def _half(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _without_labels(trainer: Any) -> None:
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {name: value for name, value in collate(rows).items() if name != "labels"}
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()


def _with_odd_labels(trainer: Any) -> None:
    """Break what the check reads, and not the run."""
    trainer.args.label_smoothing_factor = "two"


def _with_two_calls(trainer: Any) -> None:
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        _loss(outputs.logits, labels) + trainer.model(input_ids=labels.clamp(min=0)).logits.mean()
    )


def _with_a_dropping_head(trainer: Any) -> None:
    head = trainer.model.get_output_embeddings()
    trainer.model.get_base_model().lm_head = torch.nn.Sequential(head, torch.nn.Dropout(0.1))


def _without_numbers(trainer: Any) -> None:
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * torch.inf


def _with_prompt_learning(kind: type, **settings: Any) -> Callable[[Any], None]:
    def change(trainer: Any) -> None:
        base = trainer.model.unload()
        trainer.model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **settings))

    return change


def _with_cut_cross_entropy(trainer: Any) -> None:
    """Patch the model as that library does; it is not installed, so the forward is the model's own."""
    model = trainer.model.get_base_model()

    @functools.wraps(type(model).forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        return type(self).forward(self, *given, **named)

    forward.__module__ = "cut_cross_entropy.transformers.llama"
    model.forward = MethodType(forward, model)


def _with_copies(trainer: Any) -> None:
    trainer.model_wrapped = torch.nn.DataParallel(trainer.model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_prompt_learning(PromptTuningConfig), "PROMPT_TUNING adds tokens"),
        (_with_prompt_learning(PromptEncoderConfig, encoder_hidden_size=8), "P_TUNING adds tokens"),
        (_with_cut_cross_entropy, "cut-cross-entropy"),
        (_with_copies, "DataParallel"),
        (_without_labels, "the batch has no `labels`"),
        (_with_two_calls, "made 2 calls"),
        (_with_a_dropping_head, "the head has dropout"),
        (_without_numbers, "is not finite"),
        (_with_odd_labels, "ValueError"),
    ],
)
def test_what_cannot_be_compared_is_not_checked(
    change: Callable[[Any], None], reason: str, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    change(trainer)
    result = _result(trainer)
    assert result.findings == ()
    assert reason in result.not_checked


def test_an_optimizer_that_moves_weights_in_the_backward_pass_is_not_checked(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    for name, is_read in (("adamw_torch", True), ("lomo", False), ("galore_adamw_layerwise", False)):
        trainer.args.optim = OptimizerNames(name)
        unread = LossSettings.of(trainer, trainer.model, "the first step").unread
        assert unread == ("" if is_read else f"the optimizer {name} moves weights in the backward pass")


def test_positions_are_judged_where_tokens_cannot_be_told(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    _with_a_dropping_head(trainer)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: trainer.model.loss_function(
        outputs.logits, labels.clamp(min=0), vocab_size=outputs.logits.shape[-1]
    )
    [finding] = _result(trainer).findings
    assert (finding.rule, finding.severity, str(finding.place)) == ("ML327", "note", "compute_loss_func")
    assert "without a label: the first is" in finding.found


def _head_alone(base: Path, kind: str) -> Any:
    if kind == "lora":
        return lora_model(base, target_modules=["lm_head"], lora_dropout=0.0)
    model = lora_model(base, adapter=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    return model


@pytest.mark.parametrize("kind", ["weight", "lora"])
def test_a_model_of_which_only_the_head_is_trained_is_judged(kind: str, base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=_head_alone(base, kind))
    result = _result(trainer)
    assert (result.findings, result.not_checked) == ((), "")
    assert dict(result.facts)["compared"] == 30
    trainer.compute_loss_func = _shifted_twice
    assert _found(_result(trainer)) == [("ML326", "compute_loss_func")]
    trainer.compute_loss_func = None
    trainer.__class__ = type(
        "Overridden",
        (Overridden,),
        {"change": staticmethod(lambda logits, batch: _loss(logits, batch["input_ids"]))},
    )
    assert "the prompt included" in _result(trainer).findings[0].found


def test_a_learned_prefix_adds_no_token(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    _with_prompt_learning(PrefixTuningConfig)(trainer)
    result = _result(trainer)
    assert (result.findings, result.not_checked, dict(result.facts)["compared"]) == ((), "", 30)
    trainer.compute_loss_func = _shifted_twice
    assert _found(_result(trainer)) == [("ML326", "compute_loss_func")]


def test_a_head_that_is_trained_alone_gets_the_same_weights(base: Path, rows: Rows, tmp_path: Path) -> None:
    heads = []
    for is_guarded in (False, True):
        trainer = make_trainer(base, rows, tmp_path, model=_head_alone(base, "weight"))
        if is_guarded:
            guard(trainer)
        trainer.train()
        heads.append(trainer.model.lm_head.weight.detach())
    assert torch.equal(*heads)


def test_without_a_trainer_the_loss_is_not_checked(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.compute_loss_func = _shifted_twice
    callback = MistralGuard()

    class Between(TrainerCallback):  # type: ignore[misc]
        """Passes the events on: the trainer does not know the guard."""

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            callback.on_train_begin(*given, **named)

        def on_pre_optimizer_step(self, *given: Any, **named: Any) -> None:
            callback.on_pre_optimizer_step(*given, **named)

    trainer.add_callback(Between())
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert "guard(trainer)" in callback.verdict.not_checked[CASE]


def test_a_step_without_compute_loss_is_not_checked(base: Path, rows: Rows, tmp_path: Path) -> None:
    class Short(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = make_trainer(base, rows, tmp_path, max_steps=1)
    trainer.__class__ = Short
    verdict = _verdict(trainer)
    assert "compute_loss" in verdict.not_checked[CASE]
    assert "compute_loss" not in vars(trainer)


def test_a_trainer_gets_back_what_it_had_and_can_be_copied_before(
    base: Path, model: Any, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path, model=model)
    own = trainer.compute_loss = functools.partial(Trainer.compute_loss, trainer)
    watch = TrainerWatch(trainer.args, model, trainer, _pass)
    assert trainer.compute_loss is not own
    assert inspect.signature(trainer.compute_loss) == inspect.signature(own)
    watch.leave()
    assert trainer.compute_loss is own
    del trainer.compute_loss
    watch = TrainerWatch(trainer.args, model, trainer, _pass)
    del trainer.compute_loss
    watch.leave()
    assert "compute_loss" not in vars(trainer)


class Small:
    """What a trainer needs to be watched."""

    def compute_loss(self, model: Any, inputs: Any) -> int:
        return 1


def test_a_copy_of_a_watched_trainer_is_not_watched() -> None:
    trainer = Small()
    TrainerWatch(None, None, trainer, _pass)
    for copied in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        assert copied.compute_loss.__self__ is copied
        assert copied.compute_loss(None, {}) == 1


def test_an_exception_of_the_loss_is_the_users(base: Path, rows: Rows, tmp_path: Path) -> None:
    def fails(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        raise KeyError("mine")

    trainer = make_trainer(base, rows, tmp_path)
    trainer.compute_loss_func = fails
    guard(trainer)
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
