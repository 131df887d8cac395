"""The checks of the prompts that a running server feeds its model, compared with mistral-common's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result, first_of_each_cause, shown_difference
from pytest_mistral_lora.conformance.server.changed_messages import (
    ChangedMessages,
    FedPrompt,
    changed_by_ids,
    changed_messages,
)
from pytest_mistral_lora.conformance.server.chat_causes import fix_of, fix_of_refusal
from pytest_mistral_lora.conformance.server.deviations import (
    INJECTED,
    PromptDeviations,
    TakenRow,
    other_tokenizer_finding,
)
from pytest_mistral_lora.conformance.server.failures import cause_of, failure_finding
from pytest_mistral_lora.conformance.server.shown import judged_publicly
from pytest_mistral_lora.conformance.server_target import (
    NOT_ASKED,
    AskedRow,
    NotServedError,
    ParsersTarget,
    ServerChoice,
    ServerTarget,
)
from pytest_mistral_lora.conformance.targets import Target, name_of
from pytest_mistral_lora.errors import EntryPointError, InputError, RunnerError, TokenizerError, and_more, counted
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.asking_limits import AskingLimits
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

_SHOWN = 8
_CAUSES = {"ML527": "system-prompt", "ML531": "cut-prompt"}
"""The rules of differences that a gateway makes, too, with the causes that have the fixes."""

_ALL_FAILED = "each request failed: see the check `failures`"
_NO_TRANSCRIPTS = (
    "no golden transcripts: name an adapter that has some (--adapter, --mistral-adapter), or their folder (--golden); "
    "mistral-lora smoke DIR --record FOLDER --rows FILE writes them"
)


def checks(target: ServerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a server, and of the transcripts that it replays."""
    if target.adapter is not None and not target.golden:
        # the transcripts in the adapter's folder, and those that the user recorded
        name = name_of(target.adapter)
        places = [target.adapter / TRANSCRIPTS, *(folder / TRANSCRIPTS / name for folder in settings.golden_folders)]
        found = tuple(place for place in places if place.is_dir())
        # its answers are those of the same target if nothing is added
        target = replace(target, golden=found) if found else target
    judged = ServerChecks(target)
    cases = judged.cases()
    if target.adapter is None and not target.golden:
        cases |= {"transcripts": partial(Result, not_checked=_NO_TRANSCRIPTS)}
    else:
        from pytest_mistral_lora.conformance.server.replay import ReplayChecks

        replayed = ReplayChecks(target).cases()
        cases |= {case: partial(judged.if_replayed, case, judge) for case, judge in replayed.items()}
    if target.named_adapters:
        from pytest_mistral_lora.conformance.server.names import NameChecks

        cases |= {"names": partial(judged.if_reached, NameChecks(target).names)}
    if target.declared is not None:
        cases |= {"deployment": judged.deployment}
    for case, judge in cases.items():
        yield Check(target, "server", case, partial(judged_publicly, judge))


