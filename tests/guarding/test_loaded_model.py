"""The model of a guarded run against what it says of itself, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, grown_model, lora_model, make_trainer, scale_layers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralForCausalLM

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.loaded_tokenizer import recognise_loaded
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import TrainerTarget
from pytest_mistral_lora.conformance.trainer import checks

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Found = tuple[str, str, str]


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> list[dict[str, Any]]:
    return encoded(oracle, chat_rows(4), messages=True)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return BaseFolder(base).tokenizer().fast


Results = dict[str, Result]


@pytest.fixture(scope="module")
def judged(rows: list[dict[str, Any]], tokenizer: Any) -> Callable[[Any], Results]:
    """Judge a model by the checks that a guard runs of the model and the tokenizer: a run takes five times as long."""
    known, ids = recognise_loaded(tokenizer), {token for row in rows for token in row["input_ids"]}
    settings = Settings(1, None, "cpu", True, (), False, None)

    def judge(model: Any) -> Results:
        target = TrainerTarget("trainer", model=model, processing_class=tokenizer, known=known, ids=ids)
        return {check.case: check.run() for check in checks(target, settings)}

    return judge


def _findings(results: Results) -> list[Finding]:
    return [finding for result in results.values() for finding in result.findings]


def _named(findings: Iterable[Finding]) -> set[Found]:
    return {(finding.rule, finding.severity, str(finding.place)) for finding in findings}


def tied(base: Path) -> Any:
    model = lora_model(base, adapter=False)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def adapted(model: Any, **settings: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


SECOND = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def second_adapter(base: Path, *active: str) -> Any:
    model = lora_model(base)
    model.add_adapter("second", SECOND)
    model.base_model.set_adapter([*active])
    return model


def two_tensors(base: Path) -> Any:
    model = tied(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def one_tensor(base: Path) -> Any:
    model = tied(base)
    model.config.tie_word_embeddings = False
    return model


def configured(base: Path, **values: Any) -> Any:
    model = lora_model(base)
    for key, value in values.items():
        setattr(model.config, key, value)
    return model


def rope(base: Path, theta: float, *, loaded: bool) -> Any:
    if loaded:
        parameters = {"rope_type": "default", "rope_theta": theta}
        return MistralForCausalLM.from_pretrained(base, rope_parameters=parameters)
    model = lora_model(base)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": theta}
    return model


def scaled(base: Path, factor: float, **settings: Any) -> Any:
    model = lora_model(base, **settings)
    scale_layers(model, factor)
    return model


def with_config(base: Path, key: str, value: Any) -> Any:
    model = lora_model(base)
    setattr(model.peft_config["default"], key, value)
    return model


def switched_off(base: Path) -> Any:
    model = lora_model(base)
    model.disable_adapter_layers()
    model.base_model.set_requires_grad("default")
    return model


def merged(base: Path) -> Any:
    model = lora_model(base)
    model.merge_adapter()
    return model


def with_second(base: Path, *, active: str = "default", trained: str = "default") -> Any:
    model = lora_model(base)
    model.add_adapter("second", SECOND)
    model.set_adapter(active)
    model.set_requires_grad(trained)
    return model


ERROR, NOTE, OF_CONFIG = ("ML321", "error", "model"), ("ML328", "note", "model"), ("ML321", "error", "model.config")
CHANGED = ("ML328", "note", "model.config")

FAULTS: dict[str, tuple[Callable[[Path], Any], Found, str]] = {
    "scale": (lambda base: scaled(base, 0.5), ERROR, "multiplied by 1"),
    "scale of rslora": (lambda base: scaled(base, 4, use_rslora=True), ERROR, "√r 4"),
    "alpha": (lambda base: with_config(base, "lora_alpha", 32), ERROR, "8: lora_alpha 32 / r 4"),
    "pattern": (lambda base: with_config(base, "alpha_pattern", {"v_proj": 1}), ERROR, "0.25: lora_alpha 1 / r 4"),
    "another adapter": (lambda base: second_adapter(base, "second"), ERROR, "'second' acts"),
    "two adapters": (lambda base: second_adapter(base, "default", "second"), ERROR, "'default' and 'second' act"),
    "switched off": (switched_off, ERROR, "switched off"),
    "merged": (merged, ERROR, "merged"),
    "not active": (lambda base: with_second(base, trained="second"), ERROR, "'second' can be trained"),
    "heads": (lambda base: configured(base, num_key_value_heads=1), OF_CONFIG, "k_proj"),
    "width of a head": (lambda base: configured(base, head_dim=64), OF_CONFIG, "q_proj"),
    "layers": (lambda base: configured(base, num_hidden_layers=1), OF_CONFIG, "num_hidden_layers is 1"),
    "two tensors": (two_tensors, OF_CONFIG, "two tensors"),
    "one tensor": (one_tensor, OF_CONFIG, "one tensor"),
    "copy of a tied head": (
        lambda base: adapted(tied(base), modules_to_save=["lm_head"]),
        ("ML420", "note", "model"),
        "lm_head",
    ),
    "frequencies": (lambda base: rope(base, 5e6, loaded=False), NOTE, "frequency 1 of"),
    "theta": (lambda base: rope(base, 5e6, loaded=True), CHANGED, "rope_theta is 5000000.0"),
    "window": (
        lambda base: MistralForCausalLM.from_pretrained(base, sliding_window=512),
        CHANGED,
        "sliding_window is 512",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_model_that_contradicts_itself_is_found(name: str, base: Path, judged: Callable[[Any], Results]) -> None:
    make, found, says = FAULTS[name]
    findings = _findings(judged(make(base)))
    assert _named(findings) == {found}
    assert says in " ".join(f"{finding.found} {finding.expected}" for finding in findings)


def test_a_guarded_run_is_judged_so(base: Path, rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    make, found, _ = FAULTS["scale"]
    trainer = make_trainer(base, rows, tmp_path, model=make(base), tokenizer=tokenizer)
    verdict = begin(trainer, on_finding="warn").verdict
    assert verdict is not None
    assert _named(verdict.findings) == {found}


def with_own_rows(base: Path) -> Any:
    model = grown_model(base)
    weight = model.get_input_embeddings().weight
    weight.data[29_000:] = torch.randn(len(weight) - 29_000, weight.shape[1]) * weight[:29_000].std()
    return model


GROWN: dict[str, tuple[Callable[[Path], Any], set[Found]]] = {
    "as they were drawn": (grown_model, {("ML329", "error", "model")}),
    "with values of their own": (with_own_rows, {("ML329", "note", "model")}),
    "tokens": (lambda base: grown_model(base, trainable_token_indices=[*range(29_000, 32_768)]), set()),
    "other tokens": (lambda base: grown_model(base, trainable_token_indices=[5]), {("ML329", "error", "model")}),
    "modules_to_save": (lambda base: grown_model(base, modules_to_save=["embed_tokens"]), set()),
    "embeddings": (lambda base: grown_model(base, target_modules=["embed_tokens"]), set()),
    "full": (lambda base: grown_model(base).unload().requires_grad_(True), set()),
}


@pytest.mark.parametrize("name", GROWN)
def test_new_rows_of_the_embeddings_are_to_be_trained(name: str, base: Path, judged: Callable[[Any], Results]) -> None:
    make, found = GROWN[name]
    assert _named(_findings(judged(make(base)))) == found


SOUND: dict[str, Callable[[Path], Any]] = {
    "full": lambda base: lora_model(base, adapter=False),
    "bfloat16": lambda base: MistralForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
    "auto": lambda base: AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"),
    "rslora": lambda base: lora_model(base, use_rslora=True),
    "dora": lambda base: lora_model(base, use_dora=True),
    "pissa": lambda base: lora_model(base, init_lora_weights="pissa"),
    "patterns": lambda base: lora_model(base, rank_pattern={r"layers\.0\..*q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "rslora with patterns": lambda base: lora_model(base, use_rslora=True, rank_pattern={"q_proj": 2}),
    "modules_to_save": lambda base: lora_model(base, modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings": lambda base: lora_model(base, target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda base: lora_model(base, trainable_token_indices=[5, 6]),
    "tied": tied,
    "tied lora": lambda base: adapted(tied(base)),
    "tied tokens": lambda base: adapted(tied(base), trainable_token_indices={"embed_tokens": [5, 6]}),
    "tied on purpose": lambda base: adapted(tied(base), modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "a second adapter": with_second,
    "the second adapter": lambda base: with_second(base, active="second", trained="second"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_has_no_finding(name: str, base: Path, judged: Callable[[Any], Results]) -> None:
    results = judged(SOUND[name](base))
    assert _findings(results) == []
    assert not any(results[case].not_checked for case in ("loaded-as-configured", "loaded-as-stored", "new-rows"))


@pytest.mark.parametrize("kind", [kind for kind, text in TEXT_MODELS.items() if text.has_oracle])
@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_class_is_as_it_says(
    kind: str, wrapped: bool, oracle: Oracle, judged: Callable[[Any], Results], tmp_path: Path
) -> None:
    base = write_tiny_base(
        tmp_path / "base", oracle.path, architecture=Architecture(TEXT_MODELS[kind], is_wrapped=wrapped)
    )
    model = Architecture(TEXT_MODELS[kind], is_wrapped=wrapped).model_class().from_pretrained(base)
    assert not {finding.rule for finding in _findings(judged(model))} & {"ML321", "ML328", "ML329", "ML420"}
