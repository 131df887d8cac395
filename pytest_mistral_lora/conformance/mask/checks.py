"""Subject `mask`: the laws of an encoded row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import encoded_text
from pytest_mistral_lora.chat.fields import ROW_KEYS
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.mask import laws, row_laws
from pytest_mistral_lora.conformance.mask.row_laws import RowLaw
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import MistralLoraError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


LABELS = RowLaw(
    "ML107", row_laws.scan_violation, "tools", fact=lambda version: version.control_tokens, name="ML107.labels"
)
"""The labels are those that mistral-common's control tokens give."""

ENCODING = RowLaw("ML107", laws.reference_violation, "tools", name="ML107.encoding")
"""The ids are those of mistral-common."""

LAWS = (
    RowLaw("ML101", row_laws.partition_violation, "weights", is_of_labels=True),
    RowLaw("ML102", row_laws.owner_violation, "tools", is_of_labels=True),
    RowLaw("ML103", row_laws.whole_turn_violation, "weights", is_of_labels=True),
    RowLaw("ML104", row_laws.eos_violation, "weights", is_of_labels=True),
    RowLaw("ML105", row_laws.bos_violation, is_of_labels=True),
    RowLaw("ML106", row_laws.injection_violation),
    LABELS,
    RowLaw("ML108", laws.weight_violation, "weights"),
    RowLaw("ML109", row_laws.assistant_text_violation),
    RowLaw(
        "ML110",
        row_laws.tool_call_violation,
        "tools",
        fact=lambda version: version.calls_as,
    ),
    RowLaw("ML112", laws.prompt_violation, "tools"),
    RowLaw("ML118", row_laws.system_violation, "tools"),
    RowLaw(
        "ML123",
        laws.results_violation,
        "parallel",
        fact=lambda version: version.results_as in ("id-and-text", "text"),
    ),
    RowLaw(
        "ML125",
        row_laws.chunk_markers_violation,
        "tools",
        fact=lambda version: version.thinking,
        needs=("thinking",),
    ),
)
"""Every law that looks at a row alone, in the order of its rule."""

_SOURCES = 32
"""Kinds of generated rows that are kept: a run of the suite has nine for one number of examples."""

_TRIES = 300
"""Most rows to try after Hypothesis has shrunk: it stops early, since it shrinks the choices behind a row."""


def shrink_finding(
    finding: Callable[[Row], Finding | None], found: Finding, data: dict[str, Any], *, tries: int = _TRIES
) -> Finding:
    """Leave out messages, keys and parts of texts while the row breaks the same rule; return the last finding.

    Args:
        finding: Judges a row.
        found: Its finding for the row.
        data: The row, as plain data.
        tries: The number of rows to try.
    """
    candidates = _smaller(data)
    while tries and (candidate := next(candidates, None)) is not None:
        tries -= 1
        try:
            now = finding(parse_row(candidate))
        except MistralLoraError:
            # a refused row is not a smaller example of the same fault
            continue
        if now is not None and now.rule == found.rule:
            found, candidates = now, _smaller(candidate)
    return found


