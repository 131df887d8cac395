"""Golden transcripts replayed through a server: its numbers, its prompts, its adapter and its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.answer.comparison import is_same_message, shown_pair, told_apart
from pytest_mistral_lora.conformance.finding import Finding, Result, first_of_each_cause
from pytest_mistral_lora.conformance.server.answer import AnswerJudge, ChangedMessage, call_text, moved_logprobs
from pytest_mistral_lora.conformance.server.chat_causes import (
    CONSTRAINED,
    HIDDEN_PROMPT,
    POOL,
    POOL_FIX,
    RANDOM_FIX,
    RIGHT_MODEL,
    STREAM_ALONE,
    STREAM_FIX,
    ChatCauses,
    fix_of,
    fix_of_refusal,
    judged_passes,
    limit_of,
    shows_other_prompt,
    with_file,
)
from pytest_mistral_lora.conformance.server.failures import (
    answered,
    cause_of,
    failure_finding,
    is_about_context,
    no_answer,
)
from pytest_mistral_lora.conformance.server.moved import Moved
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.errors import InputError, NoAnswerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.judgement import TOLERANCES, AnswerJudgement, difference_text, format_rates
from pytest_mistral_lora.records.transcripts import Transcript

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.replay import Outcome, Replayed

_OTHER_WEIGHTS = (
    "The weights differ from the recorded ones, such as by an older adapter, another alpha, rank or revision of the "
    "base, or the server computes otherwise, by its settings of the rotary embedding or the type of its cache. Which "
    "cannot be told, because answers show their sum alone."
)

_GRAMMAR = "Without a grammar the server answers as recorded, so a grammar constrains each answer."
_GRAMMAR_FIX = (
    "Find the grammar that each request gets: an option of the server, such as a schema of its answers, or a field of "
    "a gateway. The weights are right."
)
_DRAFTED = (
    "log-probabilities are not compared, and ids are: the server drafts tokens (speculative decoding), and gives the "
    "drafted ones the log-probability 0"
)
_UNREAD = "tool calls are compared by their ids alone, since the server left them in the text"

FINGERPRINT = 0.03
"""Largest difference of a first log-probability in full precision, in nats. Noise was 0.007 at most (with a cache in
float16), and one BOS or one space too many moved it by 0.071 at least."""

_NOISE = "bf16"
"""The precision whose margin is the widest near tie between two answers of one server: its weights are the same, and
its numbers differ by the requests beside one alone."""

_SHOWN = 8
_SAME = 1e-4
"""Largest difference of log-probabilities when one model answers twice in one process, in nats."""


class ReplayChecks:
    """The checks of replayed transcripts: each method is a check, and they share the server's answers."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target
        self._place = Place.of(target.url)

    def cases(self) -> Mapping[str, Callable[[], Result]]:
        """Return the checks by name."""
        return {
            # ML801 and ML802: the transcripts are readable, and their prompts have the tokenizer's ids
            "transcripts": lambda: Result(tuple(self._target.transcripts[1])),
            "by-ids": self.by_ids,
            "by-messages": self.by_messages,
            "first-logprobs": self.first_logprobs,
            "applied": self.applied,
            "greedy": self.greedy,
        }

    @cached_property
    def _precision(self) -> tuple[str, str]:
        """The precision of the served weights, and its source."""
        target = self._target
        if target.precision:
            return target.precision, "as stated"
        if target.answers.facts.precision:
            return target.answers.facts.precision, "as the server reports"
        widest = max(
            (replayed.transcript.precision for replayed in target.replayed),
            key=lambda precision: TOLERANCES[precision].margin,
        )
        return widest, "as recorded, since the server reports none"

    @cached_property
    def _judge(self) -> AnswerJudge:
        return AnswerJudge(self._target.oracle, self._precision[0], knows_logprobs=not self._target.drafts)

    @property
    def _lacks_tolerance(self) -> str:
        """Why answers that differ cannot be judged; empty if the tolerance of the served weights is known."""
        precision, _ = self._precision
        if precision in TOLERANCES:
            return ""
        stated = f"{self._target.server.name}:q4={self._target.url}"
        return f"no tolerance is known for weights in {precision}; to use another's: {stated}"

    def by_ids(self) -> Result:
        """ML908: the recorded ids of each prompt are answered as recorded, with the recorded log-probabilities."""
        if self._hides_answers:
            return Result(not_checked=self._hides_answers)
        return self._answers("ML908", lambda replayed: replayed.by_ids)

    def by_messages(self) -> Result:
        """ML909: the server answers the messages as recorded."""
        return self._answers("ML909", lambda replayed: replayed.by_messages)

    @cached_property
    def _hides_answers(self) -> str:
        """Why the answers to ids cannot be judged; empty if they can."""
        target, outcomes = self._target, [replayed.by_ids for replayed in self._target.replayed]
        if all(outcome is None for outcome in outcomes):
            return f"{target.server.title} is not asked by ids"
        is_chat = any(answered(replayed.by_messages) for replayed in target.replayed)
        facts = target.answers.facts
        # one that reports its version, its weights or its adapters is the server itself, and no gateway
        is_itself = bool(facts.version or facts.precision) or facts.scales is not None
        if is_itself or not is_chat or any(map(answered, outcomes)):
            return ""
        if any(isinstance(outcome, NoAnswerError) for outcome in outcomes):
            return ""
        return f"a gateway that passes no ids: it is not asked by ids. To them it answers: {no_answer(outcomes[0])}"

    def _answers(self, rule: str, of: Callable[[Replayed], Outcome]) -> Result:
        """Return the result of the answers to ids, or to messages."""
        if self._lacks_tolerance:
            moved = self._moved(of)
            return Result(not_checked=f"{self._lacks_tolerance}{moved.numbers and f'; {moved.numbers}'}")
        precision, source = self._precision
        findings, repeated, unanswered = [], 0, 0
        answers: list[AnswerJudgement] = []
        passed = []
        for replayed in self._target.replayed:
            judged = self._judged(replayed.transcript, of(replayed), by_messages=rule == "ML909")
            if isinstance(judged, str):
                is_known = rule == "ML909" and self._is_unanswered_by_ids(of(replayed))
                unanswered += is_known
                findings += [] if is_known else [self._unjudged(rule, replayed.transcript, of(replayed), judged)]
                continue
            answers.append(judged)
            if judged.passed:
                passed.append(replayed)
            elif rule == "ML909" and self._differs_by_ids(replayed):
                repeated += 1
            else:
                findings.append(self._different(rule, replayed, judged))
        moved = self._moved(of)
        is_known = rule == "ML909" and (repeated > 0 or not self._moved_by_ids.is_explained)
        is_known = is_known or (bool(self._hides_answers) and bool(self.first_logprobs().findings))
        if not findings and not is_known and not moved.is_explained:
            findings.append(self._moved_finding(rule, moved))
        tiers = [judged.tier for judged in answers]
        counts = ", ".join(f"{tiers.count(tier)} {tier}" for tier in dict.fromkeys(tiers)) or "0"
        text = f"{counts} of {len(self._target.replayed)}; {precision}, {source}"
        text += f"; {moved.numbers}" if moved.numbers else ""
        not_streamed = ""
        if rule == "ML909":
            streamed, of_streams, not_streamed = self._streams(passed)
            findings += of_streams
            text += f"; {streamed}" if streamed else ""
        text += f". {RIGHT_MODEL}" if any(RIGHT_MODEL in finding.detail for finding in findings) else ""
        name = "answers by ids of" if rule == "ML908" else "answers by messages of"
        all_of = len(self._target.replayed)
        left_out = [f"same cause as ML908: {repeated} of {all_of} differ by ids already"] * (repeated > 0)
        left_out += [f"same cause as by ids: {unanswered} of {all_of} have no answer"] * (unanswered > 0)
        left_out += [_DRAFTED] * self._target.drafts
        left_out += [not_streamed] * bool(not_streamed)
        left_out += [f"{_UNREAD}. {fix_of(self._target, 'misread')}"] * (rule == "ML909" and self._leaves_calls)
        if moved.numbers and moved.tolerance is None:
            stated = f"{self._target.server.name}:bf16={self._target.url}"
            left_out.append(f"{moved.numbers}: not judged, since the server reports no precision; name it: {stated}")
        numbers = [("nats moved by", moved.as_numbers)] if moved.numbers else []
        facts = ((name, text), *numbers, *format_rates(answers))
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)), "; ".join(left_out), facts)

    def _moved(self, of: Callable[[Replayed], Outcome]) -> Moved:
        """Return how far the log-probabilities of answers moved, beside what the precision explains."""
        precision, source = self._precision
        tolerance = None
        if not self._lacks_tolerance and not source.startswith("as recorded"):
            both = [precision, *(replayed.transcript.precision for replayed in self._target.replayed)]
            precision = max(both, key=lambda name: TOLERANCES[name].margin)
            tolerance = TOLERANCES[precision]
        known = () if self._target.drafts else self._target.replayed
        pairs = [(replayed.transcript, answered(of(replayed))) for replayed in known]
        by_case = {golden.case: moved_logprobs(golden, answer) for golden, answer in pairs if answer is not None}
        return Moved(by_case, precision, tolerance)

    @cached_property
    def _moved_by_ids(self) -> Moved:
        return self._moved(lambda replayed: replayed.by_ids)

    def _moved_finding(self, rule: str, moved: Moved) -> Finding:
        """Return the finding of answers that are as recorded, with other log-probabilities."""
        replayed = next(one for one in self._target.replayed if one.transcript.case == moved.furthest)
        far = f"the answers are as recorded, and their {moved.numbers.partition(';')[0]}, most in {moved.furthest}"
        if rule == "ML908":
            causes = self._model_causes(replayed.transcript)
            lines = [cause for cause, _ in causes] or [_OTHER_WEIGHTS]
            fix = next((fix for _, fix in causes), "")
        elif self._hides_answers:
            lines, fix = [HIDDEN_PROMPT], ""
        else:
            lines, fix = self._causes.of_moved(replayed)
        row, effect_of = replayed.transcript.row.to_jsonl(), _effect_of(rule, replayed)
        return Finding(rule, far, self._place, moved.explained, "\n".join(lines), row, fix=fix, effect_of=effect_of)

    def _streams(self, passed: Sequence[Replayed]) -> tuple[str, list[Finding], str]:
        """Return how many right answers are right as a stream, ML909 for the others, and why some are not judged."""
        asked = [replayed for replayed in passed if replayed.stream is not None]
        reasons = [reason for replayed in asked if (reason := no_answer(replayed.stream))]
        findings = [finding for replayed in asked if (finding := self._stream_finding(replayed))]
        right = len(asked) - len(reasons) - len(findings)
        text = f"as a stream {right} of {len(asked)}" if asked else ""
        not_judged = f"as a stream {len(reasons)} of {len(asked)} have no answer: {reasons[0]}" if reasons else ""
        return text, findings, not_judged

    def _stream_finding(self, replayed: Replayed) -> Finding | None:
        """Return ML909 if a right answer is another message as a stream, other than by a near tie."""
        golden, whole, stream = replayed.transcript, answered(replayed.by_messages), answered(replayed.stream)
        if whole is None or stream is None or self._causes.is_random:
            return None
        # some streams lack the reason, and the ids of some parts
        stream = replace(stream, ids=None, finish_reason=whole.finish_reason)
        if is_same_message(whole, stream) or judged_passes(self._judged(golden, stream, by_messages=True)):
            return None
        changed = self._judge.changed_message(golden, stream)
        found, expected = told_apart(stream, whole) if changed is None else (changed.found, changed.expected)
        words = f"as a stream the client gets {found}"
        return self._finding("ML909", golden, words, STREAM_ALONE, expected, shape=STREAM_ALONE, fix=STREAM_FIX)

    @property
    def _leaves_calls(self) -> bool:
        """Whether the server left a recorded call in the text, as one that was started without a parser of calls."""
        call = self._target.oracle.tool_calls_id
        pairs = [(replayed.transcript, answered(replayed.by_messages)) for replayed in self._target.replayed]
        return any(
            # an answer that has no call leaves none in its text
            call in golden.completion_ids and answer and not answer.calls_read and call in (answer.ids or (call,))
            for golden, answer in pairs
        )

    def _differs_by_ids(self, replayed: Replayed) -> bool:
        """Whether the answer to the recorded ids also differs, so that the prompt is not the cause."""
        by_ids = self._judged(replayed.transcript, replayed.by_ids, by_messages=False)
        return isinstance(by_ids, AnswerJudgement) and not by_ids.passed

    def _judged(self, golden: Transcript, outcome: Outcome, *, by_messages: bool) -> AnswerJudgement | str:
        """Return the judgement of an answer, or the reason why it cannot be judged."""
        answer = answered(outcome)
        if answer is None:
            return no_answer(outcome) or "it was not answered"
        try:
            return self._judge.judge(golden, answer, by_messages=by_messages)
        except InputError as error:
            return error.found

    def _is_unanswered_by_ids(self, outcome: Outcome) -> bool:
        """Whether a request has no answer for a reason for which one by ids has none: the check by ids reports it."""
        by_ids = {_reason(replayed.by_ids) for replayed in self._target.replayed}
        return not self._hides_answers and _shared(outcome) and _reason(outcome) in by_ids

    def _unjudged(self, rule: str, golden: Transcript, outcome: Outcome, reason: str) -> Finding:
        row = golden.row.to_jsonl()
        if isinstance(outcome, NoAnswerError):
            found = f"{golden.case}: the request has no answer: {outcome.found}"
            shape = cause_of(outcome.found)
            return Finding("ML919", found, self._place, "an answer", row=row, shape=shape, fix=outcome.next_step)
        if outcome is not None and not isinstance(outcome, InputError) and outcome.failed:
            return failure_finding(golden.case, outcome.failed, self._place, row)
        fix = fix_of_refusal(self._target, reason)
        return self._finding(rule, golden, reason, shape=cause_of(reason), fix=fix)

    def _finding(
        self, rule: str, golden: Transcript, found: str, detail: str = "", expected: str | None = None, **rest: Any
    ) -> Finding:
        if expected is None:
            expected = shown_pair("", golden.text)[1]
        return Finding(rule, f"{golden.case}: {found}", self._place, expected, detail, golden.row.to_jsonl(), **rest)

    def _different(self, rule: str, replayed: Replayed, judged: AnswerJudgement) -> Finding:
        text, expected = shown_pair(judged.text, judged.golden_text)
        found = f"answered {text}"
        lines = [*difference_text(judged), *(f"{check.name} failed: {check.reason}" for check in judged.broken_checks)]
        shape = ""
        if rule == "ML908":
            causes = self._model_causes(replayed.transcript)
            answer = answered(replayed.by_ids)
            if answer is not None and (limit := limit_of(replayed.transcript, answer)):
                causes = [(f"{limit[0].upper()}{limit[1:]}.", fix_of(self._target, "context"))]
            lines = [*([cause for cause, _ in causes] or [_OTHER_WEIGHTS]), *lines]
            fix = next((fix for _, fix in causes), "")
        elif changed := self._changed(replayed, judged):
            found, expected = f"the client gets {changed.found}", changed.expected
            lines, fix = self._causes.of_message(changed, replayed)
            shape = cause_of(lines[0])
        else:
            by_ids = self._judged(replayed.transcript, replayed.by_ids, by_messages=False)
            of = self._causes.of_hidden(replayed) if isinstance(by_ids, str) else None
            causes_of_prompt, fix = of or self._causes.of(replayed, judged.difference)
            if CONSTRAINED in causes_of_prompt and (marker := self._causes.refused_marker(judged.difference)):
                found += f", because the grammar refuses {marker}"
            lines, shape = [*causes_of_prompt, *lines], cause_of(" ".join(causes_of_prompt))
        rest = {"fix": fix, "shape": shape, "effect_of": _effect_of(rule, replayed)}
        return self._finding(rule, replayed.transcript, found, "\n".join(lines), expected, **rest)

    def _changed(self, replayed: Replayed, judged: AnswerJudgement) -> ChangedMessage | None:
        """Return how the message of an answer was changed whose ids are as recorded; None if the ids differ, too."""
        answer = answered(replayed.by_messages)
        if answer is None or (answer.ids is None and judged.difference is not None):
            return None
        is_right = judged.difference is None or self._passes(replayed.transcript, answer)
        return self._judge.changed_message(replayed.transcript, answer) if is_right else None

    def _model_causes(self, golden: Transcript) -> list[tuple[str, str]]:
        """Return the known properties of the served model that can change answers, with their fixes, likeliest first.

        The ids of the prompt were sent, so a template cannot be the cause.
        """
        target, found = self._target, []
        if self._has_default_grammar:
            found.append((_GRAMMAR, _GRAMMAR_FIX))
        facts, model = target.answers.facts, target.answers.model
        if facts.scales == () and golden.model["kind"] == "adapter":
            cause = "No adapter is loaded: the server lists none, and the transcripts are those of an adapter."
            found.append((cause, fix_of(target, "no-adapter")))
        if self._causes.is_pool:
            found.append((POOL, POOL_FIX))
        if model in facts.parents and golden.model["kind"] == "adapter":
            names = ", ".join(facts.adapters[:_SHOWN])
            cause = f"No adapter is asked: {model} is the parent of the adapters that the server lists: {names}."
            found.append((cause, "Ask for the adapter by its name: --model NAME."))
        applied = [name for name, scale in facts.scales or () if scale]
        if len(applied) > 1:
            cause = f"The server applies {len(applied)} adapters at once, whose changes add up: {', '.join(applied)}."
            found.append((cause, "Start the server with one adapter, or serve each under a name of its own."))
        scaled = [f"{name} the scale {scale:g}" for name, scale in facts.scales or () if scale != 1]
        if scaled:
            found.append((f"The server has given the adapter {', '.join(scaled)} (ML910).", fix_of(target, "scale")))
        precision, source = self._precision
        if precision.startswith("q") and not source.startswith("as recorded"):
            cause = f"The weights are served in {precision}, {source}, and were recorded in {golden.precision}: "
            cause += "the quantisation may be the whole cause."
            fix = "Serve the weights in the recorded precision to decide it, then convert or merge the adapter again."
            found.append((cause, with_file(target, fix)))
        return found

    @cached_property
    def _has_default_grammar(self) -> bool:
        """Whether the first answer to ids that differs is the recorded one without a grammar."""
        golden = next((one.transcript for one in self._target.replayed if self._differs_by_ids(one)), None)
        free = None if golden is None else answered(self._target.ids_without_grammar(golden))
        return golden is not None and free is not None and self._passes(golden, free)

    @cached_property
    def _causes(self) -> ChatCauses:
        margin = min(TOLERANCES[precision].margin for precision in (self._precision[0], _NOISE))
        return ChatCauses(self._target, self._passes, margin)

    def _passes(self, golden: Transcript, answer: ServedAnswer) -> bool:
        return judged_passes(self._judged(golden, answer, by_messages=False))

    def first_logprobs(self) -> Result:
        """ML905: a server that hides its ids gives the first token the log-probability of the right prompt."""
        if any(
            not isinstance(asked_row.served, InputError) and asked_row.served.ids
            for asked_row in self._target.answers.rows
        ):
            return Result(not_checked="the server shows the ids of its prompts, which prove more")
        precision, source = self._precision
        if precision != "fp32" or source.startswith("as recorded"):
            stated = f"{self._target.server.name}:fp32={self._target.url}"
            return Result(not_checked=f"weights are not known to be in full precision; if they are: {stated}")
        findings: list[Finding] = []
        seen = 0
        for replayed in self._target.replayed:
            answer, golden = answered(replayed.by_messages), replayed.transcript
            first = self._text(golden.completion_ids[0])
            # a control token has no text, and servers name it differently
            if not (answer and answer.first and first):
                continue
            seen += 1
            logprob, served = golden.logprobs[0], answer.first
            recorded = {self._text(golden.runner_up_ids[0]): logprob - golden.margins[0], first: logprob}
            apart = {text: abs(served[text] - value) for text, value in recorded.items() if text and text in served}
            if not apart or max(apart.values()) > FINGERPRINT:
                text = max(apart, key=lambda case: apart[case]) if apart else first
                found = f"{served[text]:.4f}" if apart else "not among the best"
                words = f"the first token {text!r} has the log-probability {found}, and not {recorded[text]:.4f}"
                findings.append(self._finding("ML905", golden, words))
        if not seen:
            return Result(not_checked="the server shows no log-probabilities")
        text = f"those of the right prompt in {seen - len(findings)} of {seen}"
        findings = first_of_each_cause(findings, _SHOWN, self._place)
        return Result(tuple(findings), facts=(("first log-probabilities of", text),))

    def _text(self, token: int) -> str:
        """Return the text of a token without white space around it; empty for a control token."""
        oracle = self._target.oracle
        return "" if token in oracle.control_tokens else oracle.decode([token]).strip()

    def applied(self) -> Result:
        """ML910: the answers come from the adapter, not just from the base."""
        scales = self._target.answers.facts.scales
        wrong = [(name, scale) for name, scale in scales or () if scale != 1]
        findings = [
            Finding("ML910", f"the adapter {name} has the scale {scale:g}", self._place, "1") for name, scale in wrong
        ]
        pairs = [(answered(replayed.by_ids), answered(replayed.base)) for replayed in self._target.replayed]
        both_answered = [(adapted, base) for adapted, base in pairs if adapted and base]
        if not both_answered:
            reason = "the server has no adapter to leave out, as if it served a merged model: see the check `by-ids`"
            failed = next((reason for one in self._target.replayed if (reason := no_answer(one.base))), "")
            reason = f"the base was not answered: {failed}" if failed else reason
            return Result(tuple(findings), "" if findings else reason)
        same = 0
        for adapted, base in both_answered:
            if adapted.ids == base.ids:
                both = () if self._target.drafts else zip(adapted.logprobs, base.logprobs, strict=False)
                same += all(abs(a - b) <= _SAME for a, b in both if isfinite(a) and isfinite(b))
        if same == len(both_answered) and self._target.drafts:
            return Result(tuple(findings), "" if findings else f"the base gives the same ids, and {_DRAFTED}")
        if same == len(both_answered):
            found = (
                f"{len(both_answered)} of {len(both_answered)} prompts are answered as by the base without an adapter"
            )
            findings.append(Finding("ML910", found, self._place, "the answers of the adapter"))
        facts = (("adapter of", f"it changes {len(both_answered) - same} of {len(both_answered)} answers of the base"),)
        return Result(tuple(findings), facts=facts)

    def _changed_defaults(self) -> Iterator[Finding]:
        """Yield ML911 if a default that the server shows changes each greedy answer, or ends it."""
        facts = self._target.answers.facts
        shown = ", ".join(f"{name} {value}" for name, value in facts.defaults if name in facts.changed)
        if shown:
            found = f"a request that does not name them gets {shown}, at temperature 0, too"
            yield Finding("ML911", found, self._place, "defaults that leave a greedy answer as it is", shape="defaults")

    def greedy(self) -> Result:
        """ML911: a greedy answer repeats, and the server's defaults do not change it."""
        answers = [(replayed, answered(replayed.by_messages)) for replayed in self._target.replayed if replayed.again]
        repeated = [(replayed, answer) for replayed, answer in answers if answer]
        findings = [*self._changed_defaults()]
        if not repeated:
            missing = "no messages were answered: see the check `by-messages`"
            return Result(tuple(findings), "" if findings else missing)
        if self._lacks_tolerance:
            return Result(tuple(findings), "" if findings else self._lacks_tolerance)
        for replayed, answer in repeated:
            if self._differs_by_ids(replayed) or self._causes.has_other_prompt(replayed):
                continue  # the cause is that of ML908, or of ML902 and ML903
            asked = {
                "asked twice": replayed.again,
                "asked with the temperature 0 alone": replayed.plain,
                "asked without a limit of tokens": replayed.unlimited,
            }
            for how, other in asked.items():
                judged, given = self._judged(replayed.transcript, other, by_messages=True), answered(other)
                if given is None:
                    if isinstance(judged, str) and other is not None and not _shared(other):
                        findings.append(self._unjudged("ML911", replayed.transcript, other, f"{how}: {judged}"))
                    continue
                if self._causes.is_same(given, answer):
                    continue
                if isinstance(judged, AnswerJudgement) and judged.passed:
                    continue  # another token at a near tie
                text, expected = shown_pair(given.text or call_text(given), answer.text or call_text(answer))
                found = f"{replayed.transcript.case}: {how}, it answers {text}"
                row = replayed.transcript.row.to_jsonl()
                fix, detail = (RANDOM_FIX if other is replayed.again else ""), ""
                if self._causes.is_pool:
                    fix, detail = POOL_FIX, POOL
                if other is replayed.unlimited and not given.ended:
                    fix = fix_of(self._target, "default-limit")
                findings.append(Finding("ML911", found, self._place, expected, detail, row, fix=fix))
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)))


def _effect_of(rule: str, replayed: Replayed) -> str:
    """Return the rule whose finding explains one of an answer to messages: that of prompts, if the prompt is another.

    Beside a finding of that rule it is only counted.
    """
    return "ML902" if rule == "ML909" and shows_other_prompt(replayed) else ""


def _reason(outcome: Outcome) -> str:
    """Return why a request has no answer, without what is of this request alone."""
    return cause_of(outcome.found if isinstance(outcome, InputError) else no_answer(outcome))


def _shared(outcome: Outcome) -> bool:
    """Whether an outcome says nothing of what was asked: it would be the same for any request."""
    return isinstance(outcome, NoAnswerError) or is_about_context(no_answer(outcome))
