"""Subject `server`: the prompts that a running server feeds its model, against mistral-common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings
from pytest_mistral_lora.conformance.named_targets import name_of
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerTarget
from pytest_mistral_lora.errors import InputError, NoTemplateError, RowError
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.templates import ChatTemplate

_SHOWN = 8
_NO_TRANSCRIPTS = "no golden transcripts: name an adapter (--adapter, --mistral-adapter), or transcripts (--golden)"
_INJECTED = "control-literal"
"""The named deviation of text that becomes a control token."""

_CLASSES = {
    "ML523": (_INJECTED,),
    "ML530": ("tool-result-as-string", "tools-as-written", "tool-arguments-as-written"),
}
"""The named deviations of a class of the audit, for rows on which a server shows only some of them."""


def checks(target: ServerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a server, and of the transcripts that are replayed through it."""
    target = _with_own_transcripts(target, settings)
    checks = ServerChecks(target)
    cases = checks.cases()
    if target.adapter is None and not target.golden:
        cases |= {"transcripts": partial(Result, not_checked=_NO_TRANSCRIPTS)}
    else:
        from pytest_mistral_lora.conformance.server.replay import ReplayChecks

        replayed = ReplayChecks(target).cases()
        cases |= {case: partial(checks.if_replayed, case, judge) for case, judge in replayed.items()}
    for case, judge in cases.items():
        yield Check(target, "server", case, judge)


def _with_own_transcripts(target: ServerTarget, settings: Settings) -> ServerTarget:
    """Return the target with the transcripts that the user recorded of its adapter beside those in its folder."""
    if target.adapter is None or target.golden:
        return target
    name = name_of(target.adapter)
    own = [folder / TRANSCRIPTS / name for folder in settings.golden_folders]
    return replace(target, golden=(target.adapter / TRANSCRIPTS, *(one for one in own if one.is_dir())))