class ServerChecks:
    """The checks of a server: each method is a check, and they share the server's answers."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target
        self._place = Place.of(target.url)
        self._deviations = PromptDeviations(target)

    def cases(self) -> dict[str, Callable[[], Result]]:
        """Return the checks by name."""
        by_ids = {"prompts": self.prompts, "injection": self.injection}
        without_ids = {"preview": self.preview, "counts": self.counts, "refusals": self.refusals}
        judged = {
            name: partial(self._if_answered, judge, by_ids=name in by_ids)
            for name, judge in (by_ids | without_ids).items()
        }
        return {"there": self.there, "failures": partial(self.if_reached, self.failures), **judged}

    @cached_property
    def _failure(self) -> InputError | None:
        try:
            _ = self._target.answers
        except EntryPointError:
            raise  # the kind of server is not there: nothing is known of this one
        except InputError as error:
            return error
        return None

    def if_reached(self, judge: Callable[[], Result]) -> Result:
        """Return the result of a check, if the server answers."""
        if isinstance(self._failure, NotServedError):
            return Result(not_checked="the declared name is not served: see the check `deployment`")
        if self._failure is not None:
            return Result(not_checked="the server does not answer: see the check `there`")
        if all(isinstance(asked_row.served, InputError) for asked_row in self._target.answers.rows):
            return Result(not_checked="no row was answered: see the check `there`")
        return judge()

    def _if_answered(self, judge: Callable[[], Result], *, by_ids: bool = False) -> Result:
        return self.if_reached(partial(self._if_prompts, judge, by_ids=by_ids))

    def _if_prompts(self, judge: Callable[[], Result], *, by_ids: bool) -> Result:
        if self._all_failed:
            return Result(not_checked=_ALL_FAILED)
        if by_ids and not self._shown:
            return Result(not_checked=f"{self._target.server.title} does not show the ids of a prompt")
        if self._other is not None and judge not in (self.prompts, self.counts):
            return Result(not_checked="the prompts are those of another tokenizer than the named one")
        return judge()

    def if_replayed(self, case: str, judge: Callable[[], Result]) -> Result:
        """Return the result of a check of replayed transcripts, if there are any and the server answers."""
        if not self._target.golden:
            return Result(not_checked=_NO_TRANSCRIPTS)
        if case != "transcripts" and not self._target.transcripts[0]:
            return Result(not_checked="no golden transcript can be replayed: see the check `transcripts`")
        # an unreachable server is not recognised, either
        if self._failure is None and not self._target.server.gives_answers:
            return Result(not_checked=f"{self._target.server.title} gives prompts, and no answers")
        return judge() if case == "transcripts" else self.if_reached(judge)

    @property
    def _all_failed(self) -> bool:
        """Whether no row was answered or refused."""
        return all(
            isinstance(asked_row.served, InputError) or asked_row.served.failed
            for asked_row in self._target.answers.rows
        )

    @cached_property
    def _taken(self) -> list[TakenRow]:
        """The rows that both sides accept."""
        found = []
        for asked_row in self._target.answers.rows:
            if isinstance(asked_row.served, InputError) or asked_row.served.refused or asked_row.served.failed:
                continue
            if asked_row.expected is not None:
                ids, text = asked_row.served.ids, asked_row.served.text
                if text is not None:
                    # as a server encodes a preview: markers in it are control tokens, and BOS always comes first
                    encoded = self._target.tokenizer.fast(text, add_special_tokens=False)["input_ids"]
                    ids = (self._target.oracle.bos_id, *encoded)
                found.append(TakenRow(asked_row, ids, asked_row.served.count))
        return found

    @cached_property
    def _shown(self) -> list[TakenRow]:
        """The rows whose ids the server shows."""
        return [taken_row for taken_row in self._taken if taken_row.ids is not None]

    @cached_property
    def _differing(self) -> list[tuple[TakenRow, tuple[str, ...] | None]]:
        """The rows whose ids differ from mistral-common's, each with the deviations that explain it, or None."""
        rows = [taken_row for taken_row in self._shown if taken_row.ids != taken_row.asked.expected]
        return [(taken_row, self._deviations.explain(taken_row.asked, taken_row.ids or ())) for taken_row in rows]

    @cached_property
    def _changed(self) -> ChangedMessages | None:
        """What changes the messages of each chat before they are encoded right; None if no change is known to."""
        if self._target.server.strength != "ids":
            return None
        return changed_by_ids([(one.asked.prompt, one.ids) for one in self._shown if one.ids], self._target.oracle)

    @cached_property
    def _other(self) -> Finding | None:
        """The finding of prompts that another tokenizer makes; None if the named tokenizer or none makes them."""
        miscounted = any(
            taken_row.count not in (None, len(taken_row.asked.expected or ())) for taken_row in self._taken
        )
        unexplained = any(names is None for _, names in self._differing)
        return other_tokenizer_finding(self._target, self._taken) if unexplained or miscounted else None

    def there(self) -> Result:
        """ML901: the server is reachable, and answers each request."""
        if isinstance(self._failure, NotServedError):
            return Result(not_checked="the declared name is not served: see the check `deployment`")
        if self._failure is not None:
            return Result((_of_error(self._failure),))
        answers = self._target.answers
        findings = []
        for asked_row in answers.rows:
            if isinstance(asked_row.served, InputError):
                findings.append(_of_error(asked_row.served, asked_row))
        if self._taken and not any(row.ids is not None or row.count is not None for row in self._taken):
            # it answers, but its prompts cannot be judged
            found, expected = "no answer has the ids of its prompt, or their number", "usage.prompt_tokens"
            findings.append(Finding("ML901", found, self._place, expected))
        from pytest_mistral_lora.programs.facts import remark_of_program

        server, endpoint = self._target.recognised
        version = answers.facts.version or (self._target.version and f"{self._target.version} (as named)")
        strength: str = "count" if self._taken and not self._shown else server.strength
        texts = [
            asked_row
            for asked_row in answers.rows
            if not isinstance(asked_row.served, InputError) and asked_row.served.text is not None
        ]
        strength += " of the text" if texts else ""
        proof = f"{server.title}{version and f' {version}'}, model {answers.model}: proof by {strength}"
        proof += f"; recognised by {endpoint}" if endpoint else ""
        proof += f"; not asked, being {NOT_ASKED}: {counted(answers.left_out, 'row')}" if answers.left_out else ""
        proof += "" if server.was_run else "; never run: this client is written from the server's source"
        # a server that fails every request is reachable, but proves nothing
        not_checked = _ALL_FAILED if self._all_failed and not findings else ""
        facts = [("server of", proof)]
        if answers.facts.defaults:
            settings = ", ".join(f"{name} {value}" for name, value in answers.facts.defaults)
            facts.append(("defaults of", f"a request that does not name them gets {settings}"))
        newer = remark_of_program(server.title, self._target.served_version)
        if newer:
            facts.append(("known faults and deviations of", newer))
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)), not_checked, tuple(facts))

    def deployment(self) -> Result:
        """ML933: the served model is the declared one."""
        from pytest_mistral_lora.conformance.server.deployment import judged_deployment, not_served

        if isinstance(self._failure, NotServedError):
            return not_served(self._target, self._failure)
        return self.if_reached(partial(judged_deployment, self._target))

    def failures(self) -> Result:
        """ML919: no request fails if mistral-common has a prompt for it."""
        findings = []
        for asked_row in self._target.answers.rows:
            # if mistral-common refuses the messages, a failure is as good as a refusal
            if not isinstance(asked_row.served, InputError) and asked_row.served.failed and not asked_row.refusal:
                findings.append(
                    failure_finding(asked_row.name, asked_row.served.failed, self._place, asked_row.row.to_jsonl())
                )
        if self._all_failed and not findings:
            return Result(not_checked="each request failed, of messages that mistral-common refuses, too")
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)))

    def prompts(self) -> Result:
        """ML902: each prompt has mistral-common's ids, except for the named deviations."""
        findings: list[Finding] = []
        accepted: Counter[str] = Counter()
        for taken_row, explained in self._differing if self._other is None else ():
            # text that becomes a control token is judged by `injection`
            deviations = [name for name in explained or () if name != INJECTED]
            if self._changed is not None:
                found, row = f"{taken_row.asked.name}: {self._changed.words}", taken_row.asked.row.to_jsonl()
                fix = self._changed.fix
                findings.append(Finding("ML902", found, self._place, row=row, shape="changed messages", fix=fix))
            elif explained is None:
                findings += self._differences(taken_row, injected=False)
            elif unknown := self._deviations.unknown_finding(taken_row.asked, taken_row.ids or (), deviations):
                findings.append(unknown)
            else:
                accepted.update(deviations)
        right = sum(taken_row.ids == taken_row.asked.expected for taken_row in self._shown)
        text = f"{right} of {len(self._shown)} prompts have the ids of mistral-common"
        if accepted:
            counts = ", ".join(f"{name} ({count})" for name, count in accepted.items())
            text += f"; named deviations, known of {self._target.server.title} {self._target.served_version}: {counts}"
        facts = (("prompts of", text),)
        return Result(
            tuple(first_of_each_cause([self._other] if self._other else findings, _SHOWN, self._place)), facts=facts
        )

    def injection(self) -> Result:
        """ML906: text never becomes a control token, unless no setting of a known server prevents it."""
        findings: list[Finding] = [*self._typed()]
        known = 0
        for taken_row, explained in self._differing:
            injected = [*self._differences(taken_row, injected=True)]
            if injected and self._deviations.are_unavoidable(explained or ()):
                known += 1
            else:
                findings += injected
        seen = f"{known} of {len(self._shown)} prompts"
        server = f"{self._target.server.title} {self._target.served_version}"
        text = f"text becomes one in {seen}, as is known of {server} ({INJECTED}): filter such text before it"
        facts = (("control tokens of", text),) if known else ()
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)), facts=facts)

    def _typed(self) -> Iterator[Finding]:
        """Yield ML906 if letters become control tokens even where the server does not parse them."""
        control = self._target.oracle.control_tokens
        names = [control[token] for token in dict.fromkeys(self._target.answers.spelled or ()) if token in control]
        if names:
            shown = f"{', '.join(names[:_SHOWN])}{and_more(_SHOWN, len(names))}"
            found = f"letters become {shown} where the server parses no control tokens"
            expected = "letters: in the vocabulary of the served file the type of these tokens is not `control`"
            yield Finding("ML906", found, self._place, expected, shape="typed", fix=fix_of(self._target, "typed"))

    def preview(self) -> Result:
        """ML903: the preview has as many ids as the prompt of a chat request."""
        if self._target.server.strength != "preview" or not self._shown:
            return Result(not_checked="the server shows the ids of the chat request itself, or none")
        findings = []
        known = [
            (taken_row.asked, len(taken_row.ids), taken_row.count)
            for taken_row in self._taken
            if taken_row.ids is not None and taken_row.count is not None
        ]
        prompts = [FedPrompt(asked_row.prompt, shown, fed) for asked_row, shown, fed in known]
        changed = changed_messages(prompts, self._target.oracle)
        for asked_row, shown, fed in known:
            if shown != fed and changed is not None:
                found, row = f"{asked_row.name}: the chat is fed {fed} tokens, the preview has {shown}", asked_row.row
                told = Finding("ML903", found, self._place, "", changed.words, row.to_jsonl(), "fed", fix=changed.fix)
                findings.append(told)
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)))

    def counts(self) -> Result:
        """ML904: a server that hides its ids reports as many prompt tokens as mistral-common has."""
        hidden = [taken_row for taken_row in self._taken if taken_row.ids is None]
        if not hidden:
            return Result(not_checked="the server shows the ids, which prove more than their number")
        counted_rows = [taken_row for taken_row in hidden if taken_row.count is not None]
        if not counted_rows:
            return Result(not_checked="the server shows neither ids nor their number")
        findings = [] if self._other is None else [self._other]
        accepted: Counter[str] = Counter()
        prompts = [
            FedPrompt(taken_row.asked.prompt, len(taken_row.asked.expected or ()), taken_row.count or 0)
            for taken_row in counted_rows
        ]
        changed = changed_messages(prompts, self._target.oracle) if self._other is None else None
        words, told_fix = (changed.words, changed.fix) if changed is not None and changed.is_told else ("", "")
        for taken_row in counted_rows if self._other is None else ():
            expected = len(taken_row.asked.expected or ())
            if taken_row.count == expected:
                continue
            explained = self._deviations.explain_count(taken_row.asked, taken_row.count or 0)
            if explained and not self._deviations.are_unknown(explained):
                accepted.update(explained)
                continue
            found = f"{taken_row.asked.name}: {taken_row.count} prompt tokens"
            fix = told_fix or self._deviations.fix_of_kind(explained or ())
            row = taken_row.asked.row.to_jsonl()
            findings.append(Finding("ML904", found, self._place, str(expected), words, row, fix=fix))
        facts: tuple[tuple[str, str], ...] = ()
        if accepted:
            names = ", ".join(f"{name} ({number})" for name, number in accepted.items())
            server = f"{self._target.server.title} {self._target.served_version}"
            facts = (("numbers of", f"those of named deviations, known of {server}: {names}"),)
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)), facts=facts)

    def refusals(self) -> Result:
        """ML907: the server refuses a prompt exactly if mistral-common does."""
        findings = []
        for asked_row in self._target.answers.rows:
            if isinstance(asked_row.served, InputError) or asked_row.served.failed:
                continue
            row = asked_row.row.to_jsonl()
            if asked_row.served.refused and not asked_row.refusal:
                found, expected = (
                    f"the server refuses it: {asked_row.served.refused}",
                    "a prompt, as mistral-common makes",
                )
            elif asked_row.refusal and not asked_row.served.refused:
                found, expected = "the server takes it", f"a refusal: {asked_row.refusal}"
            else:
                continue
            shape = cause_of(f"{found}, {expected}")
            # what is left of changed messages may be refused
            fix = self._changed.fix if self._changed is not None else ""
            fix = fix_of_refusal(self._target, asked_row.served.refused) or fix
            words = f"{asked_row.name}: {found}"
            findings.append(Finding("ML907", words, self._place, expected, row=row, shape=shape, fix=fix))
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)))

    def _differences(self, taken_row: TakenRow, *, injected: bool) -> Iterator[Finding]:
        """Yield a finding for each class of a served prompt's difference: text as control tokens, or all others."""
        from pytest_mistral_lora.chat.diff import TokenDiff
        from pytest_mistral_lora.conformance.encoded.row_faults import id_faults

        asked_row = taken_row.asked
        expected, ids, oracle = asked_row.expected or (), taken_row.ids or (), self._target.oracle
        difference = TokenDiff.of((expected, None), (ids, None), oracle.piece, ("mistral-common", "served"))
        for fault in id_faults(asked_row.prompt, expected, ids, oracle):
            if (fault.rule == "ML523") is injected:
                rule, found = ("ML906" if injected else "ML902"), f"{asked_row.name}: {fault.found} ({fault.rule})"
                parts, row = shown_difference(difference, Place.of(asked_row.name)), asked_row.row.to_jsonl()
                # a preview does not pass what changes a chat
                is_fed = self._target.server.strength == "ids" and fault.rule in _CAUSES
                fix = fix_of(self._target, _CAUSES[fault.rule]) if is_fed else ""
                if self._target.server.strength == "ids" and not fix and _has_other_texts(expected, ids, oracle):
                    fix = fix_of(self._target, "texts")
                yield Finding(rule, found, self._place, fault.expected, row=row, fix=fix, **parts)


