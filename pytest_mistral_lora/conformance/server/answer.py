"""The judgement of a served answer by a golden transcript: by ids, by tool calls, or by text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.completions import AnswerToCheck, MalformedCallError, read_calls
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.answer.comparison import served_calls, told_apart
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.judgement import (
    AnswerJudgement,
    FirstDifference,
    TokenCandidate,
    answer_tier,
    first_difference,
    judged_formats,
    widest_tolerance,
)
from pytest_mistral_lora.records.transcripts import Transcript

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer, ServedCall

_SHOWN = 24
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class ChangedMessage:
    """A served message that no sound parser makes of the ids that the model said.

    Attributes:
        found: The message that the client gets, from near its first difference on.
        expected: The message that a parser makes of the ids, in the same form.
        cut: The text that is missing, if the client gets only the beginning; else empty.
        has_other_calls: Whether the calls differ, and not only the text.
        leaves_calls: Whether the calls are in the text.
        spells: The control token that the letters of the answer spell first; empty if they spell none.
    """

    found: str
    expected: str
    cut: str
    has_other_calls: bool
    leaves_calls: bool
    spells: str


@dataclass(frozen=True, slots=True)
class AnswerJudge:
    """Judges the answers of one server.

    Attributes:
        oracle: The tokenizer that reads them.
        precision: The precision of the served weights, a key of `TOLERANCES`.
        knows_logprobs: Whether the server gives each token its log-probability; else ids alone are judged.
    """

    oracle: Oracle
    precision: str
    knows_logprobs: bool = True

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
        changed = self.changed_message(golden, answer) if by_messages else None
        if ids is not None:
            difference = first_difference(golden, ids, self.oracle.piece)
        elif by_messages and changed is None and self._said(golden.completion_ids) is not None:
            difference = None
        else:
            difference = self._text_difference(golden, self._text(answer))
        moved = moved_logprobs(golden, answer) if self.knows_logprobs else []
        apart = sum(moved) / len(moved) if moved else None
        tier = answer_tier(difference, apart, widest_tolerance(self.precision, golden.precision))
        if changed and (tier == "exact" or ids is not None):
            tier = "different"
        text = call_text(answer) or self._text(answer) if ids is None else self.oracle.decode(ids)
        stop = "eos" if answer.ended else "length"
        checked = AnswerToCheck(ids or (), text, stop, golden.row.tools or (), self.oracle)
        return AnswerJudgement(
            case=golden.case,
            tier=tier,
            text=text,
            golden_text=golden.text,
            logprob_difference=apart,
            difference=difference,
            **({"checks": (), "broken_checks": ()} if ids is None else judged_formats(golden, checked)),
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

    def changed_message(self, golden: Transcript, answer: ServedAnswer) -> ChangedMessage | None:
        """Return how a served message differs from each that a sound parser makes of the ids; None if it does not.

        The ids are those of the answer, or the recorded ones if the server hides them. A parser takes calls and
        thoughts out of the text, or leaves them in it with or without their markers; white space at the ends of a text
        is not compared, and neither are the ids of calls, which many servers make themselves.

        Raises:
            InputError: If an id of the answer is not in the tokenizer.
        """
        from pytest_mistral_lora.serving.answers import ServedAnswer

        ids = self.whole_ids(golden, answer)
        said = self._said(golden.completion_ids if ids is None else ids)
        if said is None or self._is_sound(said, answer, leaves_calls=False):
            return None
        leaves_calls = bool(said.calls) and self._is_sound(said, answer, leaves_calls=True)
        if leaves_calls and not answer.calls_read:
            return None
        text = self._text_of([part for part in said.parts if part.kind == "text"])
        thinking = self._text_of(said.thoughts) if answer.thinking else ""
        message = ServedAnswer(text, calls=said.calls, thinking=thinking, finish_reason=answer.finish_reason)
        has_other_calls = served_calls(answer) != served_calls(message)
        arrived = answer.text.strip()
        is_cut = bool(arrived) and not has_other_calls and text.strip().startswith(arrived)
        cut = text.strip()[len(arrived) :] if is_cut else ""
        letters = self._text_of(said.parts)
        spells = next((marker for marker in self.oracle.control_tokens.values() if marker in letters), "")
        return ChangedMessage(*told_apart(answer, message), cut, has_other_calls, leaves_calls, spells)

    def _said(self, ids: Sequence[int]) -> _Said | None:
        """Return the parts of an answer, and its calls; None if parsers make different messages of the ids.

        They do of calls that are none, and of bytes that are no character, such as those before a limit.
        """
        from pytest_mistral_lora.serving.answers import ServedCall

        parts = self._parts(ids)
        try:
            calls = [call for part in parts if part.kind == "calls" for call in read_calls(part.ids, self.oracle)]
        except MalformedCallError:
            return None
        if any(_UNREADABLE in self.oracle.decode(part.ids) for part in parts):
            return None
        of_calls = (ServedCall(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls)
        return _Said(parts, tuple(of_calls))

    def _parts(self, ids: Sequence[int]) -> list[_SaidPart]:
        """Return the texts, the thoughts and the calls of an answer, in order: all from the first call on is calls."""
        oracle, parts = self.oracle, [_SaidPart("text")]
        opens, closes = (oracle.control_ids.get(marker) for marker in (THINKING.opens, THINKING.closes))
        for token in ids:
            if token == oracle.eos_id:
                continue
            if parts[-1].kind != "calls" and token in (oracle.tool_calls_id, opens):
                parts.append(_SaidPart("thought" if token == opens else "calls"))
            parts[-1].ids.append(token)
            if parts[-1].kind == "thought" and token == closes:
                parts.append(_SaidPart("text"))
        return parts

    def _is_sound(self, said: _Said, answer: ServedAnswer, *, leaves_calls: bool) -> bool:
        """Return whether a message is an answer in one of the forms of a parser, with its calls in the text or not.

        The first thoughts are taken out of the text, and may be kept from the client; what is left in it has its
        markers, or has them not.
        """
        from pytest_mistral_lora.serving.answers import ServedAnswer
        from pytest_mistral_lora.serving.server import spelled_text

        if served_calls(answer) != served_calls(ServedAnswer(calls=() if leaves_calls else said.calls)):
            return False
        for taken in range(len(said.thoughts) + 1):
            thoughts = said.thoughts[:taken]
            if answer.thinking and _letters(answer.thinking) != _letters(self._text_of(thoughts)):
                continue
            left = [part for part in said.parts if part not in thoughts and (leaves_calls or part.kind != "calls")]
            is_text = sum(bool(part.ids) for part in left) <= 1
            for text in (self._text_of(left), "".join(spelled_text(part.ids, self.oracle) for part in left)):
                # servers put spaces around markers, and strip each text between them
                if text.strip() == answer.text.strip() or (not is_text and _letters(text) == _letters(answer.text)):
                    return True
        return False

    def _text_of(self, parts: Sequence[_SaidPart]) -> str:
        return "".join(self.oracle.decode(part.ids) for part in parts)

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


@dataclass(slots=True, eq=False)
class _SaidPart:
    """Ids of an answer: of a text, of a thought, or of its calls, each with its markers."""

    kind: Literal["text", "thought", "calls"]
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Said:
    """The parts of an answer, and the calls in them."""

    parts: Sequence[_SaidPart]
    calls: tuple[ServedCall, ...]

    @property
    def thoughts(self) -> list[_SaidPart]:
        return [part for part in self.parts if part.kind == "thought"]


def _letters(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def call_text(answer: ServedAnswer) -> str:
    """Return the tool calls of an answer as text; empty if it has none."""
    return ", ".join(f"{call.name}({call.arguments})" for call in answer.calls)
