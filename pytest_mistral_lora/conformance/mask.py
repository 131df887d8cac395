"""Subject `mask`: the laws of an encoded row on rows that Hypothesis makes, shrunk to the smallest that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.rendering import encoded_text
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.laws import LAWS, Law, construction_violation, refusal_violation
from pytest_mistral_lora.conformance.shrinking import smallest
from pytest_mistral_lora.conformance.targets import Target

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each law, one for what is refused, and one for the chat template against the oracle."""
    for law in LAWS:
        yield Check(target, "mask", law.name, partial(_law, target, law, settings))
    yield Check(target, "mask", "every-token-has-an-encoder", partial(_construction, target, settings))
    yield Check(target, "mask", "refusals-are-mistral-commons", partial(_refusals, target, settings))
    yield Check(target, "mask", "template-agrees", partial(_template_agrees, target, settings))


def _law(target: Target, law: Law, settings: Settings) -> Result:
    oracle = target.oracle
    if int(oracle.version[1:]) < int(law.since[1:]):
        return Result(not_checked=f"tokenizer {oracle.version}: this law speaks of {law.since} and later")

    def finding(row: Row) -> Finding | None:
        encoded = oracle.encode(row)
        violation = law.violation(row, encoded, oracle)
        detail = encoded_text(encoded, oracle.piece) if violation else ""
        return Finding(law.rule, violation, detail=detail, row=row.to_jsonl()) if violation else None

    return Result(tuple(search(finding, _strategy(law, oracle), settings)))


def _construction(target: Target, settings: Settings) -> Result:
    def finding(row: Row) -> Finding | None:
        violation = construction_violation(row, target.oracle)
        return Finding("ML121", violation, row=row.to_jsonl()) if violation else None

    return Result(tuple(search(finding, _strategy(None, target.oracle), settings)))


def _refusals(target: Target, settings: Settings) -> Result:
    from pytest_mistral_lora.strategies.messy import messy_rows

    def finding(row: Row) -> Finding | None:
        violation = refusal_violation(row, target.oracle)
        return Finding("ML120", violation, row=row.to_jsonl()) if violation else None

    return Result(tuple(search(finding, messy_rows(), settings)))


def _template_agrees(target: Target, settings: Settings) -> Result:
    from pytest_mistral_lora.conformance.template import template_findings

    template = target.template

    def finding(row: Row) -> Finding | None:
        return next(template_findings(target.oracle, template, row), None)

    return Result(tuple(search(finding, _strategy(None, target.oracle), settings)))


def _strategy(law: Law | None, oracle: Oracle) -> Any:
    """Return the rows that a law speaks of, or those of the chat template; they think where the tokenizer can."""
    from pytest_mistral_lora.strategies import rows, tool_rows

    kind = "template" if law is None else law.rows
    thinking = "[THINK]" in oracle.control_tokens.values()
    plain = rows(weights=kind == "weights", alternating=kind != "template", thinking=thinking)
    if oracle.version == "v1" or kind in ("any", "weights"):
        return plain
    parallel = oracle.version not in ("v1", "v2")
    if kind == "parallel":
        return tool_rows(parallel=True, thinking=thinking)
    return plain | tool_rows(parallel=parallel, thinking=thinking)


class _BrokenError(Exception):
    """Carries a finding out of Hypothesis, which shrinks the row until this is the smallest one."""

    def __init__(self, finding: Finding, data: dict[str, Any]) -> None:
        super().__init__(finding.rule)
        self.finding = finding
        self.data = data


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
            raise _BrokenError(found, dict(data))

    run = hypothesis.seed(settings.seed)(holds) if settings.seed is not None else holds
    try:
        run()
    except _BrokenError as broken:
        return [smallest(finding, broken.finding, broken.data)]
    return []
