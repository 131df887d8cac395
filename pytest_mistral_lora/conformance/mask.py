"""Subject `mask`: the laws of an encoded row on rows that Hypothesis makes, shrunk to the smallest that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pytest_mistral_lora.chat.rendering import encoded_text
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.laws import LAWS, Law
from pytest_mistral_lora.conformance.targets import Target


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each law, and one for the chat template against the oracle."""
    for law in LAWS:
        yield Check(target, "mask", law.name, partial(_law, target, law, settings))
    yield Check(target, "mask", "template-agrees", partial(_template_agrees, target, settings))


def _law(target: Target, law: Law, settings: Settings) -> Result:
    oracle = target.oracle
    if int(oracle.version[1:]) < int(law.since[1:]):
        return Result(not_checked=f"tokenizer {oracle.version} has no control tokens to read this from")

    def finding(row: Row) -> Finding | None:
        encoded = oracle.encode(row)
        violation = law.violation(row, encoded, oracle)
        detail = encoded_text(encoded, oracle.piece) if violation else ""
        return Finding(law.rule, violation, detail=detail, row=row.to_jsonl()) if violation else None

    return Result(tuple(search(finding, _strategy(law, oracle.version), settings)))


def _template_agrees(target: Target, settings: Settings) -> Result:
    from pytest_mistral_lora.conformance.template import template_findings

    version = target.oracle.version
    template = target.template

    def finding(row: Row) -> Finding | None:
        return next(template_findings(target.oracle, template, row), None)

    return Result(tuple(search(finding, _strategy(None, version), settings)))


def _strategy(law: Law | None, version: str) -> Any:
    from pytest_mistral_lora.strategies import rows, tool_rows

    plain = rows(weights=law is not None and law.rows == "weights")
    if version == "v1" or (law is not None and law.rows != "tools"):
        return plain
    return plain | tool_rows()


class _BrokenError(Exception):
    """Carries a finding out of Hypothesis, which shrinks the row until this is the smallest one."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.rule)
        self.finding = finding


def search(finding: Callable[[Row], Finding | None], strategy: Any, settings: Settings) -> list[Finding]:
    """Look for a row with a finding; return that of the smallest one, or nothing.

    The search is the same in every run unless a seed is given, has no deadline and keeps no database, so that a
    user's CI cannot fail by chance.
    """
    import hypothesis

    @hypothesis.settings(
        max_examples=settings.examples,
        deadline=None,
        database=None,
        derandomize=settings.seed is None,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def holds(data: Mapping[str, Any]) -> None:
        found = finding(parse_row(json.loads(json.dumps(data))))
        if found is not None:
            raise _BrokenError(found)

    run = hypothesis.seed(settings.seed)(holds) if settings.seed is not None else holds
    try:
        run()
    except _BrokenError as broken:
        return [broken.finding]
    return []
