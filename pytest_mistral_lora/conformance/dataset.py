"""Subject `dataset`: every row of a recipe's files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import RowError


def checks(target: RecipeTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a recipe's rows."""
    yield Check(target, "dataset", "rows-are-valid", partial(_valid, target))


def _valid(target: RecipeTarget) -> Result:
    return Result(tuple(_unreadable(target)))


def _unreadable(target: RecipeTarget) -> Iterator[Finding]:
    from pytest_mistral_lora.chat.rows import scan_rows

    data = target.recipe.data
    for path in (*data.train, *data.eval):
        for item in scan_rows(path):
            try:
                if isinstance(item, RowError):
                    raise item
                target.oracle.encode(item)
            except RowError as error:
                yield Finding("ML601", error.found, error.place, error.expected)
