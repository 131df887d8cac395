"""A kind of server: the endpoints that show the prompt of its model, and the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pytest_mistral_lora.chat.rows import Row, require_chat
from pytest_mistral_lora.errors import InputError, shortened
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.programs.registry import loaded
from pytest_mistral_lora.serving.answers import (
    LISTED,
    ServedAnswer,
    chat_answer,
    read_field,
    streamed_answer,
    unanswered,
)
from pytest_mistral_lora.serving.client import Answer, ServerClient
from pytest_mistral_lora.serving.deviations import DeviationsOf, deviations_in
from pytest_mistral_lora.serving.forms import Chat, ModelList, read_form

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.programs.faults import ProgramFault
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder
    from pytest_mistral_lora.records.gguf_file import GgufFile
    from pytest_mistral_lora.training.export.servers import ServerExport

Strength = Literal["ids", "preview", "count"]
"""How much an answer proves: the ids that were fed, the ids or the text of an endpoint that renders, or a number."""


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """The prompt that a server makes of the messages of a row.

    Attributes:
        ids: The ids of the prompt; None if the server hides them.
        count: The number of prompt tokens that a chat request reports; None if it does not report it.
        refused: The server's reason if it refuses the messages; else empty.
        text: The rendered prompt, to which the server adds BOS, if it shows a text in place of ids; else None.
        failed: The HTTP status and the server's words if the request fails, which says nothing about the messages; else
            empty.
    """

    ids: tuple[int, ...] | None = None
    count: int | None = None
    refused: str = ""
    text: str | None = None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The facts that a server gives about itself.

    Attributes:
        version: Its version or build; empty if it is not given.
        models: The names under which it serves models and adapters.
        adapters: The names that are adapters, as far as the server says.
        precision: The precision of its weights, a key of `TOLERANCES`; empty if it is not given.
        scales: Each loaded adapter, with its scale; None if the server does not list adapters.
        parents: The models that adapters name as their parents.
        defaults: What a request gets that does not name a setting, by its name, as far as the server shows it.
        changed: The defaults among them that change a greedy answer, or end it.
        drafts: Whether it says that it drafts tokens (speculative decoding), by a smaller model or by earlier tokens.
    """

    version: str
    models: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    precision: str = ""
    scales: tuple[tuple[str, float], ...] | None = None
    parents: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    changed: tuple[str, ...] = ()
    drafts: bool = False


@dataclass(frozen=True, slots=True)
class SpokenAnswer:
    """The answer that a request should force on a model.

    Attributes:
        row: The conversation; its last turn is the answer.
        ids: The ids of the answer, with the closing EOS.
        oracle: The tokenizer.
    """

    row: Row
    ids: tuple[int, ...]
    oracle: Oracle

    @property
    def text(self) -> str:
        """The answer as text, with its control tokens spelled, and without the closing EOS."""
        return spelled_text(self.ids[:-1], self.oracle)

    @property
    def spells_a_marker(self) -> bool:
        """Whether its letters spell a control token: an engine that reads its text again would read the token."""
        parts = self.oracle.decode([token for token in self.ids if token not in self.oracle.control_tokens])
        return any(literal in parts for literal in self.oracle.control_tokens.values())


def spelled_text(ids: Sequence[int], oracle: Oracle) -> str:
    """Return ids as text, with their control tokens spelled."""
    control = oracle.control_tokens
    return "".join(
        "".join(control[token] for token in run) if is_control else oracle.decode([*run])
        for is_control, run in groupby(ids, control.__contains__)
    )


def with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a message with the arguments of each of its tool calls changed."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": change(function.get("arguments"))}})
    return {**message, **({"tool_calls": calls} if calls else {})}


def parsed(arguments: Any) -> Any:
    """Return arguments as the JSON value of their text; unchanged if they are not JSON."""
    with suppress(TypeError, ValueError, RecursionError):
        return json.loads(arguments)
    return arguments


