"""The trainer as it is keeps every law of training: the laws are stated in `conformance/train`, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from class_steps import CASES, Case

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import TinyKind, write_tiny_base
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.checks import checks
from pytest_mistral_lora.conformance.train.tiny_run import TinyRun, tiny_run

pytestmark = pytest.mark.mistral_training


def checks_in(folder: Path) -> dict[str, Check]:
    settings = Settings(20, None, "cpu", False, (), False, folder)
    return {check.case: check for check in checks(Target("spm-v3"), settings)}


@pytest.fixture(scope="session")
def tiny(tiny_work: Path) -> TinyRun:
    return tiny_run(Oracle(shipped_tokenizer("spm-v3")), tiny_work, device="cpu")


@pytest.mark.parametrize("case", checks_in(Path()))
def test_the_trainer_keeps_the_law(case: str, tiny_work: Path) -> None:
    result = checks_in(tiny_work)[case].run()
    assert [finding.text() for finding in result.findings] == []
    assert result.not_checked == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", [one for one in CASES if one.architecture.text.has_oracle], ids=str)
def test_the_trainer_keeps_the_laws_on_a_tiny_model_of_every_class(case: Case, tmp_path: Path) -> None:
    if not hasattr(transformers, case.architecture.text.name):
        pytest.skip(f"transformers {case.architecture.text.since} has the class")
    kind = TinyKind(case.architecture, case.tied)
    file = shipped_tokenizer("spm-v3")
    base = write_tiny_base(tmp_path / "base", file, architecture=case.architecture, tied=case.tied)
    settings = Settings(20, None, "cpu", False, (), False, tmp_path)
    results = {check.case: check.run() for check in checks(Target("base", base), settings)}
    assert {case: [finding.text() for finding in one.findings] for case, one in results.items() if one.findings} == {}
    assert {one.facts[:2] for one in results.values()} == {(("device", "cpu"), ("model", str(kind)))}
    assert {case for case, one in results.items() if one.not_checked} == set()
    unmeasured = {case for case, one in results.items() if "not measured" in dict(one.facts)}
    assert unmeasured == (set() if case.architecture.text.has_window else {"loaded-as-configured"})


@pytest.mark.parametrize(
    ("measure", "most"),
    [("measure_accumulation", 1e-5), ("measure_checkpointing", 1e-6), ("measure_loss", 1e-4)],
)
def test_on_a_cpu_gradients_are_nearer_than_the_law_asks(measure: str, most: float, tiny: TinyRun) -> None:
    """A law leaves room for the fused losses of other trainers; this one needs none."""
    assert tiny.evidence["laws"][measure]["gradient"] < most


def test_what_stops_a_run_is_named(tiny: TinyRun) -> None:
    stops: dict[str, Any] = tiny.evidence["laws"]["measure_finite"]["stops"]
    assert "the loss is nan at step 1" in stops["activation"]["stopped"]
    assert "a gradient is not finite at step 1" in stops["gradient"]["stopped"]
