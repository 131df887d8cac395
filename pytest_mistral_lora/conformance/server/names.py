"""Several adapters on one server: each name answers as its own adapter, and not as another one or the base."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.server.answer import AnswerJudge, moved_logprobs
from pytest_mistral_lora.conformance.server.failures import answered
from pytest_mistral_lora.conformance.server.moved import Moved
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.judgement import TOLERANCES

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.named_adapters import NamedAnswer

_BASE = ""
"""The name of the base among the names of adapters."""


class NameChecks:
    """The check of the adapters that a user names."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target

    def names(self) -> Result:
        """ML932: each name answers the transcripts of its adapter."""
        target = self._target
        lacking = [name for name, transcripts in target.named_transcripts.items() if not transcripts]
        if lacking:
            step = "mistral-lora smoke DIR --record FOLDER --rows FILE writes them"
            return Result(not_checked=f"no golden transcripts of {', '.join(lacking)}: {step}")
        if not target.server.gives_answers:
            return Result(not_checked=f"{target.server.title} gives prompts, and no answers")
        if all(answer.outcome is None for answer in self._answers):
            return Result(not_checked=f"{target.server.title} is not asked by ids")
        if self._precision not in TOLERANCES:
            return Result(not_checked=f"no tolerance is known for weights in {self._precision}")
        findings, unclear, matrix = [], [], []
        for name in target.named_transcripts:
            found = self._fault(name)
            if found is not None:
                findings.append(found)
                continue
            alike = [self._title(other) for other in self._others(name) if self._answers_as(other, name)]
            if alike:
                unclear.append(f"{' and '.join(alike)} answers the transcripts of {name} as {name} does")
            matrix.append(name)
        text = f"{len(matrix)} of {len(target.named_transcripts)} names answer as their own adapter"
        return Result(tuple(findings), "; ".join(unclear), (("names of", text),))

    def _fault(self, name: str) -> Finding | None:
        """Return the finding of a name that does not answer as its own adapter."""
        error = next(
            (answer.outcome for answer in self._of(name, name) if isinstance(answer.outcome, InputError)), None
        )
        if error is not None:
            return Finding("ML932", f"{name}: {error.found}", Place.of(self._target.url), error.expected)
        if self._answers_as(name, name):
            return self._moved_fault(name)
        others = [other for other in self._others(name) if self._is_like(name, other)]
        as_others = " or ".join(self._title(other) for other in others)
        found = f"{name} answers as {as_others}" if others else f"{name} answers as no adapter that you named"
        return Finding("ML932", found, Place.of(self._target.url), f"the transcripts of {self._target.places_of(name)}")

    def _moved_fault(self, name: str) -> Finding | None:
        """Return the finding of a name whose right answers have other log-probabilities than the dtype explains."""
        if not (self._target.precision or self._target.answers.facts.precision):
            return None  # the precision is not known, and the check of the answers has the number
        pairs = [(named.transcript, answered(named.outcome)) for named in self._of(name, name)]
        by_case = {golden.case: moved_logprobs(golden, answer) for golden, answer in pairs if answer is not None}
        both = [self._precision, *(golden.precision for golden, _ in pairs)]
        precision = max(both, key=lambda known: TOLERANCES[known].margin)
        moved = Moved(by_case, precision, TOLERANCES[precision])
        if moved.is_explained:
            return None
        found = f"{name} answers as recorded, and its {moved.numbers.partition(';')[0]}"
        return Finding("ML932", found, Place.of(self._target.url), moved.explained)

    def _others(self, name: str) -> Iterator[str]:
        yield from (other for other in self._target.named_transcripts if other != name)
        yield _BASE

    @staticmethod
    def _title(name: str) -> str:
        return name or "the base"

    def _is_like(self, name: str, other: str) -> bool:
        """Return whether a name answers as another adapter, by that one's transcripts, or as the base."""
        if other != _BASE:
            return self._answers_as(name, other)
        pairs = zip(self._of(name, name), self._of(_BASE, name), strict=True)
        ids = [(_ids(answer), _ids(base)) for answer, base in pairs]
        return bool(ids) and all(served is not None and served == of_base for served, of_base in ids)

    def _answers_as(self, name: str, owner: str) -> bool:
        """Return whether all transcripts of an adapter are answered as recorded under a name."""
        answers = self._of(name, owner)
        return bool(answers) and all(self._passes(answer) for answer in answers)

    def _passes(self, named: NamedAnswer) -> bool:
        answer = answered(named.outcome)
        if answer is None:
            return False
        drafts = self._target.answers.facts.drafts or answer.is_drafted
        judge = AnswerJudge(self._target.oracle, self._precision, knows_logprobs=not drafts)
        try:
            return judge.judge(named.transcript, answer, by_messages=False).passed
        except InputError:  # an id of another vocabulary
            return False

    def _of(self, name: str, owner: str) -> Sequence[NamedAnswer]:
        return [answer for answer in self._answers if (answer.name, answer.owner) == (name, owner)]

    @cached_property
    def _answers(self) -> list[NamedAnswer]:
        return asyncio.run(self._ask())

    async def _ask(self) -> list[NamedAnswer]:
        from pytest_mistral_lora.serving.named_adapters import ask_names
        from pytest_mistral_lora.serving.replay import SECONDS

        async with self._target.client(SECONDS) as client:
            return await ask_names(self._target.server, client, self._target.named_transcripts)

    @cached_property
    def _precision(self) -> str:
        """The precision of the served weights: as named or reported, or else the widest of the recorded ones."""
        recorded = [
            transcript.precision
            for transcripts in self._target.named_transcripts.values()
            for transcript in transcripts
        ]
        widest = max(recorded, key=lambda precision: TOLERANCES[precision].margin)
        return self._target.precision or self._target.answers.facts.precision or widest


def _ids(named: NamedAnswer) -> tuple[int, ...] | None:
    answer = answered(named.outcome)
    return None if answer is None else answer.ids
