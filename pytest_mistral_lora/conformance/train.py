"""Subject `train`: what the tiny end-to-end train must have kept; one check a rule, all of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tiny_run import TinyRun, tiny_run
from pytest_mistral_lora.errors import MistralLoraError

_LOGIT_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
"""How far a reloaded model's logits may be from the trained one's: equal to the bit on a CPU."""

_SEED_TOLERANCE = 1e-3
"""How far apart the same run's adapters may be on CUDA, whose kernels sum in no fixed order; on a CPU, not at all."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield the checks of the tiny train."""
    table: tuple[tuple[str, Callable[[TinyRun], Iterator[Finding]]], ...] = (
        ("learned-by-heart", _learned),
        ("only-lora-changed", _only_lora),
        ("every-layer-moved", _every_layer),
        ("loss-fell", _loss_fell),
        ("reloaded-logits-equal", _reloaded),
        ("no-gradient-without-label", _ignored_gradient),
        ("seed-decides", _seeds),
        ("manifest-verifies", _manifest),
        ("adapter-is-sound", _adapter),
    )
    for case, check in table:
        yield Check(target, "train", case, partial(_run, target, settings, check))


def _run(target: Target, settings: Settings, check: Callable[[TinyRun], Iterator[Finding]]) -> Result:
    oracle = target.oracle
    try:
        run = tiny_run(oracle, settings.work_folder, device=settings.device)
    except MistralLoraError as error:
        return Result((Finding("ML301", f"the tiny train failed: {error}", str(oracle.path), "a trained adapter"),))
    return Result(tuple(check(run)), facts=(("device", run.smoke["device"]),))


def _learned(run: TinyRun) -> Iterator[Finding]:
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
    farthest = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    device = run.smoke["device"]
    if farthest > _LOGIT_TOLERANCE[device]:
        yield Finding("ML305", f"logits are up to {farthest:.3g} apart", str(run.adapter), "those of the trained model")
    if not run.smoke["adapter_effect"] > 0:
        yield Finding("ML305", "the adapter changes no logit", str(run.adapter), "logits other than the base's")


def _ignored_gradient(run: TinyRun) -> Iterator[Finding]:
    largest = run.evidence["ignored_gradient"]
    if largest != 0.0:
        yield Finding("ML306", f"a gradient of {largest:.3g} where the next label is -100", expected="exactly 0")


def _seeds(run: TinyRun) -> Iterator[Finding]:
    seeds, device = run.evidence["seeds"], run.smoke["device"]
    same = seeds["first"] == seeds["again"] if device == "cpu" else seeds["farthest"] <= _SEED_TOLERANCE
    if not same:
        what = f"two runs with the same seed give adapters that are up to {seeds['farthest']:.3g} apart"
        yield Finding("ML307", what, str(run.folder), "the same bytes" if device == "cpu" else f"{_SEED_TOLERANCE}")
    if seeds["first"] == seeds["other"]:
        yield Finding("ML307", "another seed gives the same adapter", str(run.folder), "another adapter")


def _manifest(run: TinyRun) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.manifest import manifest_findings, verify_findings

    findings = list(manifest_findings(run.adapter))
    yield from findings
    if not findings:
        yield from verify_findings(run.adapter, base=run.base, dataset=[run.rows])


def _adapter(run: TinyRun) -> Iterator[Finding]:
    from pytest_mistral_lora.conformance.adapter import adapter_findings

    yield from adapter_findings(run.adapter, run.base)
