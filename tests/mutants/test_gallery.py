"""Every rule is shown to fire: on its own bad example, and on the mutants of the gallery."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gallery import Mutant, benches, mutants
from incidents import INCIDENTS

from pytest_mistral_lora.conformance.finding import RULES, Rule

pytestmark = pytest.mark.gallery

BENCHES = benches()
GALLERY = [
    pytest.param(module, mutant, id=f"{subject}-{mutant.name}")
    for subject, module in BENCHES.items()
    for mutant in mutants(module)
]


@pytest.mark.parametrize("module", BENCHES.values(), ids=BENCHES)
def test_a_sound_artifact_breaks_no_rule(module: ModuleType, tmp_path: Path) -> None:
    artifact = module.BENCH.make(tmp_path)
    assert set(artifact) == set(module.BENCH.names)
    assert [finding.text() for finding in module.BENCH.judge(artifact)] == []


@pytest.mark.parametrize(("module", "mutant"), GALLERY)
def test_a_mutant_fires_its_rules_and_no_other(module: ModuleType, mutant: Mutant, tmp_path: Path) -> None:
    artifact = module.BENCH.make(tmp_path)
    mutant.change(artifact)
    findings = module.BENCH.judge(artifact)
    assert {finding.rule for finding in findings} == mutant.fires, [finding.text() for finding in findings]
    assert not mutant.says or any(mutant.says in finding.text() for finding in findings)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_examples_of_a_rule_break_it_and_keep_it(rule: Rule, tmp_path: Path) -> None:
    assert rule.id in _after(rule.bad, rule, tmp_path / "bad")
    assert _after(rule.good, rule, tmp_path / "good") == set()


def _after(example: str, rule: Rule, folder: Path) -> set[str]:
    folder.mkdir()
    bench = BENCHES[rule.subject].BENCH
    artifact: dict[str, Any] = bench.make(folder)
    names = dict(artifact)
    exec(compile(example, f"the example of {rule.id}", "exec"), names)
    artifact.update({name: names[name] for name in artifact})
    return {finding.rule for finding in bench.judge(artifact)}


def test_every_rule_has_a_mutant() -> None:
    fired = {rule for module in BENCHES.values() for mutant in mutants(module) for rule in mutant.fires}
    assert fired == set(RULES)


def test_every_mutant_says_what_is_broken() -> None:
    for module in BENCHES.values():
        for mutant in mutants(module):
            assert mutant.change.__doc__, mutant.name


def test_every_incident_is_caught_or_said_to_be_out_of_reach() -> None:
    caught = {incident for module in BENCHES.values() for mutant in mutants(module) for incident in mutant.incidents}
    assert caught <= {incident.id for incident in INCIDENTS}
    assert {incident.id for incident in INCIDENTS if not incident.out_of_reach} == caught
