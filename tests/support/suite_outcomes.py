"""The checks of paths, run in this process without a verb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.collection import targets_of
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.conformance.session import opened_session


def suite_outcomes(paths: Sequence[Path], base: Path | None = None) -> Iterator[CheckOutcome]:
    """Yield the outcome of each check."""
    targets = targets_of([recognised(path, base) for path in paths], base)
    with opened_session(targets, CheckOptions(examples=1)) as session:
        yield from session.run()
