"""Golden transcripts replayed through a server: its numbers, its prompts, its adapter and its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from math import isfinite
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.conformance.finding import Finding, Result, first_of_each_cause
from pytest_mistral_lora.conformance.server.answer import AnswerJudge, call_text, moved_logprobs
from pytest_mistral_lora.conformance.server.failures import answered, cause_of, failure_finding, no_answer
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.judgement import TOLERANCES, AnswerJudgement, difference_text
from pytest_mistral_lora.records.transcripts import Transcript

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.replay import Outcome, Replayed

RIGHT_MODEL = "By ids exact, by chat different: the model and adapter are right, the prompt is not."

RIGHT_PROMPT = "By ids exact, by chat different, and the prompt is right"

CONSTRAINED = (
    f"{RIGHT_PROMPT}: without its grammar the server answers as recorded, so the grammar constrains the answer."
)

_CONSTRAINED_FIX = (
    "Compare the answer with the schema of its tool: the grammar of a server may fix the order of keys, and refuse "
    "those that the schema does not name. docs/serving.md lists what grammars change. The prompt needs no change."
)

MISREAD = f"{RIGHT_PROMPT}: the model says the recorded ids, and the server reads other calls in them."

_ASK_ITSELF = (
    "If a proxy or a gateway is in front of the server, ask the server itself, to see which of the two does it."
)

_CHANGED_FIX = f"Find what changes the messages of a chat, such as a system prompt by default. {_ASK_ITSELF}"

_SETTINGS_FIX = (
    f"Look for a setting that each chat request gets: a temperature, a penalty, a stop string. {_ASK_ITSELF}"
)

_FIXES = {
    "misread": "Start the server with its parser of Mistral's tool calls.",
    "limit": "Raise the limit, such as the context of the server.",
    "no-adapter": "Start the server with the adapter, or serve the merged model.",
}
"""The fix of a cause, by its name; a kind of server may have one in its own options: `Server.fixes("causes")`."""

_UNREAD = "tool calls are compared by their ids alone, since the server left them in the text"

FINGERPRINT = 0.03
"""Largest difference of a first log-probability in full precision, in nats. Noise was 0.007 at most (with a cache in
float16), and one BOS or one space too many moved it by 0.071 at least."""

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
            "by-ids": partial(self.answers, "ML908", lambda replayed: replayed.by_ids),
            "by-messages": partial(self.answers, "ML909", lambda replayed: replayed.by_messages),
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

    @property
    def _lacks_tolerance(self) -> str:
        """Why answers that differ cannot be judged; empty if the tolerance of the served weights is known."""
        precision, _ = self._precision
        if precision in TOLERANCES:
            return ""
        stated = f"{self._target.server.name}:q4={self._target.url}"
        return f"no tolerance is known for weights in {precision}; to use another's: {stated}"

    def answers(self, rule: str, of: Callable[[Replayed], Outcome]) -> Result:
        """ML908 and ML909: the server answers the recorded ids of a prompt, and the messages, as recorded."""
        if rule == "ML908" and all(replayed.by_ids is None for replayed in self._target.replayed):
            return Result(not_checked=f"{self._target.server.title} is not asked by ids")
        if self._lacks_tolerance:
            return Result(not_checked=self._lacks_tolerance)
        precision, source = self._precision
        findings, tiers, moved, repeated = [], [], 0.0, 0
        for replayed in self._target.replayed:
            judged = self._judged(replayed.transcript, of(replayed), by_messages=rule == "ML909")
            if isinstance(judged, str):
                findings.append(self._unjudged(rule, replayed.transcript, of(replayed), judged))
                continue
            tiers.append(judged.tier)
            answer = answered(of(replayed))
            moved = max([moved, *(moved_logprobs(replayed.transcript, answer) if answer else [])])
            if judged.passed:
                continue
            if rule == "ML909" and self._differs_by_ids(replayed):
                repeated += 1
            else:
                findings.append(self._different(rule, replayed, judged))
        counts = ", ".join(f"{tiers.count(tier)} {tier}" for tier in dict.fromkeys(tiers)) or "0"
        text = f"{counts} of {len(self._target.replayed)}; {precision}, {source}"
        text += f"; log-probabilities moved by {moved:.2g} nats at most" if moved else ""
        text += f". {RIGHT_MODEL}" if any(RIGHT_MODEL in finding.detail for finding in findings) else ""
        name = "answers by ids of" if rule == "ML908" else "answers by messages of"
        left_out = [f"same cause as ML908: {repeated} of {len(self._target.replayed)} differ by ids already"] * (
            repeated > 0
        )
        left_out += [f"{_UNREAD}. {self._fix('misread')}"] * (rule == "ML909" and self._leaves_calls)
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)), "; ".join(left_out), ((name, text),))

    @property
    def _leaves_calls(self) -> bool:
        """Whether the server left a recorded call in the text, as one that was started without a parser of calls."""
        call = self._target.oracle.tool_calls_id
        pairs = [(replayed.transcript, answered(replayed.by_messages)) for replayed in self._target.replayed]
        return any(call in golden.completion_ids and answer and not answer.calls_read for golden, answer in pairs)

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
            judge = AnswerJudge(self._target.oracle, self._precision[0])
            return judge.judge(golden, answer, by_messages=by_messages)
        except InputError as error:
            return error.found

    def _unjudged(self, rule: str, golden: Transcript, outcome: Outcome, reason: str) -> Finding:
        if outcome is not None and not isinstance(outcome, InputError) and outcome.failed:
            return failure_finding(golden.case, outcome.failed, self._place, golden.row.to_jsonl())
        return replace(self._finding(rule, golden, reason), shape=cause_of(reason))

    def _finding(self, rule: str, golden: Transcript, found: str, detail: str = "") -> Finding:
        return Finding(rule, f"{golden.case}: {found}", self._place, repr(golden.text), detail, golden.row.to_jsonl())

    def _different(self, rule: str, replayed: Replayed, judged: AnswerJudgement) -> Finding:
        lines = [*difference_text(judged), *(f"{check.name} failed: {check.reason}" for check in judged.broken_checks)]
        if rule == "ML908":
            causes = self._model_causes(replayed.transcript)
            lines = [*(cause for cause, _ in causes), *lines]
            fix = next((fix for _, fix in causes), "")
        else:
            causes_of_prompt, fix = self._prompt_causes(replayed, judged)
            lines = [*causes_of_prompt, *lines]
        return replace(self._finding(rule, replayed.transcript, f"answered {judged.text!r}", "\n".join(lines)), fix=fix)

    def _fix(self, cause: str) -> str:
        """Return the fix of a cause, in the options of this kind of server if it has words for it."""
        return self._target.server.fixes("causes").get(cause, _FIXES[cause])

    def _model_causes(self, golden: Transcript) -> list[tuple[str, str]]:
        """Return the known properties of the served model that can change answers, with their fixes, likeliest first.

        The ids of the prompt were sent, so a template cannot be the cause.
        """
        target, found = self._target, []
        facts, model = target.answers.facts, target.answers.model
        if facts.scales == () and golden.model["kind"] == "adapter":
            cause = "No adapter is loaded: the server lists none, and the transcripts are those of an adapter."
            found.append((cause, self._fix("no-adapter")))
        if model in facts.parents and golden.model["kind"] == "adapter":
            names = ", ".join(facts.adapters[:_SHOWN])
            cause = f"No adapter is asked: {model} is the parent of the adapters that the server lists: {names}."
            found.append((cause, "Ask for the adapter by its name: --model NAME."))
        precision, source = self._precision
        if precision.startswith("q") and not source.startswith("as recorded"):
            cause = f"The weights are served in {precision}, {source}, and were recorded in {golden.precision}: "
            cause += "the quantisation may be the whole cause."
            fix = "Serve the weights in the recorded precision to decide it, then convert or merge the adapter again."
            found.append((cause, fix))
        return found

    def _prompt_causes(self, replayed: Replayed, judged: AnswerJudgement) -> tuple[list[str], str]:
        """Return the known causes of a different answer to messages, and the fix if it is not that of the rule."""
        by_ids = self._judged(replayed.transcript, replayed.by_ids, by_messages=False)
        if isinstance(by_ids, str):
            return [], ""
        # the answer to the prompt's ids is as recorded: the cause is the prompt, the server, or what stands between
        prompt, recorded, answer = replayed.prompt, replayed.transcript.prompt_ids, answered(replayed.by_messages)
        ids = None if prompt is None or isinstance(prompt, InputError) else prompt.ids
        if ids is not None and ids != recorded:
            counts = f"{len(recorded)} tokens recorded, {len(ids)} served"
            return [RIGHT_MODEL, f"prompt: {counts}; the first other: token {equal_beginning(ids, recorded)}"], ""
        fed = None if answer is None else answer.prompt_count
        if fed is not None and fed != len(recorded):
            return [RIGHT_MODEL, f"prompt: {len(recorded)} tokens recorded, {fed} fed to the chat"], _CHANGED_FIX
        if ids is None or answer is None:
            return [RIGHT_MODEL], ""
        cause, fix = self._chat_cause(replayed, answer, judged)
        return [cause], fix

    def _chat_cause(self, replayed: Replayed, answer: ServedAnswer, judged: AnswerJudgement) -> tuple[str, str]:
        """Return the cause of an answer that differs only if it is asked by a chat with the right prompt, and the fix.

        A grammar is the cause only if the same request without the grammar is answered as recorded.
        """
        golden = replayed.transcript
        if judged.difference is None:
            return MISREAD, self._fix("misread")
        length = answer.count if answer.ids is None else len(answer.ids)
        if not answer.ended and length is not None and length < golden.max_new_tokens:
            found = (
                f"a limit ends the answer after {counted(length, 'token')}, and {golden.max_new_tokens} were asked for"
            )
            return f"{RIGHT_PROMPT}: {found}.", f"{self._fix('limit')} {_ASK_ITSELF}"
        if self._is_random:
            return f"{RIGHT_PROMPT}: two answers to one request differ, so they are not greedy (ML911).", _SETTINGS_FIX
        free = answered(self._target.answer_without_grammar(golden))
        if free is not None and self._passes(golden, free):
            return CONSTRAINED, _CONSTRAINED_FIX
        if answer.ended and self._is_beginning(golden, answer):
            return f"{RIGHT_PROMPT}: the answer ends early, as at a stop string.", _SETTINGS_FIX
        return f"{RIGHT_PROMPT}: the chat changes the answer, and the model does not.", _SETTINGS_FIX

    @cached_property
    def _is_random(self) -> bool:
        """Whether an answer to messages differs from that to the same request again."""
        pairs = [(answered(replayed.by_messages), answered(replayed.again)) for replayed in self._target.replayed]
        return any(first and second and not _same_answer(first, second) for first, second in pairs)

    def _passes(self, golden: Transcript, answer: ServedAnswer) -> bool:
        judged = self._judged(golden, answer, by_messages=False)
        return isinstance(judged, AnswerJudgement) and judged.passed

    def _is_beginning(self, golden: Transcript, answer: ServedAnswer) -> bool:
        """Whether an answer has the first tokens of the recorded one, or the first letters if its ids are hidden."""
        eos = self._target.oracle.eos_id
        ids = [token for token in answer.ids or () if token != eos]
        recorded = [token for token in golden.completion_ids if token != eos]
        if answer.ids is None:
            return golden.text.startswith(answer.text)
        return recorded[: len(ids)] == ids

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
            return Result(tuple(findings), "" if findings else reason)
        same = 0
        for adapted, base in both_answered:
            if adapted.ids == base.ids:
                both = zip(adapted.logprobs, base.logprobs, strict=False)
                same += all(abs(a - b) <= _SAME for a, b in both if isfinite(a) and isfinite(b))
        if same == len(both_answered):
            found = (
                f"{len(both_answered)} of {len(both_answered)} prompts are answered as by the base without an adapter"
            )
            findings.append(Finding("ML910", found, self._place, "the answers of the adapter"))
        facts = (("adapter of", f"it changes {len(both_answered) - same} of {len(both_answered)} answers of the base"),)
        return Result(tuple(findings), facts=facts)

    def greedy(self) -> Result:
        """ML911: a greedy answer repeats, and the server's defaults do not change it."""
        answers = [(replayed, answered(replayed.by_messages)) for replayed in self._target.replayed if replayed.again]
        repeated = [(replayed, answer) for replayed, answer in answers if answer]
        if not repeated:
            return Result(not_checked="no messages were answered: see the check `by-messages`")
        if self._lacks_tolerance:
            return Result(not_checked=self._lacks_tolerance)
        findings: list[Finding] = []
        for replayed, answer in repeated:
            for other, how in ((replayed.again, "asked twice"), (replayed.plain, "asked with the temperature 0 alone")):
                judged, given = self._judged(replayed.transcript, other, by_messages=True), answered(other)
                if given is None:
                    if isinstance(judged, str) and other is not None:
                        findings.append(self._unjudged("ML911", replayed.transcript, other, f"{how}: {judged}"))
                    continue
                if _same_answer(given, answer):
                    continue
                if isinstance(judged, AnswerJudgement) and judged.passed:
                    continue  # another token at a near tie
                expected, text = (repr(side.text) if side.text else call_text(side) for side in (answer, given))
                found = f"{replayed.transcript.case}: {how}, it answers {text}"
                row = replayed.transcript.row.to_jsonl()
                findings.append(Finding("ML911", found, self._place, expected, row=row))
        return Result(tuple(first_of_each_cause(findings, _SHOWN, self._place)))


def _same_answer(first: ServedAnswer, second: ServedAnswer) -> bool:
    return (first.text, first.calls, first.ids) == (second.text, second.calls, second.ids)