def chat_request(row: Row) -> dict[str, Any]:
    """Return the messages of a row before its last answer, and its tools, in the form of OpenAI's chat requests.

    Raises:
        RowError: If the row is not a conversation.
    """
    require_chat(row)

    def as_text(given: Any) -> Any:
        # OpenAI's form; some servers refuse a request whose arguments are an object
        return given if given is None or isinstance(given, str) else json.dumps(given, ensure_ascii=False)

    messages = [
        with_arguments({key: value for key, value in message.items() if key != "weight"}, as_text)
        for message in row.messages[: row.assistant_groups()[-1][0]]
    ]
    tools = {"tools": [{"type": "function", "function": tool["function"]} for tool in row.tools]} if row.tools else {}
    return {"messages": messages, **tools}


def served_prompt(
    answer: Answer, client: ServerClient, ids: Callable[[Chat], Sequence[int] | None] = lambda _: None
) -> ServedPrompt:
    """Return the prompt that a chat request was fed, or the reason why it has no answer.

    Args:
        answer: The answer to the request; OpenAI's has the number of prompt tokens.
        client: The connection.
        ids: Returns the ids of the prompt, if the server shows them.

    Raises:
        InputError: If the answer has another form.
    """
    place = client.place_of("/v1/chat/completions")
    if not answer.is_ok:
        return ServedPrompt(**unanswered(answer, place))
    chat = read_form(Chat, answer, place)
    shown = ids(chat)
    return ServedPrompt(None if shown is None else tuple(shown), chat.usage.prompt_tokens if chat.usage else None)


@dataclass(frozen=True, slots=True)
class Parsers:
    """The parsers of a server's own package, which run without the server.

    Attributes:
        script: The script that gives them ids, in the Python that has the package: see `conformance.answer.parsers`.
        environment: Variables that keep the package quiet.
    """

    script: Path
    environment: Mapping[str, str]


