"""What the first steps of a real run move: each trained tensor, and no frozen one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import (
    chat_rows,
    detach_last_layer,
    encoded,
    lora_model,
    losses_of,
    make_trainer,
)
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from sampling import sampled
from test_loaded_model import adapted, tied
from transformers import MistralForCausalLM, MixtralConfig, MixtralForCausalLM, get_scheduler

from pytest_mistral_lora import GuardError, Verdict, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.guarding.learning import FROZEN, GRADIENTS, OPTIMIZER

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [f"trainer::train::{case}" for case in (OPTIMIZER, GRADIENTS, FROZEN)]


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> list[dict[str, Any]]:
    return encoded(oracle, chat_rows(16), messages=True)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return BaseFolder(base).tokenizer().fast


@pytest.fixture
def trained(base: Path, rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> Callable[..., Verdict]:
    """Train a model with a guard that warns, and return the verdict."""

    def train(model: Any = None, change: Callable[[Any], None] = lambda trainer: None, **settings: Any) -> Verdict:
        settings = {"max_steps": 3, "gradient_accumulation_steps": 1, **settings}
        model = lora_model(base) if model is None else model
        trainer = make_trainer(base, rows, tmp_path, model=model, tokenizer=tokenizer, **settings)
        change(trainer)
        callback = guard(trainer, on_finding="warn")
        trainer.train()
        assert len(losses_of(trainer)) == trainer.state.max_steps
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())
        assert callback.verdict is not None
        return callback.verdict

    return train


def _found(verdict: Verdict) -> set[tuple[str, str, str]]:
    return {(finding.rule, finding.severity, str(finding.place)) for finding in verdict.findings}


def detached(base: Path) -> Any:
    model = lora_model(base)
    detach_last_layer(model)
    return model


def reentrant(base: Path) -> Any:
    """Return a model whose first layer is computed anew in the reentrant way, without an input that has a gradient."""
    model = lora_model(base)
    first = model.get_decoder().layers[0]
    own = first.forward
    first.forward = lambda *given, **named: torch.utils.checkpoint.checkpoint(
        lambda *inner: own(*inner, **named), *given, use_reentrant=True
    )
    return model


def sharing(base: Path) -> Any:
    """Return a model whose trained head is in the memory of its frozen embeddings."""
    model = lora_model(base, adapter=False)
    model.get_input_embeddings().weight = torch.nn.Parameter(model.lm_head.weight.data, requires_grad=False)
    return model


def without_the_last(trainer: Any) -> None:
    *known, _ = [one for one in trainer.model.parameters() if one.requires_grad]
    trainer.optimizer = torch.optim.AdamW(known, lr=1e-4)


FAULTS: dict[str, tuple[Callable[..., Verdict], tuple[str, str, str], str]] = {
    "reentrant": (lambda train, base: train(reentrant(base)), ("ML303", "error", "model"), "layers.0.self_attn.q_proj"),
    "warm-up": (
        lambda train, base: train(detached(base), warmup_steps=1, max_steps=4),
        ("ML303", "error", "model"),
        "1 of 8 trained tensors",
    ),
    "without the last": (
        lambda train, base: train(change=without_the_last),
        ("ML303", "error", "model"),
        "layers.1.self_attn.v_proj.lora_B",
    ),
    "in its memory": (lambda train, base: train(sharing(base)), ("ML302", "error", "model"), "embed_tokens"),
    "only a warm-up": (
        lambda train, base: train(max_steps=1, warmup_steps=5),
        ("ML320", "error", "lr_scheduler"),
        "1 step",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_first_steps_do_not_move_or_must_not_is_found(
    name: str, base: Path, trained: Callable[..., Verdict]
) -> None:
    make, found, says = FAULTS[name]
    verdict = make(trained, base)
    others = {("ML321", "error", "model.config")} if name == "in its memory" else set()
    assert _found(verdict) - others == {found}, str(verdict)
    assert says in " ".join(finding.found for finding in verdict.findings)


def test_a_run_is_stopped_after_the_step_that_shows_it(base: Path, rows: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "gradient_accumulation_steps": 1}
    trainer = make_trainer(base, rows, tmp_path, model=detached(base), tokenizer=tokenizer, **settings)
    callback = guard(trainer)
    with pytest.raises(GuardError, match=r"(?s)after the first steps.*ML303 model: "):
        trainer.train()
    assert trainer.state.global_step == 2
    assert callback.verdict is not None
    trainer = make_trainer(base, rows, tmp_path, tokenizer=tokenizer, learning_rate=0.0)
    guard(trainer)
    with pytest.raises(GuardError, match=r"(?s)before a weight moves.*ML320 lr_scheduler: "):
        trainer.train()
    assert trainer.state.global_step == 0


def experts(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32768, num_key_value_heads=2, **sizes))
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)) if settings else model


class OwnExpert(torch.nn.Module):
    """An MLP with four experts as modules of their own; the second half never gets a token."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(4))

    def forward(self, hidden: Any) -> Any:
        return self.experts[0](hidden) + self.experts[1](hidden)


