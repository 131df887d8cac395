"""The answer of a server to a prompt, in the forms that its endpoints give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.serving.client import Answer

REFUSED = (400, 422, 500)
"""Statuses of a request that is refused; llama.cpp answers 500 if a template raises."""

UNHANDLED = "Internal Server Error"
"""The body of a status 500 behind which is an exception that the server did not expect."""

LISTED = 5
"""Best tokens whose log-probabilities are asked for at each place."""


@dataclass(frozen=True, slots=True)
class ServedCall:
    """A tool call that a server read in an answer.

    Attributes:
        name: The tool's name.
        arguments: Its arguments, as JSON.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """An answer that a server gave.

    Attributes:
        text: Its text.
        ids: Its ids, with or without a closing EOS; None if the server hides them.
        logprobs: The log-probability of each id, in nats; empty if it hides them, or leaves some out.
        first: Log-probabilities of the best first tokens, by their text without white space around it.
        calls: The tool calls that the server read in it.
        ended: Whether the model ended it; False if a limit did.
        refused: The server's reason if it refuses the prompt; else empty.
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] = ()
    first: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[ServedCall, ...] = ()
    ended: bool = True
    refused: str = ""


def read_field(value: Any, *names: str) -> Any:
    """Return a field of nested mappings; None if it is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def integers(value: Any, place: str) -> tuple[int, ...]:
    """Return ids that a server lists.

    Raises:
        InputError: If they are no whole numbers.
    """
    if not isinstance(value, list) or any(type(one) is not int for one in value):
        raise InputError(f"the ids are {repr(value)[:80]}", place=place, expected="a list of whole numbers")
    return tuple(value)


def refusal(answer: Answer, place: str) -> str:
    """Return the reason of a server that refuses a prompt.

    Raises:
        InputError: If the answer is no refusal, but a failure.
    """
    if answer.status in REFUSED and answer.data is not None:
        return answer.error
    # `transformers serve` has no other answer to a row that its template refuses: Starlette's, for any exception
    if answer.status == 500 and answer.text == UNHANDLED:
        return "HTTP 500 without a reason, which is in the log of the server"
    found = f"HTTP {answer.status}: {answer.error}" if answer.status != 200 else f"no JSON: {answer.text}"
    raise InputError(found, place=place, expected="an answer in JSON")


def first_choice(answer: Answer, place: str) -> Mapping[str, Any]:
    """Return the first of the choices that OpenAI's endpoints give.

    Raises:
        InputError: If there is none.
    """
    choices = read_field(answer.data, "choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise InputError(f"no choices: {answer.text}", place=place, expected="the answer of a model")
    return choices[0]


def chat_answer(answer: Answer, place: str) -> ServedAnswer:
    """Return an answer of OpenAI's chat endpoint, with the ids that vLLM and llama.cpp add to it.

    Raises:
        InputError: If it has another form, or the request failed.
    """
    if not answer.is_ok:
        return ServedAnswer(refused=refusal(answer, place))
    choice = first_choice(answer, place)
    listed = objects(read_field(choice, "logprobs", "content"))
    ids = read_field(choice, "token_ids")
    if ids is None:
        ids = [one.get("id") for one in listed]
        # llama.cpp leaves out tokens that end within a character
        whole = len(ids) == read_field(answer.data, "usage", "completion_tokens")
        ids = ids if ids and whole and all(type(one) is int for one in ids) else None
    numbers = [number(one.get("logprob")) for one in listed]
    # of two tokens with one text, such as the pieces of a byte, neither is known
    first: dict[str, set[float]] = {}
    for one in [*listed[:1], *(objects(listed[0].get("top_logprobs")) if listed else [])]:
        first.setdefault(str(one.get("token")).strip(), set()).add(number(one.get("logprob")))
    text = read_field(choice, "message", "content")
    return ServedAnswer(
        text if isinstance(text, str) else "",
        None if ids is None else integers(ids, place),
        tuple(numbers) if ids is not None and len(numbers) == len(ids) else (),
        {token: values.pop() for token, values in first.items() if len(values) == 1 and token},
        tuple(_calls(read_field(choice, "message", "tool_calls"), place)),
        ended=read_field(choice, "finish_reason") != "length",
    )


def objects(value: Any) -> list[Mapping[str, Any]]:
    """Return the entries of a list up to the first that is no object."""
    return list(takewhile(lambda one: isinstance(one, Mapping), value)) if isinstance(value, list) else []


def number(value: Any) -> float:
    """Return a number that a server gives; nan if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _calls(value: Any, place: str) -> list[ServedCall]:
    found = []
    for one in value or []:
        name, arguments = (read_field(one, "function", key) for key in ("name", "arguments"))
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise InputError(f"a tool call is {repr(one)[:80]}", place=place, expected="a name, and arguments as JSON")
        found.append(ServedCall(name, arguments))
    return found