def _smaller(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # the largest parts first: later rounds need not try parts that are already left out
    for key in ROW_KEYS[1:]:
        if key in data:
            yield {name: value for name, value in data.items() if name != key}
    messages = data["messages"]
    for index, message in enumerate(messages):
        yield data | {"messages": [*messages[:index], *messages[index + 1 :]]}
        content = message.get("content")
        smaller: list[dict[str, Any]] = []
        if isinstance(content, list):
            smaller += (message | {"content": [*content[:n], *content[n + 1 :]]} for n in range(len(content)))
            smaller += (message | {"content": text} for chunk in content if (text := text_of([chunk])))
        elif content:
            # halves first, for long texts; never an empty text, which an assistant's message may not have
            half = len(content) // 2
            shorter = ("0",) if len(content) == 1 else ("0", content[:half], content[half:], content[1:], content[:-1])
            smaller += (message | {"content": text} for text in shorter if text != content)
        if "weight" in message:
            smaller.append({name: value for name, value in message.items() if name != "weight"})
        yield from (
            data | {"messages": [*messages[:index], shortened, *messages[index + 1 :]]} for shortened in smaller
        )


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each law, and one that compares the chat template with the oracle."""
    for law in LAWS:
        judge = partial(_agrees, target, settings) if law is LABELS else partial(_law, target, law, settings)
        yield Check(target, "mask", law.case, judge)
    yield Check(target, "mask", "template-agrees", partial(_template_agrees, target, settings))


def _law(target: Target, law: RowLaw, settings: Settings) -> Result:
    oracle = target.oracle
    if reason := law.unfit(oracle):
        return Result(not_checked=reason)

    def finding(objective: Objective, row: Row) -> Finding | None:
        row = replace(row, objective=objective)
        encoded = oracle.encode(row)
        violation = law.violation(row, encoded, oracle)
        if not violation:
            return None
        violation += "" if objective.is_default else f" (objective: {objective})"
        return Finding(
            law.rule, violation, detail=encoded_text(encoded, oracle.piece), row=row.to_jsonl(), name=law.name
        )

    found: list[Finding] = []
    for objective in target.objectives if law.is_of_labels else (ANSWERS,):
        # rows with weights have no calls
        for kind in {law.rows: None, **({"tools": None} if "no-calls" in objective.without else {})}:
            found += search(partial(finding, objective), LawRows.of(kind, oracle), settings)
    return Result(tuple(found))


def _agrees(target: Target, settings: Settings) -> Result:
    """Compare with the installed mistral-common: its encoders, its refusals, its ids, and labels by its markers."""

    def broken(name: str, kind: str, violation: Callable[[Row, Oracle], str]) -> list[Finding]:
        def finding(row: Row) -> Finding | None:
            found = violation(row, target.oracle)
            return Finding("ML107", found, row=row.to_jsonl(), name=f"ML107.{name}") if found else None

        return search(finding, LawRows.of(kind, target.oracle), settings)

    if unknown := broken("encoder", "template", laws.construction_violation):
        return Result(tuple(unknown))  # nothing is encoded, so nothing else can be compared
    refusals = broken("refusal", "messy", laws.refusal_violation)
    encoding, labels = (_law(target, law, settings) for law in (ENCODING, LABELS))
    return Result((*refusals, *encoding.findings, *labels.findings), not_checked=labels.not_checked)


def _template_agrees(target: Target, settings: Settings) -> Result:
    from pytest_mistral_lora.conformance.template import template_file, template_findings

    # refuse a target without a template before making any row
    template, oracle = target.template, target.oracle
    source, find = LawRows.of("template", oracle), partial(template_findings, oracle, template)
    return Result(tuple(search_all(partial(find, place=template_file(target)), source, settings)))


@dataclass(frozen=True, slots=True)
class LawRows:
    """A kind of generated rows; equal sources give equal rows, made once for all laws and targets.

    Attributes:
        kind: A law's `rows`; `template` for the rows of the chat template, `messy` for any conversation.
        tools: Whether the tokenizer has tools.
        parallel: Whether a turn can have several calls.
        thinking: Whether it has thinking chunks.
        efforts: Its values of `reasoning_effort`.
        schemas: Whether it shows the schema of a `response_format`.
        any_ids: Whether ids of calls may have any form.
    """

    kind: str
    tools: bool = True
    parallel: bool = True
    thinking: bool = False
    efforts: tuple[str, ...] = ()
    schemas: bool = False
    any_ids: bool = False

    @classmethod
    def of(cls, kind: str, oracle: Oracle) -> LawRows:
        """Return the source of a kind of rows for a tokenizer."""
        # equal sources share their rows, so the source omits facts that do not change them
        if kind == "messy":
            return cls(kind)
        has = oracle.features
        newer = (has.thinking, has.efforts, has.schemas)
        facts = oracle.facts
        if kind == "tools" and facts.tools_in is None:
            kind = "any"
        if kind in ("any", "weights"):
            return cls(kind, True, True, *newer)
        return cls(kind, facts.tools_in is not None, facts.parallel_calls, *newer, any_ids=facts.call_ids == "any")

    def strategy(self) -> Any:
        """Return the rows as a Hypothesis strategy."""
        from pytest_mistral_lora.strategies import rows, tool_rows
        from pytest_mistral_lora.strategies.texts import messy_rows

        if self.kind == "messy":
            return messy_rows()
        newer: dict[str, Any] = {"thinking": self.thinking, "efforts": self.efforts, "formats": self.schemas}
        if self.kind == "parallel" and self.tools:
            return tool_rows(parallel=True, result_chunks=True, any_ids=self.any_ids, **newer)
        weights, alternating = self.kind == "weights", self.kind != "template"
        plain = rows(weights=weights, alternating=alternating, **newer)
        if not self.tools or self.kind in ("any", "weights"):
            return plain
        # no chunks in results here: templates write them in Python's notation, which is a named deviation
        return plain | tool_rows(parallel=self.parallel, any_ids=self.any_ids, **newer)


class _BrokenLawError(Exception):
    """Carries a finding and its row out of Hypothesis, which shrinks the row until this is the smallest row."""


def search(finding: Callable[[Row], Finding | None], source: LawRows, settings: Settings) -> list[Finding]:
    """Look for a row with a finding; return the finding of the smallest such row, or None.

    Without a seed the search is the same in every run of the same modules (Hypothesis draws their constants too). It
    has no deadline and keeps no database, so that a user's CI cannot fail by chance.
    """
    first = next(filter(None, map(finding, _generated(source, settings.examples, settings.seed))), None)
    if first is None:
        return []
    found, smallest = first, json.loads(first.row)

    def holds(data: Mapping[str, Any]) -> None:
        now = finding(_as_read(data))
        if now is not None:
            raise _BrokenLawError(now, dict(data))

    # Hypothesis only shrinks failures of its own search, so it searches again; few checks come here
    from hypothesis.errors import Flaky

    try:
        _explore(holds, source, settings.examples, settings.seed)
    except _BrokenLawError as broken:
        found, smallest = broken.args
    except Flaky:
        pass  # a random tokenizer, as with dropout, may not break the law again
    return [shrink_finding(finding, found, smallest)]


def search_all(judge: Callable[[Row], Iterable[Finding]], source: LawRows, settings: Settings) -> list[Finding]:
    """Look for rows with findings; return a finding for each cause, of a small row.

    One cause must not hide another, so all rows are judged. The smallest row of each cause shrinks by leaving out
    parts, and Hypothesis does not search again: a template may take long to refuse a row.
    """
    smallest: dict[str, tuple[int, Finding]] = {}
    for row in _generated(source, settings.examples, settings.seed):
        for finding in judge(row):
            size = len(finding.row)
            if finding.cause not in smallest or size < smallest[finding.cause][0]:
                smallest[finding.cause] = (size, finding)
    tries = _TRIES // max(1, len(smallest))

    def shrunk(found: Finding) -> Finding:
        def same_cause(row: Row) -> Finding | None:
            return next((finding for finding in judge(row) if finding.cause == found.cause), None)

        return shrink_finding(same_cause, found, json.loads(found.row), tries=tries)

    return [shrunk(found) for _, found in smallest.values()]


@lru_cache(maxsize=_SOURCES)
def _generated(source: LawRows, examples: int, seed: int | None) -> tuple[Row, ...]:
    # making rows takes far longer than judging them
    made: list[Row] = []
    _explore(lambda data: made.append(_as_read(data)), source, examples, seed)
    return tuple(made)


def _as_read(data: Mapping[str, Any]) -> Row:
    # a file holds JSON's types only: a tuple or an int subclass of a strategy becomes a list or an int.
    return parse_row(json.loads(json.dumps(data)))


def _explore(use: Callable[[Mapping[str, Any]], None], source: LawRows, examples: int, seed: int | None) -> None:
    import hypothesis

    # no deadline, database or health check: a slow machine or an earlier run must not change the result
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(source.strategy())
    def run(data: Mapping[str, Any]) -> None:
        use(data)

    (run if seed is None else hypothesis.seed(seed)(run))()
