"""Which checks a target has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_mistral_lora.conformance.adapter import checks as adapter
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.dataset import checks as dataset
from pytest_mistral_lora.conformance.encoded import checks as encoded
from pytest_mistral_lora.conformance.manifest import checks as manifest
from pytest_mistral_lora.conformance.mask import checks as mask
from pytest_mistral_lora.conformance.runner import checks as runner
from pytest_mistral_lora.conformance.targets import AdapterTarget, EncodedTarget, RecipeTarget, RunnerTarget, Target
from pytest_mistral_lora.conformance.template import checks as template
from pytest_mistral_lora.conformance.template import own_goldens
from pytest_mistral_lora.conformance.tokenizer import checks as tokenizer
from pytest_mistral_lora.conformance.train import checks as train
from pytest_mistral_lora.conformance.transcript import checks as transcript


def collect(targets: Sequence[Target], settings: Settings) -> Iterator[Check]:
    """Yield every check of the targets; no tokenizer or model is loaded before a check runs.

    The checks of the tiny train come last, so that it can run beside the others.
    """
    for target in targets:
        yield from _checks(target, settings)
    for target in targets:
        if target.trains and not settings.skip_training:
            yield from train.checks(target, settings)


def _checks(target: Target, settings: Settings) -> Iterator[Check]:
    if isinstance(target, EncodedTarget):
        yield from encoded.checks(target, settings)
    elif isinstance(target, RunnerTarget):
        yield from runner.checks(target, settings)
    elif isinstance(target, AdapterTarget):
        yield from adapter.checks(target, settings)
        yield from manifest.checks(target, settings)
        yield from transcript.checks(target, settings)
    else:
        for subject in (tokenizer, template, own_goldens, mask):
            yield from subject.checks(target, settings)
    if isinstance(target, RecipeTarget):
        yield from dataset.checks(target, settings)
        if target.made is not None:
            yield from _checks(target.made, settings)
