"""As `test_faults_and_healthy_runs` of the guard, in TRL's trainers. Left out, with the reason, without TRL."""

from __future__ import annotations

from pathlib import Path

import pytest
from guard_faults import Fault
from guard_healthy import Healthy
from guard_trl_runs import trl_faults, trl_healthy_runs
from guarded_runs import losses_of
from trl_runs import trainer_of

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.guarding.steps import LOSS, PACKING

pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in trl_faults()])
def test_a_fault_is_the_one_cause_that_stops_the_run(fault: Fault, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(fault.plant(), base, tmp_path / "out")
    guard(trainer)
    with pytest.raises(GuardError, match=f"^the run is stopped {fault.moment}") as stopped:
        trainer.train()
    first, *others = stopped.value.verdict.findings
    assert (first.rule, first.severity, str(first.place)) == (fault.rule, "error", fault.place)
    assert fault.says in first.found
    assert fault.token in first.found
    assert {finding.rule for finding in others} <= {fault.rule}
    assert len(others) + 1 == fault.count
    assert (losses_of(trainer), trainer.state.global_step) == ([], 0)


@pytest.mark.parametrize("run", [pytest.param(run, id=run.name) for run in trl_healthy_runs()])
def test_a_healthy_run_goes_on_and_has_the_same_losses(run: Healthy, base: Path, tmp_path: Path) -> None:
    losses = []
    for is_guarded in (False, True):
        trainer = trainer_of(run.set_up().setting(max_steps=2), base, tmp_path / "out")
        callback = guard(trainer) if is_guarded else None
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert callback is not None
    assert callback.verdict is not None
    assert (callback.verdict.ok, callback.verdict.findings) == (True, ())
    assert callback.verdict.facts["batches::encoded::ids"]["judged"] > 0
    assert f"trainer::train::{PACKING}" not in callback.verdict.not_checked
    reason = callback.verdict.not_checked.get(f"trainer::train::{LOSS}", "")
    assert run.unchecked in reason
    assert bool(reason) is bool(run.unchecked)
    if not reason:
        facts = callback.verdict.facts[f"trainer::train::{LOSS}"]
        assert 0 < facts["compared"] == facts["labels"] == facts["positions with a gradient"]