def idle_experts(base: Path) -> Any:
    model = lora_model(base, adapter=False)
    for layer in model.model.layers:
        layer.mlp = OwnExpert(layer.mlp)
    return adapted(model, target_modules=["q_proj", "up_proj"])


def peaked(base: Path) -> Any:
    """Return a model that is sure of each token of a row, with an adapter."""
    model = MistralForCausalLM.from_pretrained(base)
    ids = torch.arange(100, 130)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted(model, target_modules=["q_proj", "k_proj", "up_proj"])


def lora_fa(base: Path) -> Any:
    model = lora_model(base)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def frozen_layers(base: Path) -> Any:
    model = lora_model(base, adapter=False)
    model.model.layers[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model


def with_a_tensor_of_images(base: Path) -> Any:
    """Return a model with a tensor that texts do not need, as models of images have one beside their layers."""
    model = lora_model(base, adapter=False)
    model.model.image_newline = torch.nn.Parameter(torch.ones(8))
    return model


def with_the_head_alone(trainer: Any) -> None:
    trainer.optimizer = torch.optim.AdamW(trainer.model.lm_head.parameters(), lr=1e-4)


def with_loraplus(trainer: Any) -> None:
    trainer.optimizer = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)


def with_constant(trainer: Any) -> None:
    trainer.create_optimizer()
    trainer.lr_scheduler = get_scheduler("constant", trainer.optimizer)