def _has_other_texts(expected: Sequence[int], ids: Sequence[int], oracle: Oracle) -> bool:
    """Return whether a prompt has all markers of the expected one, and other texts between them, not only spaces."""
    from pytest_mistral_lora.chat.diff import split_at_markers

    sides = [
        split_at_markers([token for token in side if 0 <= token < oracle.vocab_size], oracle)
        for side in (expected, ids)
    ]
    [markers, served_markers] = [[part.marker for part in side] for side in sides]
    [letters, served_letters] = [["".join(part.text.split()) for part in side] for side in sides]
    return markers == served_markers and letters != served_letters


def _of_error(error: InputError, asked_row: AskedRow | None = None) -> Finding:
    """Return the finding of a request that failed.

    Args:
        error: The error.
        asked_row: The row that was asked; None if the server could not be asked at all.
    """
    step = "Name the tokenizer of the served model." if isinstance(error, TokenizerError) else ""
    step = "Mend your script: docs/serving.md has its interface." if isinstance(error, RunnerError) else step
    fix = error.next_step or step
    if asked_row is None:
        return Finding("ML901", error.found, error.place, error.expected, fix=fix)
    found, row = f"{asked_row.name}: {error.found}", asked_row.row.to_jsonl()
    return Finding("ML901", found, error.place, error.expected, row=row, shape=cause_of(error.found), fix=fix)


