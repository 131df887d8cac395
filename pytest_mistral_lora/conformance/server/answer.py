"""The judgement of a served answer by a golden transcript: by ids, by tool calls, or by text."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.completions import AnswerToCheck, MalformedCallError, read_calls
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.judgement import (
    AnswerJudgement,
    FirstDifference,
    TokenCandidate,
    answer_tier,
    first_difference,
    lost_formats,
    widest_tolerance,
)
from pytest_mistral_lora.records.transcripts import Transcript

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer

_SHOWN = 24


@dataclass(frozen=True, slots=True)
class AnswerJudge:
    """Judges the answers of one server.

    Attributes:
        oracle: The tokenizer that reads them.
        precision: The precision of the served weights, a key of `TOLERANCES`.
    """

    oracle: Oracle
    precision: str

    def judge(self, golden: Transcript, answer: ServedAnswer, *, by_messages: bool) -> AnswerJudgement:
        """Return the tier of an answer.

        Args:
            golden: The recorded answer.
            answer: The served one.
            by_messages: Whether messages were sent, so that the server has read the tool calls of the answer.

        Raises:
            InputError: If an id of the answer is not in the tokenizer.
        """
        ids = self.whole_ids(golden, answer)
        calls = self._calls_fault(golden, answer) if by_messages else ""
        if ids is not None:
            difference = first_difference(golden, ids, self.oracle.piece)
        elif answer.calls and not calls:
            difference = None
        else:
            difference = self._text_difference(golden, self._text(answer))
        moved = moved_logprobs(golden, answer)
        apart = sum(moved) / len(moved) if moved else None
        tier = answer_tier(difference, apart, widest_tolerance(self.precision, golden.precision))
        if calls and tier == "exact":
            tier = "different"
        text = self._text(answer) if ids is None else self.oracle.decode(ids)
        stop = "eos" if answer.ended else "length"
        checked = AnswerToCheck(ids or (), text, stop, golden.row.tools or (), self.oracle)
        return AnswerJudgement(
            case=golden.case,
            tier=tier,
            text=calls or text,
            golden_text=golden.text,
            logprob_difference=apart,
            difference=difference,
            broken_checks=() if ids is None else lost_formats(golden, checked),
        )

    def whole_ids(self, golden: Transcript, answer: ServedAnswer) -> tuple[int, ...] | None:
        """Return the ids of an answer with its closing EOS, which servers leave out; None if they are hidden.

        Raises:
            InputError: If an id is not in the tokenizer.
        """
        ids, eos = answer.ids, self.oracle.eos_id
        wrong = next((token for token in ids or () if not 0 <= token < self.oracle.vocab_size), None)
        if wrong is not None:
            raise InputError(f"answered with the id {wrong}, of a vocabulary of {self.oracle.vocab_size}")
        if ids is None or not answer.ended or ids[-1:] == (eos,):
            return ids
        return (*ids, eos)

    def _calls_fault(self, golden: Transcript, answer: ServedAnswer) -> str:
        """Return how the tool calls that a server read differ from the recorded ones; empty if they do not.

        The ids of calls are not compared: many servers make their own.
        """
        from pytest_mistral_lora.serving.server import parsed

        try:
            recorded = [(call.name, call.arguments) for call in read_calls(golden.completion_ids, self.oracle)]
        except MalformedCallError:
            recorded = []
        served = [(call.name, parsed(call.arguments)) for call in answer.calls]
        if recorded == served or (not served and not answer.calls_read):
            return ""
        if not served:
            return f"the tool call came as text: {self._text(answer)[:_SHOWN]!r}"
        return f"the tool call {call_text(answer)}"

    def _text(self, answer: ServedAnswer) -> str:
        # servers keep the space of the first SentencePiece token, and mistral-common does not
        return answer.text.removeprefix(" ") if self.oracle.kind == "spm" else answer.text

    def _text_difference(self, golden: Transcript, text: str) -> FirstDifference | None:
        """Return the first token of a transcript that a text does not spell; None if it spells all tokens."""
        if text == golden.text:
            return None
        ids, known = golden.completion_ids, ""
        for index in range(len(ids)):
            # a token may end within a character
            spelled = self.oracle.decode(ids[: index + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
            if not text.startswith(spelled):
                break
            known = spelled
        rest = text[len(known) :][:_SHOWN] or "the end"
        golden_token = TokenCandidate(ids[index], self.oracle.piece(ids[index]), None)
        return FirstDifference(index, golden_token, TokenCandidate(None, repr(rest), None), golden.margins[index])


def moved_logprobs(golden: Transcript, answer: ServedAnswer) -> list[float]:
    """Return the differences of log-probabilities up to the first different token, in nats; empty if unknown.

    Tokens whose ids are hidden are compared if the server lists as many, and the text is the recorded one.
    """
    if answer.ids is None:
        listed, recorded_count = answer.steps, len(golden.completion_ids)
        # the closing EOS, which a server may leave out
        if answer.text.strip() != golden.text.strip() or recorded_count - len(listed) not in (0, 1) or answer.calls:
            return []
        # and tokens that end within a character
        if any(step.id is not None for step in listed):
            is_whole = [step.id for step in listed] == list(golden.completion_ids[: len(listed)])
        else:
            is_whole = "".join("".join(step.text.split()) for step in listed) == "".join(answer.text.split())
        if not is_whole:
            return []
        pairs = zip(listed, golden.logprobs, strict=False)
        return [abs(step.logprob - before) for step, before in pairs if isfinite(step.logprob)]
    apart = []
    tokens = zip(answer.ids, golden.completion_ids, answer.logprobs, golden.logprobs, strict=False)
    for token, recorded, logprob, before in tokens:
        if token != recorded:
            break
        if isfinite(logprob):
            apart.append(abs(logprob - before))
    return apart


def call_text(answer: ServedAnswer) -> str:
    """Return the tool calls of an answer as text; empty if it has none."""
    return ", ".join(f"{call.name}({call.arguments})" for call in answer.calls)
