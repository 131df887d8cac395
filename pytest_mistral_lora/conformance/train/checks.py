"""Subject `train`: the checks of one tiny end-to-end train with the target's tokenizer, and of the laws of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from pytest_mistral_lora.checkpoint.tiny_model import TinyKind
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.harness import TrainingLaw
from pytest_mistral_lora.conformance.train.tiny_run import LAWS, TinyRun, attempt
from pytest_mistral_lora.errors import MistralLoraError, PinError
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.places import Place

_Judge: TypeAlias = Callable[[TinyRun], Iterator[Finding]]

_LOGIT_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""Largest difference of a logit between the trained model and the reloaded model; 0 on a CPU."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield a check for each property of the tiny train's own adapter, and one for the laws of each rule."""
    table: tuple[tuple[str, _Judge], ...] = (
        ("only-lora-changed", _judge_base),
        ("every-layer-moved", _judge_layers),
        ("reloaded-logits-equal", _judge_reloaded),
        ("manifest-verifies", _judge_manifest),
        ("adapter-is-sound", _judge_adapter),
    )
    laws: dict[str, list[TrainingLaw]] = {}
    for law in LAWS:
        laws.setdefault(law.rule, []).append(law)
    judged: list[tuple[str, _Judge | list[TrainingLaw], bool]] = [
        ("learned-by-heart", _judge_learning, False),
        *((case, judge, True) for case, judge in table),
        *((RULES[rule].case, of_rule, of_rule[0].needs_adapter) for rule, of_rule in laws.items()),
    ]
    for case, judge, needs_adapter in judged:
        yield Check(target, "train", case, partial(_judge_run, target, settings, judge, needs_adapter))


def _judge_run(target: Target, settings: Settings, judge: _Judge | list[TrainingLaw], needs_adapter: bool) -> Result:
    require_extra("train")
    oracle = target.oracle
    try:
        kind = TinyKind.of(target.checkpoint)
    except PinError as error:
        return Result(not_checked=f"no tiny model is trained: {error}")
    try:
        run = attempt(oracle, settings.work_folder, device=settings.device, kind=kind)
    except MistralLoraError as error:
        return Result((_failed_train(str(error), oracle.path),))
    if run.failed and (needs_adapter or (run.lacks_template and judge is _judge_learning)):
        return Result(not_checked=f"there is no trained adapter: {run.failed}")
    facts = (("device", run.device), ("model", str(kind)))
    if isinstance(judge, list):
        result = _judge_laws(judge, run)
        return replace(result, facts=(*facts, *result.facts))
    return Result(tuple(judge(run)), facts=facts)


def _judge_laws(laws: list[TrainingLaw], run: TinyRun) -> Result:
    """Return the findings of the laws of a rule: each once, such as an error that ends several measurements."""
    results = [law.result(run.evidence["laws"][law.measure.__name__], run.device) for law in laws]
    unmeasured = [result.not_checked for result in results if result.not_checked]
    if len(unmeasured) == len(laws):
        return Result(not_checked=unmeasured[0])
    findings: dict[tuple[str, Place], Finding] = {}
    for finding in chain.from_iterable(result.findings for result in results):
        findings.setdefault((finding.found, finding.place), finding)
    return Result(tuple(findings.values()), facts=tuple(("not measured", reason) for reason in unmeasured))


def _failed_train(cause: str, place: Path) -> Finding:
    return Finding("ML301", f"the tiny train failed: {cause}", Place.of(place), "a trained adapter", name="ML301.run")


def _judge_learning(run: TinyRun) -> Iterator[Finding]:
    if run.failed:
        yield _failed_train(run.failed, run.folder)
        return
    for answer in run.smoke["completions"]:
        place = Place.of(run.rows.name, answer["row"] + 1)
        if not answer["equal"]:
            found = f"said {answer['text']!r} {answer['ids']}, stopped by {answer['stop']}"
            yield Finding("ML301", found, place, f"{answer['expected_ids']}", name="ML301.answers")
        elif answer["stop"] != "eos":
            yield Finding("ML301", f"stopped by {answer['stop']}", place, "EOS", name="ML301.answers")
    losses = run.evidence["losses"]
    if not losses[-1] < losses[0] / 2:
        found = f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
        yield Finding("ML301", found, expected="less than half", name="ML301.loss")


def _judge_base(run: TinyRun) -> Iterator[Finding]:
    for name in run.evidence["changed_base_tensors"]:
        yield Finding("ML302", f"{name} is not as it was", Place.of(run.base), "the base as it was before training")


def _judge_layers(run: TinyRun) -> Iterator[Finding]:
    for name in run.evidence["unmoved_tensors"]:
        yield Finding("ML303", f"{name} did not move", Place.of(run.adapter), "a change by training")


def _judge_reloaded(run: TinyRun) -> Iterator[Finding]:
    before, after = run.evidence["label_logits"], run.smoke["probe"]["label_logits"]
    counts = [list(map(len, rows)) for rows in (before, after)]
    if counts[0] != counts[1]:
        yield Finding("ML305", f"{counts[1]} tokens are supervised", Place.of(run.rows), f"{counts[0]}, as in training")
        return
    farthest = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    if farthest > _LOGIT_TOLERANCE[run.device]:
        yield Finding(
            "ML305", f"logits are up to {farthest:.3g} apart", Place.of(run.adapter), "those of the trained model"
        )
    # equal logits prove nothing if the adapter was not applied either time
    if not run.smoke["adapter_effect"] > 0:
        yield Finding("ML305", "the adapter changes no logit", Place.of(run.adapter), "logits other than the base's")


def _judge_manifest(run: TinyRun) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.manifest import manifest_findings, verify_findings

    findings = list(manifest_findings(run.adapter))
    yield from findings
    if not findings:
        yield from verify_findings(run.adapter, base=run.base, dataset=[run.rows])


def _judge_adapter(run: TinyRun) -> Iterator[Finding]:
    if "adapter_findings" in run.evidence:
        found = [Finding.from_json(finding) for finding in run.evidence["adapter_findings"]]
    else:
        from pytest_mistral_lora.conformance.adapter.checks import adapter_findings

        found = list(adapter_findings(run.adapter, run.base))
    # a note about servers for adapters of this class does not apply: nobody serves this adapter
    yield from (finding for finding in found if finding.severity == "error")
