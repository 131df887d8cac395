"""Each planted fault of a real run is the one cause that the guard names, and each healthy run is left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from guard_faults import BEFORE, Fault, faults
from guard_healthy import Healthy, healthy_runs
from guarded_runs import losses_of
from planned_runs import Plan
from sampling import sampled_case

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.guarding.steps import LOSS, PACKING

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")


def _cases(rows: Any) -> list[Any]:
    """Return each row with the steps for which its model has learned its rows, and whether these have messages."""
    made = []
    for row in rows:
        for steps in row.steps:
            for has_messages in (False, True) if getattr(row, "of_rows", False) else (False,):
                variant = f"{'-learned' * bool(steps)}{steps or ''}{'-with-messages' * has_messages}"
                is_kept = row.is_sampled and not variant
                made.append(sampled_case(row, steps, has_messages, name=f"{row.name}{variant}", is_kept=is_kept))
    return made


@pytest.mark.parametrize(("fault", "steps", "has_messages"), _cases(faults()))
def test_a_fault_is_the_one_cause_that_stops_the_run(
    fault: Fault, steps: int, has_messages: bool, base: Path, tmp_path: Path
) -> None:
    plan = Plan(base, tmp_path, steps=steps, has_messages=has_messages)
    fault.plant(plan)
    trainer = plan.trainer()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    guard(trainer, **plan.guarded)
    with pytest.raises(GuardError, match=f"^the run is stopped {fault.moment}") as stopped:
        trainer.train()
    first, *others = stopped.value.verdict.findings
    assert (first.rule, first.severity, str(first.place)) == (fault.rule, "error", fault.place)
    assert fault.says in first.found
    assert steps or fault.token in first.found
    assert {finding.rule for finding in others} <= {fault.rule}
    assert len(others) + 1 == fault.count
    # in the words of the trainer, and not of a checkpoint's files
    # of the model and the tokenizer, in the words of the trainer, and not of a checkpoint's files
    assert ".json" not in first.next_step or "[" in fault.place
    if fault.moment == BEFORE:
        assert (losses_of(trainer), trainer.state.global_step) == ([], 0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(("run", "steps", "has_messages"), _cases(healthy_runs()))
def test_a_healthy_run_goes_on_and_has_the_same_losses(
    run: Healthy, steps: int, has_messages: bool, base: Path, tmp_path: Path
) -> None:
    losses = []
    for is_guarded in (False, True):
        plan = Plan(base, tmp_path / str(is_guarded), steps=steps, has_messages=has_messages)
        run.set_up(plan)
        trainer = plan.trainer()
        callback = guard(trainer, **plan.guarded) if is_guarded else None
        trainer.train(resume_from_checkpoint=plan.settings.get("resume_from_checkpoint"))
        losses.append(losses_of(trainer))
    assert str(losses[0]) == str(losses[1])  # one may be no number
    assert len(losses[0]) > 1
    assert callback is not None
    verdict = callback.verdict
    assert verdict is not None
    assert verdict.ok
    assert [(finding.rule, finding.severity) for finding in verdict.findings] == [(run.note, "note")] * bool(run.note)
    assert all(run.says in finding.found for finding in verdict.findings)
    reason, case = verdict.not_checked.get(f"trainer::train::{LOSS}", ""), f"trainer::train::{LOSS}"
    assert run.reason(steps) in reason
    assert bool(reason) is bool(run.reason(steps))
    assert f"trainer::train::{PACKING}" not in verdict.not_checked
    assert verdict.facts["batches::encoded::labels"]["judged"] > 0
    if not reason:
        facts = verdict.facts[case]
        assert facts["compared"] <= facts["labels"] <= facts["positions with a gradient"]
        assert steps or facts["compared"] == facts["labels"]


def test_there_are_as_many_as_the_page_says() -> None:
    assert len([*faults()]) >= 40
    assert len([*healthy_runs()]) >= 30
