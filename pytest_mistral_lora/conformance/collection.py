"""Which checks a target has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_mistral_lora.conformance import mask, own_goldens, template, tokenizer, train
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.targets import Target


def collect(targets: Sequence[Target], settings: Settings) -> Iterator[Check]:
    """Yield every check of the targets; no tokenizer or model is loaded before a check runs.

    The checks of the tiny train come last, so that it can run beside the others.
    """
    for target in targets:
        yield from tokenizer.checks(target, settings)
        yield from template.checks(target, settings)
        yield from own_goldens.checks(target, settings)
        yield from mask.checks(target, settings)
    for target in targets:
        if target.trains and not settings.skip_training:
            yield from train.checks(target, settings)
