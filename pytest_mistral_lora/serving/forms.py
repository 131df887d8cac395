"""The forms of the answers of each endpoint, read strictly: a wrong value is an error with the endpoint and the key."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_mistral_lora.errors import InputError, shortened
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.schema import error_in_words
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.serving.client import Answer

_LONGEST = 1 << 18
"""The most ids of a prompt or an answer: the longest context of the models."""
_LONGEST_NAME, MOST = 1_000, 10_000

_T = TypeVar("_T")
# without a limit, a million wrong items would be a million errors
ListOf = Annotated[list[_T], Field(fail_fast=True, max_length=MOST)]
PerToken = Annotated[list[_T], Field(fail_fast=True, max_length=_LONGEST)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = PerToken[Count]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]


class Form(BaseModel):
    """An answer of an endpoint; keys without a field are ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="ignore")


class ListedModel(Form):
    """A model in a list of OpenAI's form; an adapter has a parent."""

    id: Name
    parent: Name | None = None
    max_model_len: Count | None = None


class ModelList(Form):
    """`/v1/models`."""

    data: ListOf[ListedModel]


class Candidate(Form):
    """One of the best tokens at a place."""

    id: Count | None = None
    token: str | None = None
    logprob: Number | None = None


class ListedToken(Candidate):
    """A token of an answer, with the best ones at its place."""

    top_logprobs: ListOf[Candidate] | None = None


class CalledFunction(Form):
    """The function of a tool call, its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Form):
    """A tool call."""

    function: CalledFunction
    id: str | None = None


class ContentChunk(Form):
    """A part of a message whose content is a list: a text, or a thought, which may have parts, too."""

    type: str
    text: str | None = None
    thinking: str | ListOf[ContentChunk] | None = None

    @property
    def thought(self) -> str:
        """The thought; empty for any other part."""
        if isinstance(self.thinking, list):
            return "".join(part.text or "" for part in self.thinking)
        return self.thinking or ""


class Thinking(Form):
    """The text of a message and its thinking, which servers name differently, or have as parts of the content."""

    content: str | ListOf[ContentChunk] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The text; empty without it."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content if part.type == "text")
        return self.content or ""

    @property
    def thinking(self) -> str:
        """The thinking; empty without it."""
        parts = self.content if isinstance(self.content, list) else ()
        return self.reasoning_content or self.reasoning or "".join(part.thought for part in parts)


class ChatMessage(Thinking):
    """The message of an answer."""

    tool_calls: ListOf[ToolCall] | None = None


class ListedTokens(Form):
    """The log-probabilities of an answer of a chat."""

    content: PerToken[ListedToken] | None = None


class ChatChoice(Form):
    """One of the answers of a chat, with the ids that some servers add to it."""

    message: ChatMessage
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: ListedTokens | None = None
    token_ids: Ids | None = None
    prompt_token_ids: Ids | None = None


class Usage(Form):
    """The numbers of tokens of a request."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class Timings(Form):
    """The numbers of a request that some servers add: how many tokens a smaller model drafted."""

    draft_n: Count | None = None


class Chat(Form):
    """`/v1/chat/completions`, with the ids that some servers add to it."""

    choices: Annotated[list[ChatChoice], Field(fail_fast=True, min_length=1, max_length=MOST)]
    usage: Usage | None = None
    prompt_token_ids: Ids | None = None
    timings: Timings = Timings()


class FunctionPart(Form):
    """A part of the function of a tool call in a stream."""

    name: str | None = None
    arguments: str | None = None


class CallPart(Form):
    """A part of a tool call in a stream; `index` says which call it belongs to."""

    index: Count = 0
    id: str | None = None
    function: FunctionPart = FunctionPart()


class MessagePart(Thinking):
    """A part of the message of an answer in a stream."""

    tool_calls: ListOf[CallPart] | None = None


class ChoicePart(Form):
    """A part of an answer in a stream."""

    delta: MessagePart = MessagePart()
    finish_reason: str | None = None
    token_ids: Ids | None = None


class ChatPart(Form):
    """An event of a stream of `/v1/chat/completions`; the event with the usage has no choices."""

    choices: ListOf[ChoicePart]


class ChatStream(Form):
    """The events of a stream of `/v1/chat/completions`."""

    events: PerToken[ChatPart]


_F = TypeVar("_F", bound=Form)


def read_form(
    form: type[_F], answer: Answer, place: Place, *, key: str = "", expected: str = "an answer in JSON"
) -> _F:
    """Return the answer of an endpoint.

    Args:
        form: Its form.
        answer: The answer.
        place: The address of the endpoint.
        key: The field of the form that holds the whole answer; empty if the answer is an object.
        expected: The usual answer, for the error if this one has another status, or is not JSON.

    Raises:
        InputError: If it has another form: the first fault is named with its key and its value.
    """
    if not answer.is_ok:
        found = f"HTTP {answer.status}: {answer.error}" if answer.status != 200 else f"no JSON: {answer.text}"
        raise InputError(found, place=place, expected=expected)
    try:
        return form.model_validate({key: answer.data} if key else answer.data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    raise _form_error(form, fault, place, key)


def _form_error(form: type[Form], fault: Any, place: Place, key: str) -> InputError:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"])
    path = path.removeprefix(f".{key}" if key else ".") or "the answer"
    value = fault["input"]
    # only the beginning of a long text is shown, so the key is searched only there
    shown = shortened(redacted(value[:_LONGEST_NAME]) if isinstance(value, str) else value)
    if fault["type"] == "missing":
        return InputError(f"{path} is missing in {shown}", place=place, expected="the answer of a model")
    return InputError(f"{path} is {shown}", place=place, expected=error_in_words(fault, form).removeprefix("expected "))
