"""Subject `train`: placeholder until wired below."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.targets import Target


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    yield from ()
