"""The guard in TRL's trainers of preferences. Left out, with the reason, where TRL is not installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from guarded_runs import TRL_SETTINGS, Losses, first_loss, losses_of
from preference_records import Data, pair, said, texts_pair
from trl_runs import ahead, with_logps, with_mask

from pytest_mistral_lora import GuardError, guard, training_template
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

MODULES = {"DPO": "trl", "KTO": "trl", "Reward": "trl", "ORPO": "trl.experimental.orpo", "CPO": "trl.experimental.cpo"}
HISTORY = [said("user", "Which colour is grass?"), said("assistant", "Green.")]
PAIRS = [
    pair(
        [*HISTORY, said("user", f"And thing {n}?")],
        [said("assistant", f"Thing {n} is red{' indeed' * (n % 3)}.")],
        [said("assistant", f"I do not know of {n}.")],
    )
    for n in range(8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("trl") / "base", shipped_tokenizer("spm-v3"))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return BaseFolder(base).tokenizer().fast


def make_trainer(
    kind: str,
    base: Path,
    tokenizer: Any,
    rows: list[Data],
    output: Path,
    *,
    template: Callable[[str], str] = str,
    stream: bool = False,
    **settings: Any,
) -> Any:
    from peft import LoraConfig
    from transformers import MistralForCausalLM, MistralForSequenceClassification, set_seed

    set_seed(0)
    tokenizer.chat_template, tokenizer.pad_token = template(training_template(base)), "<unk>"
    module = importlib.import_module(MODULES[kind])
    arguments = {
        "max_length": 512,
        **TRL_SETTINGS,
        **settings,
    }
    if kind == "Reward":
        model = MistralForSequenceClassification.from_pretrained(base, num_labels=1)
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    else:
        model = MistralForCausalLM.from_pretrained(base)
    dataset = Dataset.from_list(rows)
    return getattr(module, f"{kind}Trainer")(
        model=model,
        args=getattr(module, f"{kind}Config")(output_dir=str(output), **arguments),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=4, target_modules=["q_proj"], lora_dropout=0.0, task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
        ),
        callbacks=[Losses()],
    )


@pytest.mark.parametrize("kind", MODULES)
def test_a_healthy_run_is_untouched(kind: str, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for guarded in (False, True):
        trainer = make_trainer(kind, base, tokenizer, PAIRS, tmp_path)
        callback = guard(trainer) if guarded else None
        trainer.train()
        found.append(losses_of(trainer))
    assert callback is not None
    assert callback.verdict is not None
    assert callback.verdict.ok
    facts = callback.verdict.facts["batches::encoded::ids"]
    assert facts["judged"] == 16
    if kind in ("DPO", "KTO"):
        first = callback.verdict.facts["trainer::train::first-loss"]
        assert first["labels"] == first["positions with a gradient"] == first["compared"] > 0
    else:
        assert "loss of its own" in callback.verdict.not_checked["trainer::train::first-loss"]
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_trainer_that_is_made_from_one_of_pairs_has_its_loss(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer("ORPO", base, tokenizer, PAIRS, tmp_path, max_steps=1)

    class Made(type(trainer)):  # type: ignore[misc]
        def compute_loss(self, *given: Any, **named: Any) -> Any:
            return super().compute_loss(*given, **named)

    trainer.__class__ = Made
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.findings == ()
    assert "ORPOTrainer computes a loss of its own" in callback.verdict.not_checked["trainer::train::first-loss"]


RATED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for n, row in enumerate(PAIRS)
    for side in (("chosen", "rejected") if n % 2 else ("rejected", "chosen"))
]
ROWS = {"DPO": PAIRS, "KTO": RATED}

WITH_SIGNS = ("sigmoid", "sigmoid_norm", "hinge", "robust", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sft")
WITHOUT_SIGNS = ("ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_down", "discopop")
MIXED = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def _moved(trainer: Any) -> Any:
    """Let the adapter act: the reference is another model then."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return trainer


