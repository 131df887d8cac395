"""What the first step trains for is compared with the labels, by the gradient of the trainer's own call."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from guarded_runs import chat_rows, encoded, lora_model, losses_of, make_trainer
from guarded_runs import first_loss as _result
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from planned_runs import OwnTrainer, mean_loss
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.training_args import OptimizerNames

from pytest_mistral_lora import GuardError, MistralGuard, Verdict, guard
from pytest_mistral_lora.chat.oracle import Oracle
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


def _shifted_twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return ForCausalLMLoss(
        outputs.logits[:, :-1].contiguous(),
        labels[:, 1:],
        outputs.logits.shape[-1],
        num_items_in_batch=num_items_in_batch,
    )


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


def _without_labels(trainer: Any) -> None:
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {name: value for name, value in collate(rows).items() if name != "labels"}
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()


def _with_odd_labels(trainer: Any) -> None:
    """Break what the check reads, and not the run."""
    trainer.args.label_smoothing_factor = "two"


def _with_two_calls(trainer: Any) -> None:
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        mean_loss(outputs.logits, labels) + trainer.model(input_ids=labels.clamp(min=0)).logits.mean()
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


def test_positions_of_declared_weights_are_no_note(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    _with_a_dropping_head(trainer)
    pads = trainer.data_collator
    trainer.data_collator = lambda items: (batch := pads(items)) | {"loss_weights": 1 + batch["input_ids"] % 3}

    def compute_loss(trainer: Any, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
        return (losses * inputs["loss_weights"][:, 1:]).mean()

    trainer.__class__ = type("OwnTrainer", (Trainer,), {"compute_loss": compute_loss})
    result = _result(trainer)
    assert (result.findings, result.not_checked) == ((), "tokens: the head has dropout")
    assert dict(result.facts)["positions with a gradient"] > dict(result.facts)["labels"]


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
        (OwnTrainer,),
        {"own_loss": staticmethod(lambda logits, batch: mean_loss(logits, batch["input_ids"]))},
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
        model = _head_alone(base, "weight")
        trainer = make_trainer(base, rows, tmp_path, model=model, max_steps=2, gradient_accumulation_steps=1)
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