class ServerChecks:
    """The checks of a server: each method is one, and they share its answers."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target
        self._place = target.url

    def cases(self) -> dict[str, Callable[[], Result]]:
        """Return the checks by name."""
        asked = {"preview": self.preview, "counts": self.counts, "refusals": self.refusals}
        by_ids = {"prompts": self.prompts, "injection": self.injection}
        return {
            "there": self.there,
            **{name: partial(self._if_shown, judge) for name, judge in by_ids.items()},
            **{name: partial(self._if_answered, judge) for name, judge in asked.items()},
        }

    @cached_property
    def _failure(self) -> InputError | None:
        try:
            _ = self._target.answers
        except InputError as error:
            return error
        return None

    def _if_answered(self, judge: Callable[[], Result]) -> Result:
        if self._failure is not None:
            return Result(not_checked="the server does not answer: see the check `there`")
        return judge()

    def _if_shown(self, judge: Callable[[], Result]) -> Result:
        if self._failure is None and not self._shown:
            return Result(not_checked=f"{self._target.server.title} does not show the ids of a prompt")
        return self._if_answered(judge)

    def if_replayed(self, case: str, judge: Callable[[], Result]) -> Result:
        """Return the result of a check of replayed transcripts, if there are some and the server answers."""
        if case != "transcripts" and not self._target.transcripts[0]:
            return Result(not_checked="no golden transcript can be replayed: see the check `transcripts`")
        if not self._target.server.gives_answers:
            return Result(not_checked=f"{self._target.server.title} gives prompts, and no answers")
        return judge() if case == "transcripts" else self._if_answered(judge)

    @cached_property
    def _shown(self) -> list[_Served]:
        """The rows whose ids the server shows."""
        return [one for one in self._taken() if one.served_ids is not None]

    def there(self) -> Result:
        """ML901: the server is there, and answers each request."""
        if self._failure is not None:
            error = self._failure
            return Result((Finding("ML901", error.found, error.place, error.expected, fix=error.next_step),))
        answers = self._target.answers
        findings = [
            Finding(
                "ML901",
                f"{one.name}: {one.served.found}",
                one.served.place,
                one.served.expected,
                row=one.row.to_jsonl(),
            )
            for one in answers.rows
            if isinstance(one.served, InputError)
        ]
        server = self._target.server
        version = f" {answers.facts.version}" if answers.facts.version else ""
        proof = f"{server.title}{version}, model {answers.model}: proof by {server.strength}"
        return Result(tuple(first_findings(findings, _SHOWN, self._place)), facts=(("server of", proof),))

    def prompts(self) -> Result:
        """ML902: each prompt has mistral-common's ids, but for the named deviations."""
        findings: list[Finding] = []
        accepted: Counter[str] = Counter()
        for one in self._shown:
            if one.served_ids == one.asked.expected:
                continue
            deviations = self._deviations(one)
            if deviations is None:
                findings += self._differences(one, injected=False)
            else:
                accepted.update(name for name in deviations if name != _INJECTED)
        right = sum(one.served_ids == one.asked.expected for one in self._shown)
        text = f"{right} of {len(self._shown)} prompts have the ids"
        if accepted:
            text += " of mistral-common; named deviations: " + ", ".join(f"{n} ({c})" for n, c in accepted.items())
        facts = (("prompts of", text if accepted else f"{text} of mistral-common"),)
        return Result(tuple(first_findings(findings, _SHOWN, self._place)), facts=facts)

    def injection(self) -> Result:
        """ML906: text never becomes a control token."""
        findings: list[Finding] = []
        for one in self._shown:
            if one.served_ids != one.asked.expected:
                findings += self._differences(one, injected=True)
        return Result(tuple(first_findings(findings, _SHOWN, self._place)))

    def preview(self) -> Result:
        """ML903: the ids that are previewed are as many as those that a chat request is fed."""
        if self._target.server.strength != "preview":
            return Result(not_checked="the server shows the ids of the chat request itself, or none")
        findings = []
        for one in self._taken():
            if one.served_ids is not None and one.count is not None and len(one.served_ids) != one.count:
                found = f"{one.asked.name}: the chat is fed {one.count} tokens, the preview has {len(one.served_ids)}"
                findings.append(Finding("ML903", found, self._place, row=one.asked.row.to_jsonl()))
        return Result(tuple(first_findings(findings, _SHOWN, self._place)))

    def counts(self) -> Result:
        """ML904: a server that hides its ids reports as many prompt tokens as mistral-common has."""
        hidden = [one for one in self._taken() if one.served_ids is None]
        if not hidden:
            return Result(not_checked="the server shows the ids")
        counted = [one for one in hidden if one.count is not None]
        if not counted:
            return Result(not_checked="the server shows neither ids nor their number")
        findings = []
        for one in counted:
            expected = len(one.asked.expected or ())
            if one.count != expected:
                found = f"{one.asked.name}: {one.count} prompt tokens"
                findings.append(Finding("ML904", found, self._place, str(expected), row=one.asked.row.to_jsonl()))
        return Result(tuple(first_findings(findings, _SHOWN, self._place)))

    def refusals(self) -> Result:
        """ML907: the server refuses a prompt exactly if mistral-common does."""
        findings = []
        for one in self._target.answers.rows:
            if isinstance(one.served, InputError):
                continue
            row = one.row.to_jsonl()
            if one.served.refused and not one.refusal:
                found = f"{one.name}: the server refuses it: {one.served.refused}"
                findings.append(Finding("ML907", found, self._place, "a prompt, as mistral-common makes", row=row))
            elif one.refusal and not one.served.refused:
                found = f"{one.name}: the server takes it"
                findings.append(Finding("ML907", found, self._place, f"a refusal: {one.refusal}", row=row))
        return Result(tuple(first_findings(findings, _SHOWN, self._place)))

    def _taken(self) -> Iterator[_Served]:
        """Yield the rows that both sides take."""
        for one in self._target.answers.rows:
            if not isinstance(one.served, InputError) and not one.served.refused and one.expected is not None:
                yield _Served(one, one.served.ids, one.served.count)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The template that a server would render by: the folder's own, or the generated one."""
        from pytest_mistral_lora.chat.templates import ChatTemplate

        judge = self._target.judge
        try:
            return judge.template if judge.has_template else ChatTemplate(judge.tokenizer.fast)
        except NoTemplateError:
            return None

    def deviations_of(self, asked: AskedRow) -> tuple[str, ...]:
        """Return the named deviations that explain a row's served prompt; empty if they do not."""
        served = asked.served
        ids = None if isinstance(served, InputError) else served.ids
        return self._deviations(_Served(asked, ids, None)) or ()

    def _deviations(self, one: _Served) -> tuple[str, ...] | None:
        """Return the named deviations that explain a served prompt; None if they do not."""
        from pytest_mistral_lora.chat.templates.compare import compare
        from pytest_mistral_lora.conformance.encoded.row_faults import id_faults

        template, asked = self._template, one.asked
        if template is None:
            return None
        named = compare(asked.row, self._target.oracle, template)
        if named.unexplained or not named.deviations:
            return None
        try:
            text = template.render(asked.prompt, generation_prompt=True)
        except RowError:
            return None
        if tuple(template.tokenizer(text, add_special_tokens=False)["input_ids"]) == one.served_ids:
            return named.deviations
        # a server may show a part of the deviations: llama.cpp parses the arguments of a call first
        faults = id_faults(asked.prompt, asked.expected or (), one.served_ids or (), self._target.oracle)
        found = [next((name for name in named.deviations if name in _CLASSES.get(one.rule, ())), "") for one in faults]
        return tuple(found) if all(found) else None

    def _differences(self, one: _Served, *, injected: bool) -> Iterator[Finding]:
        """Yield a finding for each class of a served prompt's difference: text as control tokens, or all others."""
        from pytest_mistral_lora.conformance.alignment import Alignment
        from pytest_mistral_lora.conformance.encoded.row_faults import id_faults

        asked = one.asked
        expected, ids, oracle = asked.expected or (), one.served_ids or (), self._target.oracle
        difference = Alignment((expected, None), (ids, None), oracle.piece, ("mistral-common", "served"))
        for fault in id_faults(asked.prompt, expected, ids, oracle):
            if (fault.rule == "ML523") is injected:
                rule, found = ("ML906" if injected else "ML902"), f"{asked.name}: {fault.found} ({fault.rule})"
                parts, row = difference.parts(asked.name), asked.row.to_jsonl()
                yield Finding(rule, found, self._place, fault.expected, row=row, **parts)


@dataclass(frozen=True, slots=True)
class _Served:
    """A row that server and mistral-common both take."""

    asked: AskedRow
    served_ids: tuple[int, ...] | None
    count: int | None
