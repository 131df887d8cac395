"""The objective that the configuration of a trainer declares, and the rows that real trainers make by it.

The real ones are left out, with the reason, where they have no environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from derived_tekken import write_derived

from pytest_mistral_lora import MistralGuard
from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, RunnerTarget, Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.runners import TRAINERS, Environment

CHAT = {"type": "chat_template"}
DECLARED: list[tuple[str, dict[str, Any], str]] = [
    ("llamafactory", {"mask_history": True}, "last-answer (mask_history: true)"),
    ("llamafactory", {"train_on_prompt": True}, "everything (train_on_prompt: true)"),
    ("ms-swift", {"loss_scale": "last_round"}, "last-answer (loss_scale: last_round)"),
    ("ms-swift", {"loss_scale": "last_round+base"}, "last-answer (loss_scale: last_round+base)"),
    ("ms-swift", {"loss_scale": "all"}, "everything (loss_scale: all)"),
    ("ms-swift", {"loss_scale": "hermes"}, "not expressible (loss_scale)"),
    ("ms-swift", {"loss_scale": "last_round+ignore_empty_think"}, "not expressible (loss_scale)"),
    ("axolotl", {"train_on_inputs": True, "datasets": [{"type": "alpaca"}]}, "everything (train_on_inputs: true)"),
    ("axolotl", {"train_on_inputs": True, "datasets": [{"path": "ids.jsonl"}]}, "everything (train_on_inputs: true)"),
    ("axolotl", {"train_on_inputs": True, "datasets": [CHAT]}, "not expressible (train_on_inputs)"),
    ("axolotl", {"datasets": [CHAT | {"roles_to_train": ["gpt"]}]}, "answers (roles_to_train: [gpt])"),
    (
        "axolotl",
        {"datasets": [CHAT | {"roles_to_train": ["bot"], "roles": {"assistant": ["bot"]}}]},
        "answers (roles_to_train: [bot])",
    ),
    ("axolotl", {"datasets": [CHAT | {"roles_to_train": ["assistant", "user"]}]}, "not expressible (roles_to_train)"),
    ("axolotl", {"datasets": [CHAT | {"roles_to_train": []}]}, "not expressible (roles_to_train)"),
    (
        "axolotl",
        {"datasets": [CHAT | {"message_field_training_detail": "parts"}]},
        "not expressible (message_field_training_detail)",
    ),
    ("axolotl", {"datasets": [CHAT, CHAT | {"roles_to_train": ["user"]}]}, "not expressible (datasets)"),
    ("trl", {"assistant_only_loss": True}, "answers (assistant_only_loss: true)"),
]

DEFAULTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TRAINERS),
    ("llamafactory", {"mask_history": False, "train_on_prompt": False}),
    ("ms-swift", {"loss_scale": "default"}),
    ("axolotl", {"train_on_inputs": False, "datasets": [CHAT]}),
    ("axolotl", {"datasets": "rows.jsonl"}),
    ("axolotl", {"datasets": [{"type": "alpaca", "roles_to_train": ["user"]}]}),
    ("trl", {"assistant_only_loss": False, "completion_only_loss": True}),
    # a key of chat rows in a configuration of preferences
    ("ms-swift", {"rlhf_type": "dpo", "loss_scale": "last_round"}),
    ("llamafactory", {"stage": "dpo", "mask_history": True}),
]


def _written(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


@pytest.mark.parametrize(("name", "settings", "words"), DECLARED)
def test_a_key_that_is_not_the_default_declares(
    name: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    declared = TRAINERS[name].declared_by(_written(tmp_path, settings))
    assert declared is not None
    assert str(declared) == f"objective: {words}"


@pytest.mark.parametrize(("name", "settings"), DEFAULTS)
def test_a_default_declares_nothing(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    assert TRAINERS[name].declared_by(_written(tmp_path, settings)) is None
    assert TRAINERS[name].declared_by(None) is None


def test_a_round_of_an_older_ms_swift_begins_with_the_user(tmp_path: Path) -> None:
    for version, words in (("4.5.2", "last-round"), ("4.5.3", "last-answer"), ("", "last-answer")):
        lock = tmp_path / "lock.txt"
        lock.write_text(f"trl==0.29.1\nms_swift=={version}\n" if version else "", encoding="utf-8")
        declared = replace(TRAINERS["ms-swift"], lock=lock).declares({"loss_scale": "last_round"})
        assert str(declared) == f"objective: {words} (loss_scale: last_round)"


@pytest.mark.parametrize(
    ("loss_scale", "flags", "words"),
    [
        ("last_round", ({"loss": True}, {}), "not expressible (loss)"),
        ("last_round", ({"loss": False}, {"loss": True}), "last-answer (loss_scale: last_round)"),
        ("default", ({"loss": True}, {}), None),
        ("default", ({"loss_scale": 0.5}, {}), "not expressible (loss_scale)"),
        ("default", ({"loss_scale": 0}, {"loss_scale": 1.0}), None),
    ],
)
def test_own_data_of_ms_swift_may_give_a_loss_back(
    loss_scale: str, flags: tuple[dict[str, Any], ...], words: str | None, tmp_path: Path
) -> None:
    row = _chat("u", "a", "v", "b")
    for index, more in zip((1, 3), flags, strict=True):
        row["messages"][index] |= more
    file = tmp_path / "own.jsonl"
    file.write_text(f"{json.dumps(_chat('u', 'a'))}\n{json.dumps(row)}\n", encoding="utf-8")
    config = _written(tmp_path, {"loss_scale": loss_scale, "dataset": [f"{file}#500", str(tmp_path / "nope.jsonl")]})
    declared = TRAINERS["ms-swift"].declared_by(config, own_data=True)
    assert (declared and declared.words) == words
    # the rows of an audit have no such flag
    without = TRAINERS["ms-swift"].declared_by(config)
    assert (without and without.words) == (None if loss_scale == "default" else "last-answer (loss_scale: last_round)")


def test_a_configuration_that_cannot_be_read_declares_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("mask_history: true\nx: !!python/name:os.system\n", "[", "- mask_history\n"):
        file.write_text(text, encoding="utf-8")
        assert TRAINERS["llamafactory"].declared_by(file) is None


def test_the_rows_of_a_runner_have_the_objective_of_its_configuration(tmp_path: Path) -> None:
    config = _written(tmp_path, {"mask_history": True})
    judge = DatasetTarget("rows", tmp_path / "rows.jsonl", judge=Target("spm-v3"))
    target = RunnerTarget("run", config, runner="llamafactory", judge=judge)
    assert str(target.declaration) == "objective: last-answer (mask_history: true)"
    same = Declaration(Objective("last-answer"), "--objective")
    assert RunnerTarget("run", config, runner="llamafactory", judge=judge, objective=same).declaration == same
    other = RunnerTarget(
        "run", config, runner="llamafactory", judge=judge, objective=Declaration(Objective("answers"), "--objective")
    )
    with pytest.raises(InputError, match=r"answers \(--objective\) and last-answer \(mask_history: true\)"):
        _ = other.declaration


RECIPE = f"""\
base: {{path: base, weights_sha256: {"a" * 64}}}
data: {{train: [rows.jsonl, {{path: more.jsonl, objective: LATER}}]}}
training: {{steps: 1, objective: FIRST}}
output: out
"""


def test_a_recipe_declares_the_objective_of_what_a_trainer_makes_of_its_rows(tmp_path: Path) -> None:
    recipe, config = tmp_path / "recipe.yaml", _written(tmp_path, {"mask_history": True})

    def declared(first: str, later: str, config: Path | None) -> Any:
        recipe.write_text(RECIPE.replace("FIRST", first).replace("LATER", later), encoding="utf-8")
        target = RunnerTarget("run", config, runner="llamafactory", judge=RecipeTarget("recipe", recipe))
        return target.declaration and target.declaration.words

    assert declared("last-answer", "last-answer", None) == "last-answer (training.objective)"
    assert declared("last-answer", "last-answer", config) == "last-answer (mask_history: true)"
    assert declared("answers", "answers", None) is None
    # a trainer has no setting for a mixture
    assert declared("answers", "last-answer", None) is None
    with pytest.raises(InputError, match=r"last-answer \(mask_history: true\) and last-round \(training.objective\)"):
        declared("last-round", "last-round", config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_history": True}, "everything (--objective) and last-answer (mask_history: true)"),
        ({"loss_scale": "react"}, "everything (--objective) and not expressible (loss_scale)"),
    ],
)
def test_two_objectives_are_refused_before_the_trainer_runs(
    settings: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "llamafactory" if "mask_history" in settings else "ms-swift"
    options = ["--config", str(_written(tmp_path, settings)), "--objective", "everything"]
    code = main(["check", "--runner", name, "--tokenizer", "spm-v3", "--python", sys.executable, *options])
    assert (code, capsys.readouterr().err) == (
        2,
        f"error: two objectives are declared: {words}; expected one objective, or the same in both\n",
    )


def test_two_objectives_are_a_usage_error_of_pytest(pytester: pytest.Pytester) -> None:
    _written(pytester.path, {"mask_history": True})
    words = ["--mistral-golden", "--mistral-runner", "llamafactory=config.yaml", "--mistral-tokenizer", "spm-v3"]
    ended = pytester.runpytest_subprocess(*words, "--mistral-objective", "answers")
    assert ended.ret == pytest.ExitCode.USAGE_ERROR
    ended.stderr.fnmatch_lines("*answers (--mistral-objective) and last-answer (mask_history: true)*")


def test_a_guard_takes_the_objective_of_a_configuration() -> None:
    declared = TRAINERS["axolotl"].declares({"datasets": [{"type": "chat_template", "roles_to_train": ["gpt"]}]})
    MistralGuard(objective="answers").use_declaration(declared)
    with pytest.raises(InputError, match=r"last-answer \(objective=\) and answers \(roles_to_train: \[gpt\]\)"):
        MistralGuard(objective="last-answer").use_declaration(declared)


# -- real trainers

SYSTEM = {"role": "system", "content": "Be brief."}
Rows = list[dict[str, Any]]


def _chat(*texts: str, system: bool = False) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [*([SYSTEM] if system else []), *messages]}


def _rows(*, system: bool = False) -> Rows:
    return [
        _chat("Hi 1", "It is one.", "And?", "It is two.", system=system),
        _chat("Hi 2", "It is two.", "More?", "No more.", "Well?", "Yes.", system=system),
        _chat("Hi 3", "It is three.", system=system),
    ]


@dataclass(frozen=True)
class Run:
    """A run of a trainer by its configuration.

    Attributes:
        name: The trainer.
        settings: The keys that are written into a packaged configuration.
        line: The line of the verdict.
        fault: Keys that plant a fault in a second run; empty for a message of weight 0 in its rows.
        rules: The rules that the second run breaks.
        beside: Further keys of both runs, in place of those of the packaged configuration.
        tokenizer: A name of `derived_tekken`, or of a shipped tokenizer.
        has_system: Whether the rows have a system prompt: without one, a template of ms-swift invents one.
    """

    name: str
    settings: dict[str, Any]
    line: str
    fault: dict[str, Any] = field(default_factory=dict)
    rules: frozenset[str] = frozenset({"ML549"})
    beside: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "spm-v3"
    has_system: bool = False


OF_SMALL_3 = {"model_type": "mistral_2501", "agent_template": "mistral"}
"""ms-swift's template of Small 3, whose default system prompt has the date, and its tool format of Mistral."""

