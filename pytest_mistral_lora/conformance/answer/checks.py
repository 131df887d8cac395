"""The checks of known answers: what a client gets of ids that the model was made to say, whole and as a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.answer.comparison import (
    AnswerFault,
    answer_faults,
    is_same_message,
    message_text,
    replaced_fault,
)
from pytest_mistral_lora.conformance.answer.deviations import AnswerDeviation, named_deviation
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result, first_of_each_cause
from pytest_mistral_lora.conformance.server.failures import cause_of
from pytest_mistral_lora.conformance.server.shown import judged_publicly
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.errors import InputError, and_more, counted

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.forced_answers import ForcedAnswer
    from pytest_mistral_lora.serving.replay import Outcome

_SHOWN = 8
_NAMED = 6
_AND = " and "
_WAYS = {
    "planted": "said by a probe, proven by ids",
    "declared": "said by a probe, as you state",
    "forced": "forced by the request",
}
_NOT_THERE = "the server does not answer: see the check `there` of the subject `server`"


def checks(target: ServerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of the known answers of a server, if they are asked for."""
    if target.asks_answers:
        for case, judge in AnswerChecks(target).cases().items():
            yield Check(target, "answer", case, partial(judged_publicly, judge))


class AnswerChecks:
    """The checks of one server's answers: each has one rule, and they share the requests."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target

    def cases(self) -> dict[str, Callable[[], Result]]:
        """Return the checks by name."""
        cases = {rule.case: partial(self._if_forced, partial(self.broken, rule.id)) for rule in RULES.of("answer")}
        return cases | {"answered": self.answered, "same": partial(self._if_forced, self.same)}

    @cached_property
    def _forced(self) -> Sequence[ForcedAnswer] | None:
        """The answers; None if the server is not there."""
        try:
            return self._target.forced_answers
        except InputError:
            return None

    @cached_property
    def _said(self) -> list[ForcedAnswer]:
        """The answers that the model was made to say."""
        return [forced for forced in self._forced or () if forced.way is not None]

    @cached_property
    def _served(self) -> list[tuple[ForcedAnswer, ServedAnswer, ServedAnswer]]:
        """The answers that came in both ways."""
        found = []
        for forced in self._said:
            whole, stream = _answered(forced.whole), _answered(forced.stream)
            if whole is not None and stream is not None:
                found.append((forced, whole, stream))
        return found

    @cached_property
    def faults(self) -> list[tuple[ForcedAnswer, str, AnswerFault]]:
        """Every fault with its answer and the way in which it came: whole, streamed, or both."""
        found = []
        for forced in self._said:
            by_way = self._faults_by_way(forced)
            for fault in dict.fromkeys([*by_way["whole"], *by_way["streamed"]]):
                in_ways = [way for way, faults in by_way.items() if fault in faults]
                found.append((forced, _AND.join(in_ways), fault))
        return found

    def _faults_by_way(self, forced: ForcedAnswer) -> dict[str, list[AnswerFault]]:
        oracle = self._target.oracle
        ways = {"whole": _answered(forced.whole), "streamed": _answered(forced.stream)}
        by_way = {way: list(answer_faults(forced, served, oracle)) if served else [] for way, served in ways.items()}
        if any(fault.rule == "ML922" for faults in by_way.values() for fault in faults):
            # a stream may hide its ids: the grammar that replaces the whole answer replaces the streamed one
            for way, served in ways.items():
                if served is not None and by_way[way]:
                    by_way[way] = [replaced_fault(forced, served, oracle)]
        return by_way

    def _deviation(self, forced: ForcedAnswer, fault: AnswerFault) -> AnswerDeviation | None:
        """Return the named deviation of a fault."""
        oracle = self._target.oracle
        has_calls = bool(forced.known.message(oracle).calls)
        return named_deviation(fault.part, fault.said, fault.served, has_calls=has_calls, kind=oracle.kind)

    def _known_deviation(self, forced: ForcedAnswer, fault: AnswerFault) -> AnswerDeviation | None:
        """Return the named deviation of a fault, if it is known of the server and its version."""
        deviation = self._deviation(forced, fault)
        kind, version = self._target.server.name, self._target.served_version
        return deviation if deviation is not None and deviation.known_of(kind, version) else None

    def _if_forced(self, judge: Callable[[], Result]) -> Result:
        if self._forced is None:
            return Result(not_checked=_NOT_THERE)
        if not self._said:
            return Result(not_checked="no answer could be forced: see the check `answered`")
        if not any(_answered(forced.whole) or _answered(forced.stream) for forced in self._said):
            return Result(not_checked="no answer came: see the check `answered`")
        return judge()

    def answered(self) -> Result:
        """ML921: the server answers the request of each known answer, whole and as a stream."""
        if self._forced is None:
            return Result(not_checked=_NOT_THERE)
        findings = []
        for forced in self._said:
            for way, outcome in (("whole", forced.whole), ("streamed", forced.stream)):
                reason = no_answer(outcome)
                if reason:
                    expected = _expected(forced, self._target)
                    finding = self._finding("ML921", forced, f"{way}: {reason}", expected)
                    findings.append(replace(finding, shape=cause_of(reason)))
        return Result(tuple(self._first(findings)), self._not_forced(), (("answers of", self._summary()),))

    def broken(self, rule: str) -> Result:
        """ML922 to ML930: the findings of one rule, but for named deviations."""
        findings = []
        for forced, way, fault in self.faults:
            if fault.rule != rule or self._known_deviation(forced, fault):
                continue
            deviation = self._deviation(forced, fault)
            name = f", a named deviation ({deviation.id}) that is not known of this version" if deviation else ""
            finding = self._finding(rule, forced, f"{way}: {fault.found}{name}", fault.expected)
            findings.append(replace(finding, shape=f"{way}: {fault.part}{name}"))
        return Result(tuple(self._first(findings)))

    def same(self) -> Result:
        """ML931: an answer is the same message whole and as a stream."""
        if not self._served:
            return Result(not_checked="no answer came both whole and as a stream")
        findings = []
        for forced, whole, stream in self._served:
            if not is_same_message(whole, stream):
                expected = f"as whole: {message_text(whole)}"
                finding = self._finding("ML931", forced, f"streamed: {message_text(stream)}", expected)
                findings.append(replace(finding, shape="streamed"))
        return Result(tuple(self._first(findings)))

    def _first(self, findings: list[Finding]) -> list[Finding]:
        return first_of_each_cause(findings, _SHOWN, self._target.url)

    def _finding(self, rule: str, forced: ForcedAnswer, found: str, expected: str) -> Finding:
        row = forced.known.row.to_jsonl()
        return Finding(rule, f"{forced.known.name}: {found}", self._target.url, expected, row=row)

    def verdicts(self) -> dict[str, dict[str, list[str]]]:
        """Return the verdict on each answer that the model was made to say, by its name and the way it came.

        A verdict lists the rules that are broken, and `as NAME` for a named deviation; it is empty for a message that
        arrives as said. A way that was not asked is missing.
        """
        found: dict[str, dict[str, list[str]]] = {}
        for forced in self._said:
            outcomes = {"whole": forced.whole, "streamed": forced.stream}
            found[forced.known.name] = {
                way: ["ML921"] if no_answer(outcome) else [] for way, outcome in outcomes.items() if outcome is not None
            }
        for forced, ways, fault in self.faults:
            deviation = self._known_deviation(forced, fault)
            for way in ways.split(_AND):
                label = fault.rule if deviation is None else f"as {deviation.id}"
                found[forced.known.name][way].append(label)
        return found

    def _summary(self) -> str:
        """Return how many answers arrive as said, how they were forced, and the named deviations among them."""
        verdicts = self.verdicts().values()
        counts = []
        for way, words in (("whole", "arrive as said whole"), ("streamed", "as a stream")):
            asked = [verdict[way] for verdict in verdicts if way in verdict]
            right = sum(not any(label.startswith("ML") for label in labels) for labels in asked)
            if asked:
                counts.append(f"{right} of {len(asked)} {words}")
        text = ", ".join(counts)
        for way, number in Counter(forced.way for forced in self._said if forced.way).items():
            text += f"; {number} {_WAYS[way]}"
        names = Counter(
            label.removeprefix("as ")
            for verdict in verdicts
            for label in dict.fromkeys(label for labels in verdict.values() for label in labels)
            if label.startswith("as ")
        )
        if names:
            deviations = ", ".join(f"{name} ({number})" for name, number in names.items())
            server = f"{self._target.server.title} {self._target.served_version}"
            text += f"; named deviations, known of {server}: {deviations}"
        return text

    def _not_forced(self) -> str:
        """Return which answers the model was not made to say, by reason; empty if it said all."""
        reasons: dict[str, list[str]] = {}
        for forced in self._forced or ():
            if forced.way is None:
                reasons.setdefault(forced.reason, []).append(forced.known.name)
        return "; ".join(
            f"{counted(len(names), 'answer')}, {reason}: {', '.join(names[:_NAMED])}{and_more(_NAMED, len(names))}"
            for reason, names in reasons.items()
        )


def _answered(outcome: Outcome) -> ServedAnswer | None:
    """Return the answer of a request; None if it was not sent, has no answer, was refused or failed."""
    if outcome is None or isinstance(outcome, InputError) or outcome.refused or outcome.failed:
        return None
    return outcome


def no_answer(outcome: Outcome) -> str:
    """Return why a request has no answer; empty if it has one, or was not sent."""
    if isinstance(outcome, InputError):
        return f"{outcome.found}{f'; expected {outcome.expected}' if outcome.expected else ''} ({outcome.place})"
    if outcome is None:
        return ""
    if outcome.failed:
        return f"the request fails: {outcome.failed}"
    return f"the server refuses it: {outcome.refused}" if outcome.refused else ""


def _expected(forced: ForcedAnswer, target: ServerTarget) -> str:
    message = forced.known.message(target.oracle)
    return "an answer: a call" if message.calls else f"an answer: {message.text[: _SHOWN * 10]!r}"
