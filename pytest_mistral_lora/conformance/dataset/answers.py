"""The answers that a row is trained on, as they are decoded: by mistral-common's decoder, and under its grammar."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.answer_message import AnswerChunk, AnswerMessage, canonical_json
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.mask.row_laws import as_decoded, encoded_groups
from pytest_mistral_lora.errors import LibraryError, counted, shortened
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.completions import GeneratedCall
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.oracle.answer_decoder import AnswerDecoder
    from pytest_mistral_lora.chat.oracle.answer_grammar import AnswerGrammar, RefusedToken

_UNREADABLE = frozenset({"ML619"})
"""Rules of calls whose arguments are no object: what a decoder makes of them says nothing more."""
_UNFIT = frozenset({"ML618", "ML619", "ML622", "ML623", "ML643"})
"""Rules of calls that do not fit their tools, and of answers that break their schema: a grammar says nothing more."""
CALL_ID = "[CALL_ID]"
"""The control token in front of the id of a call."""


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """The verdict on the answers of a row.

    Attributes:
        findings: The broken rules.
        lost: The characters of answers that are not encoded, with their places in the row; empty if all are.
        no_decoder: Why the answers were not read back; empty if they were.
        has_grammar: Whether the request of the row has a grammar.
        no_grammar: Why the grammar did not judge the answers; empty if it did, or if there is none to ask.
        refuses_call_ids: Whether the grammar refuses the ids of calls that mistral-common itself encodes.
    """

    findings: tuple[Finding, ...] = ()
    lost: str = ""
    no_decoder: str = ""
    has_grammar: bool = False
    no_grammar: str = ""
    refuses_call_ids: bool = False


@dataclass(frozen=True, slots=True)
class _TrainedAnswer:
    """A turn of the assistant that is trained on.

    Attributes:
        row: Its row.
        index: The index of its last message.
        ids: Its ids, with the closing EOS.
        message: The row's message.
    """

    row: Row
    index: int
    ids: tuple[int, ...]
    message: AnswerMessage

    @property
    def place(self) -> Place:
        """The place of its last message."""
        return self.row.place.within("messages", self.index)

    @property
    def is_text(self) -> bool:
        """Whether it is one text, without thoughts and calls."""
        return not self.message.calls and [chunk.is_thinking for chunk in self.message.chunks] == [False]


class DecodingJudge:
    """Judges the answers of rows by one tokenizer."""

    def __init__(self, oracle: Oracle) -> None:
        """Prepare the judge; what takes long is made for the first row that needs it."""
        from pytest_mistral_lora.chat.oracle.answer_decoder import AnswerDecoder

        self._oracle = oracle
        self._decoder: AnswerDecoder | None = None
        self._no_decoder = ""
        try:
            self._decoder = AnswerDecoder(oracle)
        except LibraryError as error:
            self._no_decoder = str(error)

    @cached_property
    def _grammar(self) -> AnswerGrammar | str:
        """The grammars of the tokenizer, or why there are none."""
        from pytest_mistral_lora.chat.oracle.answer_grammar import AnswerGrammar

        if why := AnswerGrammar.unavailable(self._oracle):
            return why
        try:
            return AnswerGrammar(self._oracle)
        except LibraryError as error:
            return str(error)

    def judge(self, row: Row, encoded: EncodedRow, broken: Collection[str] = ()) -> JudgedAnswers:
        """Return the verdict on the answers that a row is trained on.

        Args:
            row: The row.
            encoded: mistral-common's encoding of it.
            broken: Rules of `tool-calls-fit-the-tools` that the row breaks.
        """
        findings: list[Finding] = []
        lost: list[str] = []
        spoken: list[_TrainedAnswer] = []
        for answer in _trained_answers(row, encoded, self._oracle):
            thoughts = list(_thought_faults(answer.message))
            if thoughts:
                expected = "one thought first, then a text or a call"
                findings.append(Finding("ML650", "; ".join(thoughts), answer.place, expected))
                continue
            if not _UNREADABLE.intersection(broken):
                findings += self._read_back(answer, lost)
            spoken.append(answer)
        read = JudgedAnswers(tuple(findings), "; ".join(lost), self._no_decoder)
        has_grammar = bool(row.tools) or (row.response_format or {}).get("type", "text") != "text"
        if not has_grammar or _UNFIT.intersection(broken):
            return read
        read = replace(read, has_grammar=True)
        if isinstance(self._grammar, str):
            return replace(read, no_grammar=self._grammar)
        try:
            return self._judge_by_grammar(self._grammar, row, spoken, read)
        except LibraryError as error:
            return replace(read, no_grammar=error.found)

    def _judge_by_grammar(
        self, grammar: AnswerGrammar, row: Row, spoken: Sequence[_TrainedAnswer], read: JudgedAnswers
    ) -> JudgedAnswers:
        """Return a verdict with that of a grammar.

        Raises:
            LibraryError: As for `AnswerGrammar.refused`.
        """
        findings = list(read.findings)
        refuses_call_ids = False
        for answer in spoken:
            refused = grammar.refused(row, answer.ids)
            if refused and refused.found == CALL_ID:
                # a fault of the grammar, not of the row: judge what is left
                refuses_call_ids = True
                refused = grammar.refused(row, self._without_call_ids(answer.ids))
            if refused:
                findings.append(_refusal(refused, answer.place))
        return replace(read, findings=tuple(findings), refuses_call_ids=refuses_call_ids)

    def _without_call_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of an answer without each `[CALL_ID]` and the text behind it."""
        kept: list[int] = []
        is_call_id = False
        for token in ids:
            if token in self._oracle.control_tokens:
                is_call_id = self._oracle.control_tokens[token] == CALL_ID
            if not is_call_id:
                kept.append(token)
        return kept

    def _read_back(self, answer: _TrainedAnswer, lost: list[str]) -> Iterator[Finding]:
        """Yield the findings of a decoded answer, and add the characters that are not encoded to `lost`."""
        from pytest_mistral_lora.chat.oracle.answer_decoder import UndecodableAnswerError

        if self._decoder is None:
            return
        try:
            if answer.is_text:
                # ML109 has decoded it: half of the time of most rows would be spent on the same again
                decoded = AnswerMessage((AnswerChunk(_kept_text(answer.message.text, self._oracle)),))
                if decoded.chunks == answer.message.chunks:
                    return
            else:
                decoded = self._decoder.message(answer.ids)
        except UndecodableAnswerError as error:
            yield Finding("ML649", f"mistral-common's decoder refuses the ids: {error.found}", answer.place)
            return
        left_out = list(_lost_characters(answer.message, decoded, self._oracle))
        if left_out:
            lost.append(f"messages[{answer.index}]: {', '.join(left_out)}")
        elif decoded.chunks != answer.message.chunks:
            found = f"the text is read as {_shown_chunks(decoded.chunks)}"
            yield Finding("ML649", found, answer.place, _shown_chunks(answer.message.chunks))
        for found, expected in _changed_calls(answer.message.calls, decoded.calls):
            yield Finding("ML649", found, answer.place, expected)