RUNS = [
    Run("llamafactory", {"mask_history": True}, "objective: last-answer (mask_history: true)"),
    Run("llamafactory", {"train_on_prompt": True}, "objective: everything (train_on_prompt: true)"),
    Run(
        "ms-swift",
        {"loss_scale": "last_round"},
        "objective: last-answer (loss_scale: last_round)",
        beside=OF_SMALL_3,
        tokenizer="derived-v11",
        has_system=True,
    ),
    Run(
        "ms-swift",
        {"loss_scale": "all"},
        "objective: everything (loss_scale: all)",
        beside=OF_SMALL_3,
        tokenizer="derived-v11",
        has_system=True,
    ),
    # the texts of each message have a loss, and the markers around them have none: the ids alone are judged
    Run(
        "axolotl",
        {"train_on_inputs": True},
        "objective: not expressible (train_on_inputs)",
        fault={"chat_template": "mistral_v3_tekken"},
        rules=frozenset({"ML528"}),
    ),
]
Audit = Callable[..., tuple[int, str]]


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Audit:
    def audit(run: Run, rows: Rows, **settings: Any) -> tuple[int, str]:
        trainer = TRAINERS[run.name]
        config = yaml.safe_load(trainer.config.read_text(encoding="utf-8")) | run.beside
        if "dataset_dir" in config:
            config["dataset_dir"] = str(trainer.config.parent / config["dataset_dir"])
        file, data = _written(tmp_path, {**config, **settings}), tmp_path / "rows.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        tokenizer = run.tokenizer
        if tokenizer.startswith("derived"):
            (tmp_path / "checkpoint").mkdir(exist_ok=True)
            tokenizer = str(write_derived(run.tokenizer, tmp_path / "checkpoint"))
        words = ["--runner", run.name, "--tokenizer", tokenizer, "--config", str(file), "--dataset", str(data)]
        code = main(["check", *words, "--output", str(tmp_path / "kept.jsonl")])
        return code, capsys.readouterr().out

    return audit


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}-{'-'.join(run.settings)}")
def test_a_trainer_is_green_by_its_configuration_and_red_with_a_fault(run: Run, audit: Audit) -> None:
    trainer = TRAINERS[run.name]
    if Environment(trainer).state != "ready":
        pytest.skip(f"{trainer.title} has no environment here; mistral-lora runner setup {run.name}")
    rows = _rows(system=run.has_system)
    code, out = audit(run, rows, **run.settings)
    assert (code, out.splitlines()[0]) == (0, run.line), out
    assert "3 rows: 3 sound, 0 wrong, 0 not judged" in out
    assert ("not checked: labels: " in out) == ("not expressible" in run.line)
    if not run.fault:
        rows[0]["messages"][-1]["weight"] = 0
    code, out = audit(run, rows, **run.settings, **run.fault)
    assert (code, out.splitlines()[0]) == (1, run.line), out
    assert run.rules <= {line[:5] for line in out.splitlines()}, out
