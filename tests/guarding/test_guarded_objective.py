"""The guard judges the labels of a run by the objective that is declared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import begin, encoded, errors_of, losses_of, make_trainer
from preference_records import orpo, texts_pair, with_ids

from pytest_mistral_lora import GuardError, MistralGuard, guard
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import InputError

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


def rows_of(oracle: Oracle, words: str, *, messages: bool) -> Rows:
    talks = []
    for town in ("Rome", "Porto", "Graz", "Brno", "Lyon", "Turku", "Cork", "Ghent"):
        said = [f"Where is {town}?", f"{town} is in Europe.", f"Is {town} warm?", f"In summer, {town} is."]
        roles = ("user", "assistant") * 2
        row = parse_row({"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]})
        talks.append(replace(row, objective=Objective.of(words, "test")))
    return encoded(oracle, talks, messages=messages)


def test_a_run_on_the_last_answers_alone_is_declared(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, rows_of(oracle, "last-answer", messages=False), tmp_path, max_steps=1)
    callback = guard(trainer, objective="last-answer")
    trainer.train()
    assert callback.verdict is not None
    assert (callback.verdict.ok, callback.verdict.findings) == (True, ())
    assert "no finding; objective: last-answer (objective=)" in capsys.readouterr().out
    assert str(callback.verdict).startswith("objective: last-answer (objective=)\n")
    # the labels of each answer are not those of the declared objective
    trainer = make_trainer(base, rows_of(oracle, "answers", messages=True), tmp_path, max_steps=1)
    trainer.add_callback(MistralGuard(objective="last-answer"))
    with pytest.raises(GuardError) as stopped:
        trainer.train()
    assert {rule for rule, _ in errors_of(stopped.value.verdict)} == {"ML549"}
    assert "`last-answer`" in stopped.value.verdict.findings[0].next_step
    assert losses_of(trainer) == []


def test_what_all_rows_follow_is_one_finding(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows_of(oracle, "last-answer", messages=True), tmp_path)
    verdict = begin(trainer, on_finding="warn").verdict
    assert errors_of(verdict) == {("ML508", "batches")}
    trainer = make_trainer(base, rows_of(oracle, "last-answer", messages=False), tmp_path)
    verdict = begin(trainer, on_finding="warn").verdict
    assert verdict is not None
    assert verdict.ok
    assert [(finding.rule, finding.severity) for finding in verdict.findings] == [("ML508", "note")]


def test_everything_is_red_until_it_is_declared(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = [{**row, "labels": row["input_ids"]} for row in rows_of(oracle, "answers", messages=False)]
    verdict = begin(make_trainer(base, rows, tmp_path), on_finding="warn").verdict
    assert {rule for rule, _ in errors_of(verdict)} == {"ML543"}
    assert verdict is not None
    assert "--objective everything" in verdict.findings[0].expected
    assert begin(make_trainer(base, rows, tmp_path), objective="everything").verdict.findings == ()


def test_a_wrong_objective_is_refused(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    for make in (MistralGuard, lambda **given: guard(make_trainer(base, [], tmp_path), **given)):
        with pytest.raises(InputError, match=r"^objective=: 'last' is no objective"):
            make(objective="last")
    trainer = make_trainer(base, rows_of(oracle, "answers", messages=True), tmp_path)
    with pytest.raises(GuardError, match=r"could not judge the run: objective=: no-thinking is about \[THINK\]"):
        begin(trainer, objective="no-thinking")


def test_pairs_take_no_objective(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    pairs = [orpo(with_ids(oracle, texts_pair(f"a {number}", "b", "c"))) for number in range(4)]
    trainer = make_trainer(base, pairs, tmp_path, remove_unused_columns=False)
    names = [f"{side}_{part}" for side in ("chosen", "rejected") for part in ("input_ids", "labels")]
    trainer.data_collator = lambda items: {name: torch.tensor([item[name] for item in items]) for name in names}
    assert errors_of(begin(trainer, on_finding="warn").verdict) == set()
    with pytest.raises(GuardError, match="a preference pair takes no objective"):
        begin(trainer, objective="last-answer")
