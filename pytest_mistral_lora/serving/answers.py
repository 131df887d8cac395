"""The answer of a server to a prompt, in the forms of its endpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.serving.client import Answer
from pytest_mistral_lora.serving.forms import CallPart, Chat, ChatStream, ListedToken, read_form

_REFUSED = (400, 422)
"""Statuses of a refused request, if the server gives its reason in JSON."""

_RAISED = re.compile(r"Jinja Exception: |\braise_exception\(")
"""The words of engines that are no Jinja of Python if a template refuses a row: their builds answer 400 or 500."""

_CRASHED = re.compile(
    # a template that ends in an error, in such an engine
    r"While executing \w+ at line(?!.*Jinja Exception: )"
    # errors of Python and of Jinja, which a server may answer with status 400
    r"|Traceback \(most recent call last\)|\b[A-Z]\w*Error\b(?=[:(])"
    r"|missing \d+ required (?:positional|keyword-only) argument|got an unexpected keyword argument"
    r"|takes \d+ positional arguments? but|has no attribute '|object is not (?:callable|iterable|subscriptable)"
    r"|unsupported operand type|' is undefined\b|local variable '|list index out of range|division by zero",
    re.DOTALL,
)
"""Words that show an error of the engine or of its template, for any status."""

_READ = 20_000
"""The number of characters of a server's words to search for those of a failure."""

UNHANDLED = "Internal Server Error"
"""The body of a status 500 for an exception that the server did not expect."""

LISTED = 5
"""The number of best tokens to request log-probabilities for at each place."""


@dataclass(frozen=True, slots=True)
class ServedCall:
    """A tool call that a server read from an answer.

    Attributes:
        name: The tool's name.
        arguments: Its arguments, as JSON.
        id: Its id; empty if the server gives none. Many servers make their own, so it is not compared.
    """

    name: str
    arguments: str
    id: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ListedStep:
    """A token of an answer as the server lists it with its log-probability.

    Attributes:
        id: The token's id; None if the server hides it.
        text: Its text.
        logprob: Its log-probability, in nats; nan if the server gives none.
        best_id: The id of the likeliest token there; None if the server hides it.
        best_text: The text of that one.
    """

    id: int | None
    text: str
    logprob: float
    best_id: int | None
    best_text: str

    @property
    def is_best(self) -> bool:
        """Whether the token is the likeliest one."""
        return (self.id, self.text) == (self.best_id, self.best_text)


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """An answer that a server gave.

    Attributes:
        text: Its text.
        ids: Its ids, with or without a closing EOS; None if the server hides them.
        logprobs: The log-probability of each id, in nats; empty if the server hides them, or leaves some out.
        first: Log-probabilities of the best first tokens, by their text without white space around it.
        calls: The tool calls that the server read from it.
        ended: Whether the model ended it; False if a limit did.
        count: The number of its tokens, with or without a closing EOS; None if the server does not report it.
        prompt_count: The number of tokens of its prompt; None if the server does not report it.
        thinking: Its thinking.
        finish_reason: The reason why it ended, as the server names it; empty if it names none.
        stop: The stop string that ended it, if the server names it; else empty.
        steps: Its tokens as the server lists them with their log-probabilities; empty if it lists none. A list may
            leave out tokens that end within a character, and one that a stop string cuts off.
        is_whole: Whether it came to its end: False for a stream without the event that ends it.
        is_drafted: Whether some of its tokens were drafted, whose log-probabilities the server does not know.
        calls_read: Whether the server reads tool calls, which one without a parser leaves in the text.
        refused: The server's reason if it refuses the prompt; else empty.
        failed: The HTTP status and the server's words if the request fails; else empty.
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] = ()
    first: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[ServedCall, ...] = ()
    ended: bool = True
    count: int | None = None
    prompt_count: int | None = None
    thinking: str = ""
    finish_reason: str = ""
    stop: str = ""
    steps: tuple[ListedStep, ...] = ()
    is_whole: bool = True
    is_drafted: bool = False
    calls_read: bool = True
    refused: str = ""
    failed: str = ""


def read_field(value: Any, *names: str) -> Any:
    """Return a field of nested mappings; None if it is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def integers(value: Any, place: Place) -> tuple[int, ...]:
    """Return the ids that a user's script lists.

    Raises:
        InputError: If they are not whole numbers.
    """
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise InputError(f"the ids are {repr(value)[:80]}", place=place, expected="a list of whole numbers")
    return tuple(value)


class Unanswered(TypedDict, total=False):
    """The reason why a request has no answer, as fields of `ServedPrompt` and `ServedAnswer`: refused or failed."""

    refused: str
    failed: str