@pytest.mark.parametrize("is_moved", [False, True], ids=["first", "moved"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *(("DPO", {"loss_type": name, "label_smoothing": 0.1 * (name == "robust")}) for name in WITH_SIGNS),
        *(("KTO", {"loss_type": name}) for name in ("kto", "apo_zero_unpaired")),
        *(
            (kind, settings)
            for kind in ROWS
            for settings in ({"bf16": True}, {"precompute_ref_log_probs": True}, {"max_length": 22}, {"beta": 5.0})
        ),
        *(("DPO", MIXED | {"ld_alpha": alpha}) for alpha in (None, 0.0, 0.3)),
        *(("DPO", {"ld_alpha": alpha, "bf16": alpha == 1.0}) for alpha in (0.0, 0.3, 1.0)),
        *(("DPO", {"f_divergence_type": name}) for name in ("forward_kl", "js_divergence", "alpha_divergence")),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"padding_free": True, "pad_to_multiple_of": 16}),
        ("DPO", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("DPO", {"label_smoothing_factor": 0.5}),
        ("KTO", {"desirable_weight": 0.0}),
    ],
    ids=str,
)
def test_a_healthy_loss_of_answers_is_silent(
    is_moved: bool, kind: str, settings: Data, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(kind, base, tokenizer, ROWS[kind], tmp_path, **settings)
    result = first_loss(_moved(trainer) if is_moved else trainer)
    assert (result.findings, result.not_checked) == ((), "")
    assert dict(result.facts)["compared"] > 0


@pytest.mark.parametrize("is_moved", [False, True], ids=["first", "moved"])
@pytest.mark.parametrize("name", WITHOUT_SIGNS)
def test_the_signs_of_a_loss_that_may_turn_are_not_checked(
    name: str, is_moved: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer("DPO", base, tokenizer, PAIRS, tmp_path, loss_type=name, label_smoothing=0.1)
    result = first_loss(_moved(trainer) if is_moved else trainer)
    assert result.findings == ()
    assert result.not_checked.startswith(f"signs: a loss of the type {name} ")
    # but positions and tokens are
    trainer.__class__ = type(
        "Made", (type(trainer),), {"compute_loss": with_mask(lambda batch: batch["attention_mask"])}
    )
    assert "outside of the answers: the first is '[INST]' (3)" in first_loss(trainer).findings[0].found


def test_a_loss_without_a_gradient_is_not_checked(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer("DPO", base, tokenizer, PAIRS, tmp_path, beta=0.0)
    assert first_loss(trainer).not_checked == "no answer of the first batch has a gradient"


def _of_eos(tokens: torch.Tensor) -> torch.Tensor:
    return torch.where(tokens == 2, 2.0, 1.0)


@pytest.mark.parametrize(("kind", "bf16"), [("DPO", False), ("DPO", True), ("KTO", False)])
@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (with_logps(ahead(1)), "", ""),
        (
            with_logps(ahead(1), sign=-1),
            "ML326",
            {
                "DPO": "lowers 4 chosen answers and raises 4 rejected answers",
                "KTO": "lowers 2 desirable answers and raises 2 undesirable answers",
            },
        ),
        (with_logps(ahead(2)), "ML326", "labels that are shifted twice"),
        (with_logps(ahead(0)), "ML326", "labels that are not shifted"),
        (with_logps(ahead(1, late=1)), "ML326", "the mask of the answer tokens, not shifted"),
        (with_logps(ahead(1, _of_eos)), "ML327", "from 0.5 to 1 of the largest"),
        (with_mask(lambda batch: batch["attention_mask"]), "ML326", "every token, the prompt included"),
        (with_mask(lambda batch: batch["completion_mask"] >= batch["attention_mask"]), "ML326", "the padding, "),
        (with_mask(lambda batch: batch["completion_mask"] < batch["attention_mask"]), "ML326", "does not train on"),
        (
            with_mask(lambda batch: batch["completion_mask"] * (batch["input_ids"] != 2)),
            "ML326",
            "the first is '</s>'",
        ),
    ],
)
def test_a_loss_of_other_tokens_or_signs_is_named(
    change: Any, rule: str, words: Any, kind: str, bf16: bool, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(kind, base, tokenizer, ROWS[kind], tmp_path, bf16=bf16)
    trainer.__class__ = type("Made", (type(trainer),), {"compute_loss": change})
    result = first_loss(trainer)
    found = [(finding.rule, str(finding.place)) for finding in result.findings]
    assert found == ([(rule, "Made.compute_loss")] if rule else [])
    if rule:
        assert (words if isinstance(words, str) else words[kind]) in result.findings[0].found
    if rule == "ML326":
        first = {"DPO": "at row 0, the chosen answer, token", "KTO": "the undesirable answer, token"}
        assert first[kind] in result.findings[0].found or "at row 1, the desirable answer" in result.findings[0].found
    assert result.not_checked == ""


def test_a_run_on_rejected_answers_is_stopped(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer("DPO", base, tokenizer, PAIRS, tmp_path)
    trainer.__class__ = type("Made", (type(trainer),), {"compute_loss": with_logps(ahead(1), sign=-1)})
    [finding] = stopped(trainer)
    assert (finding.rule, str(finding.place)) == ("ML326", "Made.compute_loss")


def stopped(trainer: Any) -> list[Any]:
    """Return the errors for which the guard stops a run before its first step."""
    guard(trainer)
    with pytest.raises(GuardError) as caught:
        trainer.train()
    assert (losses_of(trainer), trainer.state.global_step) == ([], 0)
    return [finding for finding in caught.value.verdict.findings if finding.severity == "error"]


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_a_template_with_another_space_is_stopped(kind: str, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        kind, base, tokenizer, PAIRS, tmp_path, template=lambda text: text.replace("[INST] ", "[INST]")
    )
    [finding] = stopped(trainer)
    assert (finding.rule, str(finding.place)) == ("ML442", "processing_class, chat_template")
    # of the two answers of a pair
    assert dict(finding.covers)["ML528"] == 16
    assert "processing_class.chat_template = training_template(" in finding.next_step


@pytest.mark.parametrize(("kind", "length"), [("DPO", 20), ("KTO", 20)])
def test_answers_that_a_cut_makes_equal_are_stopped(
    kind: str, length: int, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    question = [said("user", "What is it?")]
    long = "It is the colour of a clear and quiet sea on a warm day in the early summer of the year"
    rows = [pair(question, [said("assistant", f"{long} {n}.")], [said("assistant", f"{long}.")]) for n in range(4)]
    found = stopped(make_trainer(kind, base, tokenizer, rows, tmp_path, max_length=length))
    rules = {finding.rule for finding in found}
    assert rules == ({"ML531", "ML568"} if kind == "DPO" else {"ML531"})
    assert all("max_length: null" in finding.next_step for finding in found)


def test_a_result_of_a_tool_that_is_scored_is_stopped(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    chosen = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "warm", "tool_call_id": "abcdefghi"},
        said("assistant", "It is warm."),
    ]
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    rows = [pair([said("user", f"Is it warm, {n}?")], chosen, [said("assistant", "No.")], [tool]) for n in range(4)]
    found = stopped(make_trainer("DPO", base, tokenizer, rows, tmp_path))
    assert {finding.rule for finding in found} == {"ML547"}
    assert {str(finding.place) for finding in found} == {f"train_dataset[{n}], chosen" for n in range(4)}
    assert "into `prompt`" in found[0].next_step


def test_a_stream_of_pairs_is_judged_side_by_side(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [texts_pair(f"What is {n}?", f"It is {n}.", f"Not {n}.") for n in range(8)]
    trainer = make_trainer("DPO", base, tokenizer, rows, tmp_path, stream=True)
    callback = guard(trainer, batches=1)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 8