def served_findings(url: str, rows: Sequence[Row], tokenizer: CheckpointTokenizer, model: str) -> Iterator[Finding]:
    """Yield the findings about a server's prompts of some rows; hidden ids are also a finding.

    Args:
        url: The kind and the address of the server, as `ServerChoice` parses them.
        rows: The rows, each with an answer at its end.
        tokenizer: The tokenizer that the prompts are compared with.
        model: The name of the model; empty for the first that the server lists.

    Raises:
        InputError: If the server's address or kind is invalid, or a row has no answer.
    """
    target = _target_of_rows(ServerChoice.parse(url), rows, tokenizer, model)
    results = {case: judged_publicly(judge) for case, judge in ServerChecks(target).cases().items()}
    for result in results.values():
        yield from target.in_words(result.findings)
    hidden = results["prompts"].not_checked
    if hidden and not results["there"].findings:
        yield Finding("ML902", f"not checked: {hidden}", Place.of(target.url), "the ids of each prompt")


def served_prompt(
    choice: ServerChoice | None,
    row: Row | Mapping[str, Any],
    tokenizer: CheckpointTokenizer,
    limits: AskingLimits | None = None,
) -> tuple[int, ...]:
    """Return the ids of a server's prompt for a row's messages before its last answer.

    Args:
        choice: The server; None if none is named.
        row: The row.
        tokenizer: The tokenizer of its model.
        limits: The limits of the request; None for the usual ones.

    Raises:
        InputError: If no server is named, the server is unreachable, refuses the messages or hides its ids, or the row
            has no answer.
        RowError: If the row cannot be used.
    """
    if choice is None:
        step = "Set mistral_servers in your ini file, or give --mistral-golden --mistral-server NAME=URL."
        raise InputError("no server is named", next_step=step)
    target = _target_of_rows(choice, [as_row(row)], tokenizer, limits=limits)
    found = target.answers.rows[0].served
    if isinstance(found, InputError):
        raise found
    if found.refused or found.failed:
        words = f"the server refuses the messages: {found.refused}" if found.refused else found.failed
        raise InputError(words, place=choice.url)
    if found.ids is None:
        raise InputError(f"{target.server.title} does not show the ids of a prompt", place=choice.url)
    return found.ids


def _target_of_rows(
    choice: ServerChoice,
    rows: Sequence[Row],
    tokenizer: CheckpointTokenizer,
    model: str = "",
    limits: AskingLimits | None = None,
) -> ServerTarget:
    judge, asked = Target.of_loaded(tokenizer), limits or AskingLimits()
    target = choice.target("server", judge, given=tuple(rows), model=model, limits=asked)
    if isinstance(target, ParsersTarget):
        raise InputError("parsers read answers, and make no prompts", place=target.url, expected="a running server")
    if not rows or len(target.asked_rows()) < len(rows):
        found = "a row without an answer, or with settings that a chat request names otherwise" if rows else "no row"
        raise InputError(found, expected="rows that end with the answer to a prompt")
    return target