SOUND: dict[str, Callable[[Any, Path], Verdict]] = {
    "lora": lambda train, base: train(lora_model(base, r=8)),
    "full": lambda train, base: train(lora_model(base, adapter=False)),
    "bfloat16": lambda train, base: train(adapted(MistralForCausalLM.from_pretrained(base, dtype=torch.bfloat16))),
    "bf16": lambda train, base: train(bf16=True),
    "bfloat16 adapter": lambda train, base: train(
        adapted(MistralForCausalLM.from_pretrained(base, dtype=torch.bfloat16)).to(torch.bfloat16)
    ),
    "dora": lambda train, base: train(lora_model(base, use_dora=True)),
    "rslora": lambda train, base: train(lora_model(base, use_rslora=True)),
    "pissa": lambda train, base: train(lora_model(base, init_lora_weights="pissa")),
    "modules_to_save": lambda train, base: train(lora_model(base, modules_to_save=["embed_tokens", "lm_head"])),
    "embeddings": lambda train, base: train(lora_model(base, target_modules=["embed_tokens", "v_proj"])),
    "tied": lambda train, base: train(tied(base)),
    "tied with an adapter": lambda train, base: train(adapted(tied(base))),
    "tokens that are used": lambda train, base: train(lora_model(base, trainable_token_indices=[3, 4])),
    "tokens that are not": lambda train, base: train(lora_model(base, trainable_token_indices=[30000, 30001])),
    "tied tokens": lambda train, base: train(adapted(tied(base), trainable_token_indices={"embed_tokens": [30000]})),
    "checkpointing": lambda train, base: train(gradient_checkpointing=True),
    "reentrant checkpointing": lambda train, base: train(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "warm-up": lambda train, base: train(warmup_steps=2, max_steps=6),
    "warm-up of most of the run": lambda train, base: train(warmup_steps=100),
    "cosine": lambda train, base: train(lr_scheduler_type="cosine"),
    "constant": lambda train, base: train(change=with_constant),
    "accumulation": lambda train, base: train(gradient_accumulation_steps=4),
    "lora+": lambda train, base: train(change=with_loraplus),
    "lora-fa": lambda train, base: train(lora_fa(base)),
    "adafactor": lambda train, base: train(optim="adafactor"),
    "sgd": lambda train, base: train(optim="sgd", learning_rate=0.1),
    "frozen layers": lambda train, base: train(frozen_layers(base)),
    "tied on purpose": lambda train, base: train(
        adapted(tied(base), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "a tensor of images": lambda train, base: train(with_a_tensor_of_images(base)),
    "the head alone": lambda train, base: train(lora_model(base, adapter=False), with_the_head_alone),
    "peaked": lambda train, base: train(peaked(base)),
    "mixtral": lambda train, base: train(experts()),
    "adapted experts": lambda train, base: train(
        experts(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    ),
    "idle experts": lambda train, base: train(idle_experts(base)),
}
OTHERS = {"adapted experts": {"ML453"}, "idle experts": {"ML453"}}


KEPT = (
    "full",
    "tied",
    "checkpointing",
    "warm-up",
    "idle experts",
    "tokens that are not",
)
"""The healthy runs of each run of the tests."""


@pytest.mark.parametrize("name", sampled(SOUND, KEPT))
def test_a_run_that_moves_what_it_must_has_no_finding(name: str, base: Path, trained: Callable[..., Verdict]) -> None:
    verdict = SOUND[name](trained, base)
    rules = {finding.rule for finding in verdict.findings}
    assert rules <= OTHERS.get(name, set()), str(verdict)
    assert not verdict.not_checked.keys() & set(CASES), str(verdict)


def test_weights_are_the_same_with_and_without_the_guard(base: Path, rows: Any, tokenizer: Any, tmp_path: Path) -> None:
    models = []
    for is_guarded in (False, True):
        trainer = make_trainer(base, rows, tmp_path, model=lora_model(base), tokenizer=tokenizer, max_steps=3)
        if is_guarded:
            guard(trainer)
        trainer.train()
        models.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


class Overflowing(torch.amp.GradScaler):
    """A scaler whose first scale is far too large, so that it skips steps."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)


def test_steps_that_a_scaler_skips_are_not_counted(base: Path, trained: Callable[..., Verdict]) -> None:
    def with_scaler(trainer: Any) -> None:
        trainer.accelerator.scaler = Overflowing()

    # without a GPU, accelerate does not unscale before it clips
    settings = {"max_steps": 4, "max_grad_norm": 0}
    verdict = trained(change=with_scaler, **settings)
    assert _found(verdict) == set(), str(verdict)
    assert not verdict.not_checked.keys() & set(CASES), str(verdict)
    # one of two steps is skipped
    verdict = trained(change=with_scaler, **settings | {"max_steps": 2})
    assert {name for name in CASES if name in verdict.not_checked} == {CASES[1]}
    verdict = trained(detached(base), change=with_scaler, **settings)
    assert _found(verdict) == {("ML303", "error", "model")}, str(verdict)


def test_a_run_that_is_too_short_says_so(trained: Callable[..., Verdict]) -> None:
    verdict = trained(max_steps=1)
    assert _found(verdict) == set()
    assert {name for name in CASES if name in verdict.not_checked} == {CASES[1]}