NO_TOKENIZER = JudgedAnswers(
    no_decoder="there is no Mistral tokenizer to decode answers with",
    has_grammar=True,
    no_grammar="there is no Mistral tokenizer to decode answers with",
)
"""The verdict on answers without a Mistral tokenizer."""


def _refusal(refused: RefusedToken, place: Place) -> Finding:
    where = "the end of the answer" if refused.is_end else f"token {refused.index} of the answer, {refused.found}"
    return Finding("ML651", f"the grammar of the request refuses {where}", place, refused.expected)


def _trained_answers(row: Row, encoded: EncodedRow, oracle: Oracle) -> Iterator[_TrainedAnswer]:
    turns = encoded.answer_spans.values()
    # ML109 reports surplus and missing turns
    for group, spans in zip(encoded_groups(row, oracle), turns, strict=False):
        # ML616 reports an answer of nothing but EOS
        if spans[0].supervised and spans[0].kind != "eos":
            messages = [row.messages[index] for index in group]
            ids = encoded.input_ids[spans[0].start : spans[-1].end]
            yield _TrainedAnswer(row, group[-1], ids, AnswerMessage.of_turn(messages, oracle.facts))


def _thought_faults(message: AnswerMessage) -> Iterator[str]:
    """Yield how the thoughts of an answer stand otherwise than servers read them."""
    thoughts = [index for index, chunk in enumerate(message.chunks) if chunk.is_thinking]
    if not thoughts:
        return
    if len(thoughts) > 1:
        yield f"{len(thoughts)} thoughts"
    if thoughts[0]:
        yield f"a text before the thought: {shortened(message.chunks[0].text)}"
    if any(not message.chunks[index].text for index in thoughts):
        yield "an empty thought"
    last = message.chunks[-1]
    open_thoughts = [index for index in thoughts if not message.chunks[index].is_closed]
    if open_thoughts and not last.is_thinking:
        yield f"a thought that is not closed, so that it goes on with the text {shortened(last.text)}"
    elif open_thoughts:
        yield "a thought that is not closed"
    elif last.is_thinking and not message.calls:
        yield "nothing after the thought"


def _lost_characters(wanted: AnswerMessage, decoded: AnswerMessage, oracle: Oracle) -> Iterator[str]:
    """Yield the characters of texts that the encoder leaves out or replaces, as far as that is all that differs."""
    if [chunk.is_thinking for chunk in wanted.chunks] != [chunk.is_thinking for chunk in decoded.chunks]:
        return
    for chunk, read in zip(wanted.chunks, decoded.chunks, strict=True):
        text, kept = as_decoded(chunk.text, oracle), _kept_text(chunk.text, oracle)
        if chunk.text == read.text or read.text not in (text, kept):
            continue
        if text != chunk.text:
            yield f"{counted(chunk.text.count('▁'), 'U+2581', '')} encoded as spaces"
        if read.text != text:
            yield f"{counted(len(text) - len(kept), 'space')} at the end left out"


def _kept_text(text: str, oracle: Oracle) -> str:
    """Return the text of an answer as its ids are decoded, without spaces at its end if the version strips them."""
    decoded = as_decoded(text, oracle)
    return decoded.rstrip(" ") if oracle.facts.strips_answers else decoded


def _changed_calls(wanted: Sequence[GeneratedCall], decoded: Sequence[GeneratedCall]) -> Iterator[tuple[str, str]]:
    """Yield the parts of decoded calls that are not the row's, each with the row's."""
    if len(wanted) != len(decoded):
        yield f"{counted(len(decoded), 'call')} read", counted(len(wanted), "call")
        return
    for call, read in zip(wanted, decoded, strict=True):
        for part, of_row, of_ids in zip(("name", "arguments", "id"), _parts(call), _parts(read), strict=True):
            if of_row != of_ids:
                yield f"the {part} of a call of {call.name} read as {of_ids}", of_row


def _parts(call: GeneratedCall) -> tuple[str, str, str]:
    return call.name, canonical_json(call.arguments), str(call.id)


def _shown_chunks(chunks: Sequence[AnswerChunk]) -> str:
    shown = [("the thought " if chunk.is_thinking else "") + shortened(chunk.text) for chunk in chunks]
    return ", ".join(shown) or "nothing"