class Server:
    """A kind of server. The base class is any with OpenAI's chat endpoint, which shows only the prompt's token count.

    Attributes:
        name: Its name on the command line.
        title: Its name in texts.
        strength: What its answers prove.
        was_run: Whether the kind was tried with a real server, and not only written from its source.
        version_at: The endpoint and the field of its version; no other kind has this field there. Empty without such
            an endpoint.
        gives_answers: Whether it can be asked for answers, and not only for prompts.
        reads_rendered_text: Whether it encodes each rendered prompt as one text, whatever its settings.
        lists_models: Whether it lists what it serves.
        lists_parents: Whether each adapter among its models has a parent, so that one without is a whole model.
        streams_forced: Whether a stream has all of an answer that a request forces.
        greedy: The settings of a greedy answer. All that could change it is explicit, since servers have defaults.
        no_grammar: The settings that free an answer to ids of a grammar that the server has by default; empty if it can
            have none.
        parsers: Its parsers that run without a server; None if none do.
        words: The file with the fixes of rules in its own options: `[rules]` by rule, and `[causes]` by the name of a
            cause that a check finds (`conformance.server.replay`). None for the general ones.
        deviations: The file with the named deviations that are known of it: `[prompts]` and `[answers]`, each with the
            versions that have it by its name. None if none are known. Like `words`, it is of this class alone: a
            subclass is another program, with options and versions that are not those of its parent.
        exporter: Where what writes the files that serve a model is, `module:object`; empty if nothing does.
        model_file_checks: Where the function is that returns the checks of a file by which it makes a model, by name,
            `module:object`; empty if it has no such file.
    """

    name: ClassVar[str] = "openai"
    title: ClassVar[str] = "a server with OpenAI's API"
    strength: ClassVar[Strength] = "count"
    was_run: ClassVar[bool] = True
    version_at: ClassVar[tuple[str, str]] = ("", "")
    gives_answers: ClassVar[bool] = True
    reads_rendered_text: ClassVar[bool] = False
    lists_models: ClassVar[bool] = True
    lists_parents: ClassVar[bool] = False
    streams_forced: ClassVar[bool] = True
    no_grammar: ClassVar[Mapping[str, Any]] = {}
    parsers: ClassVar[Parsers | None] = None
    words: ClassVar[Path | None] = None
    deviations: ClassVar[Path | None] = None
    exporter: ClassVar[str] = ""
    model_file_checks: ClassVar[str] = ""
    greedy: ClassVar[Mapping[str, Any]] = {
        "temperature": 0,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }

    def adapter_faults(self, folder: AdapterFolder, scales: Mapping[str, float]) -> Iterator[ProgramFault]:
        """Yield what the server would refuse of an adapter, or apply in another way than PEFT.

        Args:
            folder: The adapter, which has no other fault in its configuration.
            scales: The scale of each adapted layer in PEFT, by the layer's name in the base.
        """
        yield from ()

    def gguf_faults(self, file: GgufFile, oracle: Oracle) -> Iterator[ProgramFault]:
        """Yield what the server would do wrong with a GGUF file of a model, whatever the file's converter.

        Args:
            file: The file.
            oracle: The tokenizer that the file stands for.
        """
        yield from ()

    def fixes(self, section: Literal["rules", "causes"] = "rules") -> Mapping[str, str]:
        """Return the fixes in the options of this kind of server; empty if it has no words for them.

        Args:
            section: `rules`: by the id of a rule. `causes`: by the name of a cause that a check finds.
        """
        words: Path | None = vars(type(self)).get("words")
        return fixes_in(words).get(section, {}) if words else {}

    def known_deviations(self, section: DeviationsOf) -> Mapping[str, SpecifierSet]:
        """Return the named deviations that are known of this kind of server, with the versions that have each.

        Raises:
            EntryPointError: If its file of deviations is not one.
        """
        deviations: Path | None = vars(type(self)).get("deviations")
        return deviations_in(deviations).get(section, {}) if deviations else {}

    def has_deviation(self, section: DeviationsOf, name: str, version: str) -> bool:
        """Return whether a version of this kind of server is known to have a named deviation.

        Args:
            section: What deviates.
            name: The name of the deviation.
            version: The version as the server reports it: `b11549-8b3f1c2`, `0.32.0`.
        """
        number, versions = re.search(r"\d+(\.\d+)*", version), self.known_deviations(section).get(name)
        return number is not None and versions is not None and number[0] in versions

    def load_exporter(self) -> ServerExport:
        """Return what writes the files that serve a model by this kind of server.

        Raises:
            InputError: If nothing does.
        """
        from pytest_mistral_lora.training.export.servers import ServerExport

        if not self.exporter:
            raise InputError(f"no export of a model is known for {self.title}")
        return loaded(self.exporter, ServerExport)

    def remark_on_merged(self, folder: Path) -> str:
        """Return what to know of a merged model before this kind of server gets it, as a sentence; empty for nothing.

        Args:
            folder: The folder of the merged model.
        """
        return ""

    async def facts(self, client: ServerClient) -> ServerFacts:
        """Return the version and the models of a server.

        Raises:
            InputError: If the server is not of this kind.
        """
        answer = await client.get("/v1/models")
        place = client.place_of("/v1/models")
        models = read_form(ModelList, answer, place, expected="the models that it serves").data
        # an adapter has its base among the models
        adapters = {model.id: model.parent for model in models if model.parent}
        names, parents = tuple(model.id for model in models), tuple(dict.fromkeys(adapters.values()))
        lengths = {model.max_model_len for model in models if model.max_model_len}
        defaults = tuple(("max_model_len", length) for length in lengths)
        return ServerFacts(await self.version(client), names, tuple(adapters), parents=parents, defaults=defaults)

    async def version(self, client: ServerClient) -> str:
        """Return the version of a server; empty if it is not given, or the server is of another kind.

        Raises:
            InputError: If the server is not ready.
        """
        path, name = self.version_at
        if not path:
            return ""
        answer = await client.get(path)
        answer.require_ready(client.place_of(path))
        # the rest of an answer may be the arguments of the server, with a key in them
        version = read_field(answer.data, name)
        if version is not None and not isinstance(version, str):
            raise InputError(f"{name} is {shortened(version)}", place=client.place_of(path), expected="text")
        return version or ""

    async def prompt(self, client: ServerClient, row: Row, model: str) -> ServedPrompt:
        """Return what the server makes of a row's messages.

        Raises:
            InputError: If the server does not answer, or its answer has another form.
        """
        return served_prompt(await self.chat(client, row, model), client)

    async def chat(self, client: ServerClient, row: Row, model: str, **more: Any) -> Answer:
        """Ask for one token after a row's messages, greedily."""
        data = {"model": model, **chat_request(row), "max_tokens": 1, "temperature": 0, **more}
        # a model that may call tools is constrained in its answer; its prompt is the same
        return await client.post("/v1/chat/completions", data)

    async def answer(
        self, client: ServerClient, row: Row, model: str, limit: int | None, settings: Mapping[str, Any]
    ) -> ServedAnswer:
        """Return the answer to a row's messages before its last answer.

        Args:
            client: The connection.
            row: The conversation.
            model: The name of the model.
            limit: Longest answer, in tokens; None for the server's own limit.
            settings: Fields of the request, such as `greedy`.

        Raises:
            InputError: If the server does not answer, or its answer has another form.
        """
        data = {"model": model, **chat_request(row), **({} if limit is None else {"max_tokens": limit}), **settings}
        shown = {"logprobs": True, "top_logprobs": LISTED}
        found = await client.post("/v1/chat/completions", data | shown)
        if found.status in (400, 422, 500):
            # a server may not support log-probabilities
            found = await client.post("/v1/chat/completions", data)
        return chat_answer(found, client.place_of("/v1/chat/completions"))

    async def say(
        self,
        client: ServerClient,
        request: Mapping[str, Any],
        model: str,
        *,
        is_stream: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> ServedAnswer:
        """Return the greedy answer to a chat request, as clients send it: whole, or as a stream.

        Args:
            client: The connection.
            request: The messages, the tools and any other field, which takes precedence over those of `greedy`.
            model: The name of the model.
            is_stream: Whether the answer comes in parts.
            settings: The settings in place of those of `greedy`; None for these.

        Raises:
            InputError: If the server does not answer, or its answer has another form.
        """
        place = client.place_of("/v1/chat/completions")
        greedy = self.greedy if settings is None else settings
        data = {"model": model, **greedy, **self.shown_ids(is_stream=is_stream), **request}
        answer = await client.post("/v1/chat/completions", {**data, "stream": is_stream})
        if not is_stream or not answer.is_ok:
            return chat_answer(answer, place)
        if not isinstance(answer.data, list):
            raise InputError(f"no stream: {answer.text}", place=place, expected="text/event-stream")
        return streamed_answer(answer, place)

    async def stream(
        self, client: ServerClient, row: Row, model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a row's messages from a stream; None if the server is not asked for it. See `answer`."""
        request = {**chat_request(row), "max_tokens": limit}
        return await self.say(client, request, model, is_stream=True, settings=settings)

    def shown_ids(self, *, is_stream: bool) -> Mapping[str, Any]:
        """Return the fields that make a server show the ids of an answer."""
        return {}

    async def plain_ids(self, client: ServerClient, text: str) -> tuple[int, ...] | None:
        """Return the ids of a text in which no letters are control tokens; None if the server cannot be asked."""
        return None

    def without_grammar(self, row: Row, oracle: Oracle) -> Mapping[str, Any] | None:
        """Return the fields that free an answer of the server's grammar, and leave its prompt as it is.

        None if the server has no grammar for the answer to this row, or cannot be told to leave it out.

        Args:
            row: The conversation.
            oracle: The tokenizer.
        """
        return None

    def forced_request(self, request: Mapping[str, Any], answer: SpokenAnswer) -> Mapping[str, Any] | None:
        """Return a request that makes any model say an answer; None if this server cannot be made to.

        Args:
            request: The request whose answer is known.
            answer: The answer.
        """
        return None

    async def complete(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int, settings: Mapping[str, Any]
    ) -> ServedAnswer | None:
        """Return the answer to a prompt given as ids; None if the server does not take ids. See `answer`."""
        return None

    async def complete_as(self, client: ServerClient, ids: Sequence[int], name: str, limit: int) -> ServedAnswer | None:
        """Return the greedy answer of the adapter with a name; None if the server does not take ids. See `complete`."""
        return await self.complete(client, ids, name, limit, self.greedy)

    async def base_answer(
        self, client: ServerClient, ids: Sequence[int], model: str, limit: int
    ) -> ServedAnswer | None:
        """Return the greedy answer of the base without its adapter; None if the server cannot be asked for it."""
        return None


CHECKPOINT_GREEDY: Mapping[str, Any] = {
    **Server.greedy,
    # the model's generation_config.json may set each of these, and a penalty works at temperature 0, too
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
}
"""The settings of a greedy answer of a server that reads the checkpoint's `generation_config.json`."""
