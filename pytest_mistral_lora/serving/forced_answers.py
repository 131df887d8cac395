"""Known answers through a server: what a client gets of ids that its model was made to say, whole and as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving.answers import ServedAnswer
from pytest_mistral_lora.serving.replay import PLAIN, Outcome, outcome_of
from pytest_mistral_lora.serving.server import Server, SpokenAnswer, chat_request

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.records.known_answers import KnownAnswer
    from pytest_mistral_lora.serving.client import ServerClient

Way = Literal["planted", "declared", "forced", "parsed"]
"""How a server was made to say an answer.

`planted`: its model says it to the ids of the prompt, so it is a probe. `declared`: the user states that it is a probe,
and it cannot be asked by ids. `forced`: the request forces the ids on any model. `parsed`: there is no server, and its
parsers were given the ids.
"""

_MORE = 16
"""Tokens beyond the length of an answer, for one that goes on where it should end."""

_TRIED = 3
"""The number of answers to ask for by ids: a model that says none of them is no probe."""

_NO_PROBE = "the model is no probe, and no request forces this answer"
_OTHER_PROMPT = "the prompt has other ids than mistral-common's (ML902)"
_NOT_ENFORCED = "the server does not hold its model to the grammar of the request"
_NOT_SAID = "the model does not say it"


@dataclass(frozen=True, slots=True)
class ForcedAnswer:
    """A known answer, and what a server made of it.

    Attributes:
        known: The answer.
        row_ids: The ids of the answer, with the closing EOS.
        way: How the server was made to say it; None if it was not.
        reason: Why it was not; empty if it was.
        whole: The answer to the request; None if it was not sent.
        stream: The answer to the same request as a stream; None if it was not sent.
        plain: The whole answer to the request with only the temperature set; None if it was not sent.
        cuts: Streams of the same ids in other parts whose message differs from that of `stream`, by the way of cutting;
            only parsers can be given each.
    """

    known: KnownAnswer
    row_ids: tuple[int, ...]
    way: Way | None = None
    reason: str = ""
    whole: Outcome = None
    stream: Outcome = None
    plain: Outcome = None
    cuts: Mapping[str, ServedAnswer] = field(default_factory=dict)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What a client gets, by the way in which the answer comes; None for a way that was not asked."""
        return {"whole": self.whole, "streamed": self.stream, **self.cuts}


def request_of(known: KnownAnswer) -> dict[str, Any]:
    """Return the chat request whose answer is known, as clients send it."""
    request = {**chat_request(known.row), **known.settings}
    if known.row.response_format is not None:
        request["response_format"] = known.row.response_format
    return request


async def force_answers(
    server: Server,
    client: ServerClient,
    answers: Sequence[KnownAnswer],
    oracle: Oracle,
    model: str,
    declared: Set[str] | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[ForcedAnswer, ...]:
    """Make a server say known answers, and return what a client gets of each, in order.

    A failed request is an outcome and is not raised.

    Args:
        server: The kind of server.
        client: The connection.
        answers: The answers, which fit the tokenizer.
        oracle: The tokenizer.
        model: The name of the model.
        declared: The names of the answers that the user's probe says; None for a model of which nothing is known.
        done: Called after each answer.
    """
    asking = _Asking(server, client, oracle, model, declared)
    said = [await asking.says(known) for known in answers[:_TRIED]]
    # nothing can be asked by ids, or the model knows none of the first
    asking.is_probe = any(said)
    by_length = sorted(answers, key=lambda known: len(known.answer_ids(oracle)), reverse=True)
    asking.asked_plainly = {known.name for known in by_length[:_TRIED]}

    async def force(known: KnownAnswer) -> ForcedAnswer:
        try:
            return await asking.force(known)
        finally:
            done()

    return tuple(await asyncio.gather(*(force(known) for known in answers)))


@dataclass
class _Asking:
    """Asks one model of a server for known answers."""

    server: Server
    client: ServerClient
    oracle: Oracle
    model: str
    declared: Set[str] | None
    is_probe: bool = False
    asked_plainly: Set[str] = frozenset()

    async def says(self, known: KnownAnswer) -> bool | None:
        """Return whether the model says an answer to the ids of its prompt; None if it cannot be asked by ids."""
        ids, prompt = known.answer_ids(self.oracle), known.prompt_ids(self.oracle)
        limit = len(ids) + _MORE
        answer = await outcome_of(self.server.complete(self.client, prompt, self.model, limit, self.server.greedy))
        if answer is None:
            return None
        if isinstance(answer, InputError) or answer.ids is None:
            return False
        return answer.ended and same_ids(answer.ids, ids, self.oracle)

    async def force(self, known: KnownAnswer) -> ForcedAnswer:
        """Return what a client gets of an answer, or why the server was not made to say it."""
        found = ForcedAnswer(known, known.answer_ids(self.oracle))
        request: Mapping[str, Any] | None = request_of(known)
        way: Way = "forced"
        if self.is_probe:
            if not await self.says(known):
                return replace(found, reason=_NOT_SAID)
            way = "planted"
        elif self.declared is not None:
            if known.name not in self.declared:
                return replace(found, reason=_NOT_SAID)
            way = "declared"
        else:
            request = self.server.forced_request(request or {}, SpokenAnswer(known.row, found.row_ids, self.oracle))
        if request is None:
            return replace(found, reason=_NO_PROBE)
        if await self._has_other_prompt(known):
            return replace(found, reason=_OTHER_PROMPT)
        request = {"max_tokens": len(found.row_ids) + _MORE, **request}
        whole = await outcome_of(self.server.say(self.client, request, self.model, is_stream=False))
        ids = whole.ids if isinstance(whole, ServedAnswer) else None
        if way == "forced" and ids is not None and not same_ids(ids, found.row_ids, self.oracle):
            return replace(found, reason=_NOT_ENFORCED)
        found = replace(found, way=way, whole=whole)
        if way != "forced" and known.name in self.asked_plainly:
            plain = self.server.say(self.client, request, self.model, is_stream=False, settings=PLAIN)
            found = replace(found, plain=await outcome_of(plain))
        if way == "forced" and not self.server.streams_forced:
            return found
        return replace(
            found, stream=await outcome_of(self.server.say(self.client, request, self.model, is_stream=True))
        )

    async def _has_other_prompt(self, known: KnownAnswer) -> bool:
        """Return whether the server shows a prompt with other ids: its model is then asked another question."""
        prompt = await outcome_of(self.server.prompt(self.client, known.row, self.model))
        # a failed request is the finding of the answer itself
        if prompt is None or isinstance(prompt, InputError) or prompt.ids is None:
            return False
        return tuple(prompt.ids) != known.prompt_ids(self.oracle)


def same_ids(served: Sequence[int], said: Sequence[int], oracle: Oracle) -> bool:
    """Return whether two answers have the same ids, but for a closing EOS, which servers leave out."""

    def without_eos(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[:-1] if ids and ids[-1] == oracle.eos_id else ids)

    return without_eos(served) == without_eos(said)
