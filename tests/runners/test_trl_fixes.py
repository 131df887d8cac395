"""Each fix that the guard prints for a run of TRL, followed: the run is then green."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trl_runs import (
    FAULTS,
    FORMS,
    OF_KINDS,
    PADS_WITH_EOS,
    OfTransformers,
    Record,
    Run,
    chats_of,
    collated,
    computed,
    encoded_row,
    in_form,
    mask_eos,
    mask_labels_by_the_pad,
    run_of,
    shift_once,
    trainer_of,
)

from pytest_mistral_lora import GuardError, guard, training_template
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.guarding.forms import fixes_of
from pytest_mistral_lora.guarding.steps import LOSS, PACKING
from pytest_mistral_lora.guarding.verdict import OF_ANY
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.runners import TRAINERS

trl = pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")


def findings_of(run: Run, base: Path, output: Path) -> list[Any]:
    """Return the findings of the guard on a run that it may stop."""
    trainer = trainer_of(run, base, output)
    callback = guard(trainer, tokenizer=run.named)
    with suppress(GuardError):
        trainer.train()
    assert callback.verdict is not None
    return list(callback.verdict.findings)


# -- what a user does whom a fix tells so


def _set(name: str, value: Any) -> Callable[[Run, str], Run]:
    return lambda run, fix: run.setting(**{name: value})


def _write_template(run: Run, fix: str) -> Run:
    [command] = re.findall(r"`(mistral-lora template [^`]*)`", fix)
    Path("training.jinja").unlink(missing_ok=True)
    assert main(shlex.split(command)[1:]) == 0
    return run.setting(chat_template_path="training.jinja")


def _set_template(run: Run, fix: str) -> Run:
    [path] = re.findall(r"chat_template = training_template\((.*?)\)`", fix)
    return replace(run, template=training_template(ast.literal_eval(path)))


def _leave_out_collator(run: Run, fix: str) -> Run:
    return replace(run, arguments={})


def _give_ids(run: Run, fix: str) -> Run:
    [path] = re.findall(r"CheckpointTokenizer\((.*?)\)\.oracle", fix)
    rows = [encoded_row(chat, ast.literal_eval(path)) for chat in chats_of(run)]
    return replace(run, rows=rows, settings={**run.settings, "assistant_only_loss": False})


def _give_messages(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("messages", chats_of(run)))


def _give_prompt_and_completion(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("prompt-completion", chats_of(run)))


def _leave_out_hostile(run: Run, fix: str) -> Run:
    return replace(run, rows=[row for row in run.rows if "[INST]" not in str(row["prompt"])])


def _strip_answers(run: Run, fix: str) -> Run:
    def stripped(said: list[Record]) -> list[Record]:
        return [message | {"content": message["content"].rstrip(" ")} for message in said]

    return replace(run, rows=[row | {side: stripped(row[side]) for side in ("chosen", "rejected")} for row in run.rows])


def _move_calls(run: Run, fix: str) -> Run:
    rows = [row | {"prompt": row["prompt"] + row["chosen"][:-1], "chosen": row["chosen"][-1:]} for row in run.rows]
    return replace(run, rows=rows)


def _give_pairs(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("pairs"))


def _set_tokens(run: Run, fix: str) -> Run:
    return replace(run, tokens={})


def _set_ids(run: Run, fix: str) -> Run:
    def set_ids(model: Any) -> None:
        model.config.bos_token_id = model.generation_config.bos_token_id = 1
        model.config.eos_token_id = model.generation_config.eos_token_id = 2

    return replace(run, change=set_ids)


def _allow_eos(run: Run, fix: str) -> Run:
    def allow(model: Any) -> None:
        run.change(model)
        model.generation_config.suppress_tokens, model.generation_config.eos_token_id = None, 2

    return replace(run, change=allow)


def _as_loaded(run: Run, fix: str) -> Run:
    return replace(run, after=lambda model: None)


def _leave_out_loss(run: Run, fix: str) -> Run:
    return replace(run, arguments={**run.arguments, "compute_loss_func": shift_once})


def _ask_for_no_cache(run: Run, fix: str) -> Run:
    return replace(run, derived=computed(use_cache=False))


def _unchanged(run: Run, fix: str) -> Run:
    return replace(run, change=lambda model: None)


def _adapt(run: Run, fix: str) -> Run:
    [layers] = re.findall(r"`target_modules=(.*?)`", fix)
    return replace(run, lora=ast.literal_eval(layers))


def _name_tokenizer(run: Run, fix: str) -> Run:
    [name] = re.findall(r"guard\(trainer, tokenizer=\"(.*?)\"\)", fix)
    return replace(run, named=name)


def _correct_rows(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("messages"))


STEPS: tuple[tuple[str, Callable[[Run, str], Run]], ...] = (
    ("Give ids in place of", _give_ids),
    ("give ids: columns `input_ids`", _give_ids),
    ("Leave out the rows that the finding names", _leave_out_hostile),
    ("Strip the answers", _strip_answers),
    ("Put calls and results into `prompt`", _move_calls),
    ("Make both anew, `input_ids` and `labels`", _give_ids),
    ("Give `messages` in its place", _give_messages),
    ("and `completion: [{", _give_prompt_and_completion),
    ('and `"completion": [{', _give_prompt_and_completion),
    ("and `chosen` and `rejected` alike", _give_pairs),
    ("`assistant_only_loss: true`", _set("assistant_only_loss", True)),
    ("`completion_only_loss: true`", _set("completion_only_loss", True)),
    ("`max_length: null`", _set("max_length", None)),
    ("`packing: false`", _set("packing", False)),
    ("`chat_template_path: training.jinja`", _write_template),
    ("chat_template = training_template(", _set_template),
    ('`tokenizer.eos_token = "</s>"`', _set_tokens),
    ('`tokenizer.pad_token = "<pad>"`', _set_tokens),
    ("`model.config.eos_token_id = 2`", _set_ids),
    ("`model.generation_config.suppress_tokens = None`", _allow_eos),
    ("`parameter.requires_grad_(False)`", _as_loaded),
    ("is_trainable=True", _as_loaded),
    ("once and where the label is not -100", _leave_out_loss),
    ("Set `use_cache=False`", _set("use_cache", False)),
    ("`compute_loss` of your own must not ask for a cache", _ask_for_no_cache),
    ("eave `resize_token_embeddings` out", _unchanged),
    ("Take the keys out of the model", _unchanged),
    ("`requires_grad_(True)` on them", _as_loaded),
    ("`target_modules=", _adapt),
    ("Name it: guard(", _name_tokenizer),
    ("Correct the row", _correct_rows),
    ("eave `data_collator`", _leave_out_collator),
)
"""The words of a fix that tell a step, and the step."""


def followed(run: Run, fix: str) -> Run:
    steps = [step for words, step in STEPS if words in fix]
    assert steps, fix
    for step in steps:
        run = step(run, fix)
    return run


BESIDE = {
    # no answers are marked, or each token of a text is trained on
    ("messages", "ML442"): {"ML543"},
    ("messages", "ML204"): {"ML543"},
    ("ids", "ML204"): {"ML543"},
    ("text", "ML442"): {"ML543"},
    ("text", "ML510"): {"ML543"},
    ("text", "ML522"): {"ML543"},
    # the texts have no control tokens, whatever the template is
    ("texts", "ML442"): {"ML560"},
    # the template writes the tokenizer's BOS
    ("messages", "ML203"): {"ML521", "ML532", "ML519"},
    # the last label comes to stand in the padding
    ("messages", "ML541"): {"ML510"},
    # a cut may take EOS alone
    ("messages", "ML531"): {"ML522"},
    ("messages", "ML506"): {"ML531", "ML522"},
    # rows are cut wherever a sequence is full
    ("packed", "ML513"): {"ML512", "ML522", "ML560"},
}
"""What is found beside the rule of a fault; of the others it is the one cause."""


@pytest.mark.parametrize(("form", "rule"), [*FAULTS, *OF_KINDS])
def test_the_run_is_green_once_its_fixes_are_followed(
    form: str, rule: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = (FAULTS | OF_KINDS)[form, rule]
    found = findings_of(run, base, tmp_path / "out")
    rules = {finding.rule for finding in found}
    if (form, rule) in BESIDE:
        assert rules | {covered for finding in found for covered, _ in finding.covers} >= {rule, *BESIDE[form, rule]}
    else:
        assert rules == {rule}
    for fix in dict.fromkeys(finding.next_step for finding in found):
        run = followed(run, fix)
    assert findings_of(run, base, tmp_path / "out") == []


@pytest.mark.parametrize("form", ["messages", "prompt-completion", "texts", "text", "ids"])
def test_a_pad_token_that_is_eos_is_the_one_cause_of_masked_eos(form: str, base: Path, tmp_path: Path) -> None:
    run = run_of(form, **PADS_WITH_EOS, **collated(mask_labels_by_the_pad))
    first, *others = findings_of(run, base, tmp_path / "out")
    assert (first.rule, str(first.place), dict(first.covers)["ML546"]) == ("ML204", "processing_class", 4)
    # each token of a rendered text is trained on
    assert {finding.rule for finding in others} == ({"ML543"} if form == "text" else set())
    # with another pad token, the same collator masks no EOS
    after = findings_of(_set_tokens(run, first.next_step), base, tmp_path / "out")
    assert {finding.rule for finding in after} == {finding.rule for finding in others}


def test_a_fault_beside_a_pad_token_that_is_eos_stays(base: Path, tmp_path: Path) -> None:
    run = run_of("messages", **PADS_WITH_EOS, arguments={"data_collator": OfTransformers()})
    first, *others = findings_of(run, base, tmp_path / "out")
    assert (first.rule, {rule for rule, _ in first.covers}) == ("ML204", {"ML204", "ML546", "ML547"})
    assert [finding.rule for finding in others] == ["ML543"] * 4
    assert {finding.rule for finding in findings_of(_set_tokens(run, ""), base, tmp_path / "out")} == {"ML543"}


def test_eos_that_the_dataset_has_masked_is_no_fault_of_the_pad_token(base: Path, tmp_path: Path) -> None:
    rows = [row | {"labels": [-100 if label == 2 else label for label in row["labels"]]} for row in in_form("ids")]
    found = findings_of(run_of("ids", rows=rows, **PADS_WITH_EOS), base, tmp_path / "out")
    assert "ML546" in {finding.rule for finding in found}
    assert {finding.covers for finding in found} == {()}


def test_eos_that_another_token_pads_is_masked_by_the_collator(base: Path, tmp_path: Path) -> None:
    found = findings_of(run_of("messages", **collated(mask_eos)), base, tmp_path / "out")
    assert {finding.rule for finding in found} == {"ML546"}
    sound = run_of("messages", **PADS_WITH_EOS)
    assert findings_of(sound, base, tmp_path / "out") == []


def test_every_line_of_fixes_is_followed() -> None:
    lines = {(form, key): fix for form in FORMS for key, fix in TRAINERS["trl"].fixes(form).items()}
    lines |= {("guard", key): fix for key, fix in fixes_in(OF_ANY)["guard"].items() if key not in ("ML004", "ML442")}
    reached = {(form, fixes_of(TRAINERS["trl"], form).get(rule, "")) for form, rule in FAULTS}
    reached |= {("guard", fixes_in(OF_ANY)["guard"].get(rule, "")) for _, rule in FAULTS}
    assert {line for line, fix in lines.items() if (line[0], fix) not in reached} == set()


def test_every_fix_for_the_model_and_the_tokenizer_is_followed() -> None:
    checks = {
        "tokenizer": ("oracle", "bos-eos-unk", "model-config"),
        "adapter": ("placement",),
        "train": ("frozen-adapter-is-refused", "every-layer-moved", "only-lora-changed", LOSS, PACKING),
        "encoded": ("file",),
    }
    rules = {"ML313"} | {
        rule.id for subject, cases in checks.items() for case in cases for rule in RULES.of(subject, case)
    }
    # a declared oracle, the folder of an adapter, a loss that nothing explains, and files: nothing of a trainer
    rules -= {"ML230", "ML454", "ML327", "ML501", "ML570"}
    assert rules - {rule for _, rule in FAULTS} == {"ML453"}  # it has the line of ML452


def test_every_rule_of_rows_has_a_fix_in_the_words_of_each_form() -> None:
    cases = {"ids", "labels", "packing", "supervised-text"}
    rules = {rule.id for rule in RULES.of("encoded") if cases & set(rule.cases)}
    assert {(form, rule) for form in FORMS for rule in rules if rule not in fixes_of(TRAINERS["trl"], form)} == set()
