"""The laws on a user's own tokenizer file of a version that is not shipped; derived files stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from derived_tekken import DERIVED, write_derived
from sampling import sampled

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.mask.checks import LawRows, checks
from pytest_mistral_lora.conformance.targets import Target

NEWER = {"thoughts-have-their-markers"}
KNOWN = {
    "derived-v11": set[str](),
    "derived-v13": set[str](),
    "derived-v13-thinking": NEWER,
    "derived-v15-schema": NEWER,
}


@cache
def target(name: str) -> Target:
    return Target("own", write_derived(name, Path(mkdtemp()), words=1000))


@cache
def judged(name: str) -> Mapping[str, Result]:
    settings = Settings(2, None, "cpu", True, (), False, Path())
    found = checks(target(name), settings)
    # the chat template has tests of its own, and takes the longest
    return {check.case: check.run() for check in found if check.case != "template-agrees"}


@pytest.mark.parametrize("name", sampled(KNOWN, ("derived-v11", "derived-v15-schema")))
def test_the_laws_hold(name: str) -> None:
    assert [finding.text() for result in judged(name).values() for finding in result.findings] == []


@pytest.mark.parametrize("name", sampled(KNOWN, ("derived-v11", "derived-v15-schema")))
def test_a_law_that_is_not_about_a_version_is_not_checked(name: str) -> None:
    unchecked = {case: result.not_checked for case, result in judged(name).items() if result.not_checked}
    assert unchecked.keys() == NEWER - KNOWN[name]
    assert all(reason.startswith(f"tokenizer {DERIVED[name][0]}: this law ") for reason in unchecked.values())


def test_the_rows_are_as_rich_as_the_tokenizer() -> None:
    newest, older = (LawRows.of("parallel", target(name).oracle) for name in ("derived-v15-schema", "derived-v11"))
    assert (newest.thinking, newest.efforts, newest.schemas, newest.any_ids) == (
        *(True, ("none", "low", "high")),
        *(True, True),
    )
    assert (older.thinking, older.efforts, older.schemas, older.any_ids) == (False, (), False, False)