def unanswered(answer: Answer, place: Place) -> Unanswered:
    """Return why a request has no answer.

    A template (`raise_exception`) or a validation refuses messages. A request fails if the server answers with a status
    for its own faults, 500 and up, or with the words of an unexpected exception; that says nothing about the messages.

    Raises:
        InputError: If the answer is neither, for example for a missing endpoint.
    """
    status, error = answer.status, answer.error
    words = (answer.message or answer.text)[:_READ]
    is_crash = _CRASHED.search(words) is not None
    is_reason = status in _REFUSED and answer.data is not None
    if not is_crash and (is_reason or (status == 500 and _RAISED.search(words))):
        return {"refused": f"HTTP {status}: {error}"}
    # a server may answer a row that its template refuses like any exception: with Starlette's text
    if status == 500 and answer.text == UNHANDLED:
        return {"failed": "HTTP 500 without a reason, which is in the log of the server"}
    # 503 comes from a busy server
    if (status >= 500 and status != 503) or (status in _REFUSED and is_crash):
        return {"failed": f"HTTP {status}: {error}"}
    raise InputError(
        f"HTTP {status}: {error}" if status != 200 else f"no JSON: {error}", place=place, expected="an answer in JSON"
    )


def chat_answer(answer: Answer, place: Place) -> ServedAnswer:
    """Return an answer of OpenAI's chat endpoint, with the ids that some servers add to it.

    Raises:
        InputError: If it has another form.
    """
    if not answer.is_ok:
        return ServedAnswer(**unanswered(answer, place))
    chat = read_form(Chat, answer, place)
    choice = chat.choices[0]
    listed = (choice.logprobs.content if choice.logprobs else None) or []
    ids: Sequence[int] | None = choice.token_ids
    count = chat.usage.completion_tokens if chat.usage else None
    if ids is None:
        known = [token.id for token in listed if token.id is not None]
        # a list may leave out tokens that end within a character
        ids = known if known and len(known) == len(listed) == count else None
    calls = choice.message.tool_calls or ()
    return ServedAnswer(
        choice.message.text,
        None if ids is None else tuple(ids),
        logprobs_of(listed) if ids is not None and len(listed) == len(ids) else (),
        _first_tokens(listed),
        tuple(ServedCall(call.function.name, call.function.arguments, call.id or "") for call in calls),
        ended=choice.finish_reason != "length",
        count=count,
        prompt_count=chat.usage.prompt_tokens if chat.usage else None,
        thinking=choice.message.thinking,
        finish_reason=choice.finish_reason or "",
        stop=choice.stop_reason if isinstance(choice.stop_reason, str) else "",
        steps=tuple(map(_step, listed)),
        is_drafted=bool(chat.timings.draft_n),
    )


def _step(token: ListedToken) -> ListedStep:
    """Return a listed token with the likeliest one at its place."""
    candidates = [one for one in (token, *(token.top_logprobs or ())) if one.logprob is not None]
    best = max(candidates, key=lambda one: one.logprob or 0.0, default=token)
    logprob = math.nan if token.logprob is None else token.logprob
    return ListedStep(token.id, token.token or "", logprob, best.id, best.token or "")


def streamed_answer(answer: Answer, place: Place) -> ServedAnswer:
    """Return the answer whose parts a stream of OpenAI's chat endpoint has: the parts joined, as a client joins them.

    Raises:
        InputError: If it has another form.
    """
    if not answer.is_ok:
        return ServedAnswer(**unanswered(answer, place))
    events = answer.data
    failure = next((event["error"] for event in events if isinstance(event, Mapping) and event.get("error")), None)
    if failure is not None:
        words = read_field(failure, "message") or failure
        return ServedAnswer(failed=f"in the stream: {str(words)[:_READ]}")
    parts = read_form(ChatStream, answer, place, key="events").events
    choices = [choice for part in parts for choice in part.choices]
    texts = [choice.delta.text for choice in choices]
    thoughts = [choice.delta.thinking for choice in choices]
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    ids = [token for choice in choices for token in choice.token_ids or ()]
    reason = reasons[-1] if reasons else ""
    return ServedAnswer(
        "".join(texts),
        tuple(ids) or None,
        calls=_joined_calls(part for choice in choices for part in choice.delta.tool_calls or ()),
        ended=reason != "length",
        thinking="".join(thoughts),
        finish_reason=reason,
        is_whole=answer.is_whole,
    )


def _joined_calls(parts: Iterable[CallPart]) -> tuple[ServedCall, ...]:
    """Return the calls of a stream, each from the parts with its index, in the order of the indices."""
    calls: dict[int, list[CallPart]] = {}
    for part in parts:
        calls.setdefault(part.index, []).append(part)
    # joined once: to add each part to a text copies the text, for minutes if there are many
    return tuple(
        ServedCall(
            "".join(part.function.name or "" for part in of_call),
            "".join(part.function.arguments or "" for part in of_call),
            next((part.id for part in of_call if part.id), ""),
        )
        for _, of_call in sorted(calls.items())
    )


def logprobs_of(listed: Sequence[ListedToken]) -> tuple[float, ...]:
    """Return the log-probabilities of the tokens of an answer; nan if the server gives none."""
    return tuple(math.nan if token.logprob is None else token.logprob for token in listed)


def _first_tokens(listed: Sequence[ListedToken]) -> dict[str, float]:
    """Return the log-probabilities of the best first tokens, by their text without white space around it."""
    first: dict[str, set[float]] = {}
    for token in [*listed[:1], *((listed[0].top_logprobs or ()) if listed else ())]:
        if token.token is not None and token.logprob is not None:
            first.setdefault(token.token.strip(), set()).add(token.logprob)
    # two tokens with the same text, such as pieces of bytes, cannot be told apart
    return {text: values.pop() for text, values in first.items() if len(values) == 1 and text}
