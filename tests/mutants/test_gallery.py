"""Every rule is shown to fire: on its own bad example, and on the mutants of the gallery."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from gallery import Mutant, benches, examples, fired, mutants
from incidents import INCIDENTS
from sampling import sampled, sampled_case

from pytest_mistral_lora.conformance.checks import Check
from pytest_mistral_lora.conformance.finding import RULES, Result

pytestmark = pytest.mark.gallery

BENCHES = benches()
EXAMPLES = {rule: example for subject in BENCHES for rule, example in examples(subject).items()}


@pytest.fixture(autouse=True)
def each_finding_is_of_the_check_that_its_rule_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule names the check of its subject that reports it: those who choose checks by it must not miss it."""
    run = Check.run

    def run_and_compare(check: Check) -> Result:
        result = run(check)
        rules = [RULES[finding.rule] for finding in result.findings]
        odd = [rule.id for rule in rules if rule.subject == check.subject and {check.case, "*"}.isdisjoint(rule.cases)]
        assert not odd, f"{check.name} reports {odd}, whose rules name another case"
        return result

    monkeypatch.setattr(Check, "run", run_and_compare)


GALLERY = [
    sampled_case(module, mutant, name=f"{subject}-{mutant.name}", is_kept=not mutant.slow)
    for subject, module in BENCHES.items()
    for mutant in mutants(module)
]


@pytest.mark.parametrize("module", BENCHES.values(), ids=BENCHES)
def test_a_sound_artifact_breaks_no_rule(module: ModuleType, tmp_path: Path) -> None:
    artifact = module.BENCH.make(tmp_path)
    assert [finding.text() for finding in module.BENCH.judge(artifact)] == []


@pytest.mark.parametrize(("module", "mutant"), GALLERY)
def test_a_mutant_fires_its_rules_and_no_other(module: ModuleType, mutant: Mutant, tmp_path: Path) -> None:
    artifact = module.BENCH.make(tmp_path)
    mutant.change(artifact)
    findings = module.BENCH.judge(artifact)
    assert fired(findings) == mutant.fires, [finding.text() for finding in findings]
    assert not mutant.says or any(mutant.says in finding.text() for finding in findings)


# each replaces a function of the trainer by one that is as sound, so that all is trained again; a twin with the same
# function is judged in every run
TRAINED_AGAIN = ("ML320", "ML322")


@pytest.mark.parametrize("rule_id", sampled(RULES, [rule for rule in RULES if rule not in TRAINED_AGAIN]))
def test_the_sound_twin_of_an_example_breaks_no_rule(rule_id: str, tmp_path: Path) -> None:
    # test_rule_examples.py breaks the other twin
    rule = RULES[rule_id]
    bench = BENCHES[rule.subject].BENCH
    artifact = bench.make(tmp_path)
    EXAMPLES[rule.id].sound(artifact)
    assert [finding.text() for finding in bench.judge(artifact)] == []


def test_every_rule_has_an_example() -> None:
    assert EXAMPLES.keys() == RULES.keys()


def test_every_rule_has_a_mutant_that_is_judged_in_every_run() -> None:
    judged = [mutant for module in BENCHES.values() for mutant in mutants(module) if not mutant.slow]
    parts = [f"{rule.id}.{name}" for rule in RULES.values() for name in rule.names]
    assert {rule for mutant in judged for rule in mutant.rules} == set(RULES)
    assert {name for mutant in judged for name in mutant.fires if "." in name} == set(parts)


def test_every_mutant_says_what_is_broken() -> None:
    for module in BENCHES.values():
        for mutant in mutants(module):
            assert mutant.change.__doc__, mutant.name


def test_every_incident_is_caught_or_said_to_be_out_of_reach() -> None:
    caught = {incident for module in BENCHES.values() for mutant in mutants(module) for incident in mutant.incidents}
    assert caught <= {incident.id for incident in INCIDENTS}
    assert {incident.id for incident in INCIDENTS if not incident.out_of_reach} == caught
