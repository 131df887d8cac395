"""Subject `train`: what the tiny end-to-end train must have kept; one check a rule, all of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.harness import Law
from pytest_mistral_lora.conformance.train.laws import LAWS
from pytest_mistral_lora.conformance.train.tiny_run import TinyRun, attempt
from pytest_mistral_lora.errors import MistralLoraError

_LOGIT_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""How far a reloaded model's logits may be from the trained one's: equal to the bit on a CPU."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield the checks of the tiny train."""
    table: tuple[tuple[str, Callable[[TinyRun], Iterator[Finding]]], ...] = (
        ("learned-by-heart", _learned),
        ("only-lora-changed", _only_lora),
        ("every-layer-moved", _every_layer),
        ("loss-fell", _loss_fell),
        ("reloaded-logits-equal", _reloaded),
        ("manifest-verifies", _manifest),
        ("adapter-is-sound", _adapter),
    )
    for case, check in table:
        yield Check(target, "train", case, partial(_run, target, settings, check))
    for law in LAWS:
        yield Check(target, "train", law.case, partial(_run_law, target, settings, law))


def _run(target: Target, settings: Settings, check: Callable[[TinyRun], Iterator[Finding]]) -> Result:
    run = _attempt(target, settings)
    if isinstance(run, Result):
        return run
    if run.failed and check is not _learned:
        return Result(not_checked=f"there is no trained adapter: {run.failed}")
    return Result(tuple(check(run)), facts=(("device", run.device),))


def _run_law(target: Target, settings: Settings, law: Law) -> Result:
    run = _attempt(target, settings)
    if isinstance(run, Result):
        return run
    if run.failed and law.of_adapter:
        return Result(not_checked=f"there is no trained adapter: {run.failed}")
    found = law.findings(run.evidence["laws"][law.measure.__name__], run.device)
    return Result(tuple(found), facts=(("device", run.device),))


def _attempt(target: Target, settings: Settings) -> TinyRun | Result:
    oracle = target.oracle
    try:
        return attempt(oracle, settings.work_folder, device=settings.device)
    except MistralLoraError as error:
        return Result((_failed(str(error), oracle.path),))


def _failed(cause: str, place: Path) -> Finding:
    return Finding("ML301", f"the tiny train failed: {cause}", str(place), "a trained adapter")


def _learned(run: TinyRun) -> Iterator[Finding]:
    if run.failed:
        yield _failed(run.failed, run.folder)
        return
    for one in run.smoke["completions"]:
        if not one["equal"]:
            said = f"{one['text']!r} {one['ids']}, stopped by {one['stop']}"
            yield Finding("ML301", f"said {said}", f"{run.rows.name}:{one['row'] + 1}", f"{one['expected_ids']}")
        elif one["stop"] != "eos":
            yield Finding("ML301", f"stopped by {one['stop']}", f"{run.rows.name}:{one['row'] + 1}", "EOS")


def _only_lora(run: TinyRun) -> Iterator[Finding]:
    for name in run.evidence["changed_base_tensors"]:
        yield Finding("ML302", f"{name} is not as it was", str(run.base), "the base as it was before training")


def _every_layer(run: TinyRun) -> Iterator[Finding]:
    for name in run.evidence["unmoved_layers"]:
        yield Finding("ML303", f"{name} did not move", str(run.adapter), "a change by training")


def _loss_fell(run: TinyRun) -> Iterator[Finding]:
    losses = run.evidence["losses"]
    if not losses[-1] < losses[0] / 2:
        yield Finding("ML304", f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last", expected="less than half")


def _reloaded(run: TinyRun) -> Iterator[Finding]:
    before, after = run.evidence["label_logits"], run.smoke["probe"]["label_logits"]
    counts = [list(map(len, rows)) for rows in (before, after)]
    if counts[0] != counts[1]:
        yield Finding("ML305", f"{counts[1]} tokens are supervised", str(run.rows), f"{counts[0]}, as in training")
        return
    farthest = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    device = run.device
    if farthest > _LOGIT_TOLERANCE[device]:
        yield Finding("ML305", f"logits are up to {farthest:.3g} apart", str(run.adapter), "those of the trained model")
    if not run.smoke["adapter_effect"] > 0:
        yield Finding("ML305", "the adapter changes no logit", str(run.adapter), "logits other than the base's")


def _manifest(run: TinyRun) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.manifest import manifest_findings, verify_findings

    findings = list(manifest_findings(run.adapter))
    yield from findings
    if not findings:
        yield from verify_findings(run.adapter, base=run.base, dataset=[run.rows])


def _adapter(run: TinyRun) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.adapter.checks import adapter_findings

    yield from adapter_findings(run.adapter, run.base)
