"""The target of a running server, its name, and all requests to it, each sent once."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.conformance.targets import JudgedTarget, Target
from pytest_mistral_lora.errors import EntryPointError, InputError, OracleRejection, RowError, and_more
from pytest_mistral_lora.records.asking_limits import AskingLimits

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.conformance.answer.parsers import ParsedAnswers
    from pytest_mistral_lora.conformance.finding import Finding
    from pytest_mistral_lora.records.known_answers import KnownAnswer
    from pytest_mistral_lora.records.transcripts import Transcript
    from pytest_mistral_lora.serving.client import ServerClient
    from pytest_mistral_lora.serving.forced_answers import ForcedAnswer
    from pytest_mistral_lora.serving.kept import KeptAnswers
    from pytest_mistral_lora.serving.replay import Outcome, Replayed
    from pytest_mistral_lora.serving.server import ServedPrompt, Server, ServerFacts

T = TypeVar("T")

PARSERS = "-parsers"
"""What follows the name of a kind of server if its installed parsers are meant; they have a Python for an address."""

_MOST_NAMES = 8

NOT_ASKED = "unreadable, without an answer, fill-in-the-middle, or with settings that each server names otherwise"
"""The reasons why a row is not sent."""


ANSWERS_SECONDS = 1800.0
"""The most time for all known answers of a server: each request has a limit of its own, and can use it up."""


def _awaited(answer: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine."""
    import asyncio  # each command line imports this module, and few ask a server

    return asyncio.run(answer)


@dataclass(frozen=True, slots=True)
class AskedRow:
    """A row that was sent to a server.

    Attributes:
        name: Name of the row.
        row: The row, with an answer after the prompt.
        expected: The ids of mistral-common; None if it refuses the prompt.
        refusal: mistral-common's reason; empty if it accepts the prompt.
        served: The server's prompt, or the error of the request.
    """

    name: str
    row: Row
    expected: tuple[int, ...] | None
    refusal: str
    served: ServedPrompt | InputError

    @property
    def prompt(self) -> Row:
        """The messages before the last answer."""
        return replace(self.row, messages=self.row.messages[: self.row.assistant_groups()[-1][0]])


@dataclass(frozen=True, slots=True)
class ServerAnswers:
    """All requests to a server in a run.

    Attributes:
        facts: Its version and models.
        model: The model that answered.
        rows: The rows.
        left_out: The number of given rows that cannot be sent: see `NOT_ASKED`.
        spelled: The ids of a text that spells the control tokens, as the server encodes it without parsing them; None
            if it cannot be asked.
    """

    facts: ServerFacts
    model: str
    rows: tuple[AskedRow, ...]
    left_out: int = 0
    spelled: tuple[int, ...] | None = None


class NotServedError(InputError):
    """The server has no model of the name that the adapter's folder declares."""

    @classmethod
    def of(cls, target: ServerTarget, facts: ServerFacts) -> NotServedError:
        """Return the error of a target, by what its server lists."""
        names = ", ".join(facts.models[:_MOST_NAMES]) or "none"
        found = f"serves {names}{and_more(_MOST_NAMES, len(facts.models))}"
        return cls(found, place=target.url, expected=f"{target.declared_name}, {target.declared_by}")


def in_words_of(server: Server, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Return findings with the fixes in the options of a kind of server."""
    from pytest_mistral_lora.conformance.finding import in_words

    return in_words(findings, server.fixes())


@dataclass(frozen=True)
class ServerTarget(JudgedTarget):
    """A running server.

    Attributes:
        judge: The target whose tokenizer its prompts are compared with.
        kind: The kind of server: a key of `SERVERS`, a script, or `auto` to recognise it.
        url: Its address.
        version: Its version, if it does not report one; else empty.
        model: The model to ask; empty for the first that it lists.
        rows: Files of rows to ask in place of the packaged ones.
        given: Rows to ask in place of both.
        precision: The precision of the served weights, a key of `TOLERANCES`; empty for the one that it reports.
        golden: Golden transcripts to replay, files or folders.
        adapter: The folder of the served adapter or merged model, whose transcripts are replayed; or None.
        named_adapters: The folders of adapters with transcripts, by the names under which the server serves them.
        asks_answers: Whether the known answers are asked for, too: the subject `answer`.
        probe_answers: The names of the known answers that its model says, if the user states them; None if it is not
            stated.
        given_answers: Known answers to ask for in place of the packaged ones.
        progress: Called after each answer with what is asked, `rows`, `transcripts` or `known answers`, and their
            number.
        limits: The limits of its requests, and the file that keeps its answers.
    """

    kind: str = "openai"
    url: str = ""
    version: str = ""
    model: str = ""
    rows: tuple[Path, ...] = ()
    given: tuple[Row, ...] = ()
    precision: str = ""
    golden: tuple[Path, ...] = ()
    adapter: Path | None = None
    named_adapters: tuple[tuple[str, Path], ...] = ()
    asks_answers: bool = False
    probe_answers: frozenset[str] | None = None
    given_answers: tuple[KnownAnswer, ...] = ()
    progress: Callable[[str, int], object] = field(default=lambda asked, total: None, compare=False)
    limits: AskingLimits = field(default_factory=AskingLimits)

    @KeptProperty
    def recognised(self) -> tuple[Server, str]:
        """The kind of server, and the endpoint that identified it; empty if the kind was named.

        Raises:
            InputError: If the server is to be recognised, but is unreachable or of an unknown kind.
        """
        from pytest_mistral_lora.records.addresses import require_url
        from pytest_mistral_lora.serving.servers import RECOGNISED, find_server, recognise_server

        if self.kind != RECOGNISED:
            return find_server(self.kind), ""
        return _awaited(recognise_server(require_url(self.url), self.limits.at_once))

    @property
    def server(self) -> Server:
        """The kind of server: see `recognised`."""
        return self.recognised[0]

    @KeptProperty
    def declared(self) -> Mapping[str, Any] | None:
        """The deployment that the adapter's folder declares; None without one."""
        from pytest_mistral_lora.records.adapter_folder import AdapterFolder
        from pytest_mistral_lora.records.manifest import DEPLOYMENT

        if self.adapter is None or not self.adapter.is_dir():
            return None
        manifest = AdapterFolder(self.adapter).valid_manifest
        found: Mapping[str, Any] | None = None if manifest is None else manifest.data.get(DEPLOYMENT)
        return found

    @property
    def declared_name(self) -> str:
        """The name under which production serves the adapter; empty if it is not declared."""
        return "" if self.declared is None else str(self.declared["name"])

    @property
    def declared_by(self) -> str:
        """Who declares the deployment, in words."""
        return f"as {self.adapter}/manifest.json declares"

    @property
    def is_elsewhere(self) -> bool:
        """Whether the folder declares the server of its deployment, and it is not this one."""
        from pytest_mistral_lora.records.addresses import without_endpoint

        server: Mapping[str, Any] = (self.declared or {}).get("server") or {"url": self.url}
        return without_endpoint(str(server["url"])) != without_endpoint(self.url)

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings with the fixes in the options of this kind of server, if it is known."""
        try:
            server = self.server
        except InputError:  # nobody answers, or the kind does not load: a check says so
            return findings
        return in_words_of(server, findings)

    @property
    def served_version(self) -> str:
        """The version that the server reports, or else the named version; may be empty."""
        return self.answers.facts.version or self.version

    @property
    def served_by(self) -> str:
        """The server, with its version."""
        return f"{self.server.title} {self.served_version}".strip()

    @KeptProperty
    def answers(self) -> ServerAnswers:
        """The server's answers to the packaged rows, requested when the first check needs them.

        Raises:
            InputError: If the server is unreachable, is of another kind, or does not serve the model.
            TokenizerError: If the tokenizer does not load.
        """
        return _awaited(self._ask(self.server))

    async def _ask(self, server: Server) -> ServerAnswers:
        from pytest_mistral_lora.chat.row_files import scan_rows
        from pytest_mistral_lora.conformance.server.script import ask_script
        from pytest_mistral_lora.serving.client import SECONDS
        from pytest_mistral_lora.serving.server import ServerFacts
        from pytest_mistral_lora.serving.servers import ScriptedServer, ask_prompts, require_kind

        asked_rows = self.asked_rows()
        read = self.given or [row for path in self.rows for row in scan_rows(path)]
        if not asked_rows:
            error = next((row for row in read if isinstance(row, RowError)), RowError(f"all are {NOT_ASKED}"))
            step, place = "Look at them: mistral-lora check FILE --tokenizer NAME.", ", ".join(map(str, self.rows))
            expected = error.expected or "rows that end with the answer to a prompt"
            found = f"no row to ask: {error.found}"
            raise InputError(found, place=error.place or place, expected=expected, next_step=step)
        rows = [asked_row.row for asked_row in asked_rows]
        prompts: Sequence[ServedPrompt | InputError]
        spelled = None
        if isinstance(server, ScriptedServer):
            versions, prompts = ask_script(server.file, self.url, self.model, rows)
            model = self.model or "of the script"
            facts = ServerFacts(versions, (model,))
        else:
            async with self.client(SECONDS) as client:
                facts = await server.facts(client)
                if not facts.version:
                    await require_kind(server, self.url, self.limits.at_once)
                model = self._chosen(facts)
                if client.kept is not None:
                    kind = {"kind": server.name, "version": facts.version, "models": facts.models, "model": model}
                    client.kept.open({"url": self.url, **kind})
                prompts = await ask_prompts(server, client, rows, model, lambda: self.progress("rows", len(rows)))
                spelled = await self._spelled(server, client)
        served = (replace(asked_row, served=prompt) for asked_row, prompt in zip(asked_rows, prompts, strict=True))
        return ServerAnswers(facts, model, tuple(served), len(read or asked_rows) - len(asked_rows), spelled)

    async def _spelled(self, server: Server, client: ServerClient) -> tuple[int, ...] | None:
        literals = [text for text in self.oracle.control_tokens.values() if not text.startswith("<SPECIAL")]
        try:
            return await server.plain_ids(client, " ".join(literals))
        except InputError:  # the rows say so if it does not answer
            return None

    @KeptProperty
    def _kept_answers(self) -> KeptAnswers | None:
        from pytest_mistral_lora.serving.kept import KeptAnswers

        return None if self.limits.kept is None else KeptAnswers(self.limits.kept)

    def client(self, seconds: float) -> ServerClient:
        """Return a connection to the server whose requests have a limit, unless the user has set one."""
        from pytest_mistral_lora.records.addresses import require_url
        from pytest_mistral_lora.serving.client import ServerClient

        limits = self.limits
        return ServerClient(require_url(self.url), limits.seconds or seconds, limits.at_once, self._kept_answers)

    def _chosen(self, facts: ServerFacts) -> str:
        """Return the name of the model to ask; with transcripts, the declared one, or the adapter served by its name.

        Without either, it is the only adapter, or the first model.
        """
        model = self.model
        if not model and self.declared_name and not self.is_elsewhere:
            if self.declared_name not in facts.models:
                raise NotServedError.of(self, facts)
            return self.declared_name
        if not model and facts.adapters and (self.adapter or self.golden):
            named = [adapter for adapter in facts.adapters if self.adapter and adapter == self.adapter.name]
            if len(named or facts.adapters) > 1:
                expected, step = f"one of: {', '.join(facts.adapters)}", "Name the adapter: --model NAME."
                raise InputError("several adapters are served", place=self.url, expected=expected, next_step=step)
            model = (named or facts.adapters)[0]
        model = model or next(iter(facts.models), "")
        if model not in facts.models:
            found, step = f"the model {model!r} is not served", "Name a model that the server lists: --model NAME."
            expected = f"one of: {', '.join(facts.models) or 'none'}"
            raise InputError(found, place=self.url, expected=expected, next_step=step)
        return model

    @KeptProperty
    def transcripts(self) -> tuple[Sequence[Transcript], Sequence[Finding]]:
        """The golden transcripts of conversations whose prompts have the tokenizer's ids, and the others' findings."""
        from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

        return self._read(self.golden or (() if self.adapter is None else (self.adapter / TRANSCRIPTS,)))

    @KeptProperty
    def named_transcripts(self) -> Mapping[str, Sequence[Transcript]]:
        """The transcripts of each named adapter whose prompts have the tokenizer's ids, by its name."""
        return {name: self._read((self.places_of(name),))[0] for name, _ in self.named_adapters}

    def places_of(self, name: str) -> Path:
        """Return the folder with the transcripts of a named adapter: `transcripts` in its folder, or the folder."""
        from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

        folder = dict(self.named_adapters)[name]
        return folder / TRANSCRIPTS if (folder / TRANSCRIPTS).is_dir() else folder

    def _read(self, places: Sequence[Path]) -> tuple[Sequence[Transcript], Sequence[Finding]]:
        """Return the transcripts of folders whose prompts have the tokenizer's ids, and the findings of the others."""
        from pytest_mistral_lora.checkpoint.encoder import make_encoder
        from pytest_mistral_lora.conformance.transcript import prompt_finding, read_transcripts
        from pytest_mistral_lora.records.goldens import golden_paths

        files = [file for place in places for file in (golden_paths(place) if place.is_dir() else [place])]
        found, wrong = read_transcripts(files)
        sound = []
        for transcript in found:
            finding = prompt_finding(make_encoder(transcript.tokenizer["backend"], self.tokenizer), transcript)
            if finding is None:
                # a server is asked by messages, too, which a conversation alone has
                sound += [transcript] if transcript.row.kind.is_chat else []
            else:
                wrong = [*wrong, finding]
        return sound, wrong

    @KeptProperty
    def replayed(self) -> tuple[Replayed, ...]:
        """The answers to the transcripts' prompts, requested when the first check needs them.

        Raises:
            InputError: As for `answers`.
        """
        from pytest_mistral_lora.serving.replay import replay

        transcripts, model = self.transcripts[0], self.answers.model
        progress = partial(self.progress, "transcripts", len(transcripts))
        return self._asked(lambda client: replay(self.server, client, transcripts, model, progress))

    @property
    def drafts(self) -> bool:
        """Whether the server drafts tokens (speculative decoding), of which it gives no true log-probability."""
        from pytest_mistral_lora.conformance.server.failures import answered

        outcomes = (outcome for one in self.replayed for outcome in (one.by_ids, one.by_messages, one.base))
        answers = (answered(outcome) for outcome in outcomes)
        return self.answers.facts.drafts or any(answer.is_drafted for answer in answers if answer)

    def _asked(self, ask: Callable[[ServerClient], Awaitable[T]]) -> T:
        """Return what is asked of the server by a client that is open for this alone."""
        from pytest_mistral_lora.serving.replay import SECONDS

        async def ask_once() -> T:
            async with self.client(SECONDS) as client:
                return await ask(client)

        return _awaited(ask_once())

    def answer_without_grammar(self, transcript: Transcript) -> Outcome:
        """Ask for the answer to the messages of a transcript, free of the server's grammar; None if it has none.

        Raises:
            InputError: As for `answers`.
        """
        from pytest_mistral_lora.serving.replay import ask_without_grammar

        model = self.answers.model
        return self._asked(lambda client: ask_without_grammar(self.server, client, transcript, self.oracle, model))

    def ids_without_grammar(self, transcript: Transcript) -> Outcome:
        """Ask for the answer to the ids of a transcript, free of a default grammar; None if the server can have none.

        Raises:
            InputError: As for `answers`.
        """
        from pytest_mistral_lora.serving.replay import ask_ids_without_grammar

        model = self.answers.model
        return self._asked(lambda client: ask_ids_without_grammar(self.server, client, transcript, model))

    @KeptProperty
    def forced_answers(self) -> tuple[ForcedAnswer, ...]:
        """The known answers that fit the tokenizer, and what a client gets of each, when the first check needs them.

        Raises:
            InputError: As for `answers`.
        """
        return _awaited(self._force(self.answers.model))

    async def _force(self, model: str) -> tuple[ForcedAnswer, ...]:
        from asyncio import timeout

        from pytest_mistral_lora.records.known_answers import known_answers
        from pytest_mistral_lora.serving.forced_answers import force_answers
        from pytest_mistral_lora.serving.replay import SECONDS

        fitting = [answer for answer in self.given_answers or known_answers() if answer.fits(self.oracle)]
        came = 0

        def done() -> None:
            nonlocal came
            came += 1
            self.progress("known answers", len(fitting))

        try:
            async with timeout(ANSWERS_SECONDS), self.client(SECONDS) as client:
                return await force_answers(
                    self.server, client, fitting, self.oracle, model, declared=self.probe_answers, done=done
                )
        except TimeoutError as error:
            found = f"{came} of {len(fitting)} known answers came within {ANSWERS_SECONDS:,.0f} seconds"
            step = "Ask again when the server has nothing else to do, or leave --answers out."
            raise InputError(found, place=self.url, expected="all of them", next_step=step) from error

    def asked_rows(self) -> list[AskedRow]:
        """Return the rows that a chat request can hold, each with mistral-common's prompt."""
        from pytest_mistral_lora.chat.row_files import scan_rows
        from pytest_mistral_lora.chat.rows import Row
        from pytest_mistral_lora.records.goldens import packaged_cases
        from pytest_mistral_lora.serving.server import ServedPrompt

        if self.given:
            named = [(f"row {number}", row) for number, row in enumerate(self.given, start=1)]
        elif self.rows:
            # an unreadable row is a finding of the dataset, not of the server
            read = (row for path in self.rows for row in scan_rows(path))
            named = [(str(row.place), row) for row in read if isinstance(row, Row)]
        else:
            cases = (case for case in packaged_cases() if self.oracle.facts in case.versions and not case.needs)
            named = [(case.name, case.row) for case in cases]
        found = []
        for name, row in named:
            # each server has its own request keys for settings and thinking
            if row.reasoning_effort is not None or row.response_format is not None or not row.assistant_groups():
                continue
            if not row.kind.is_chat:
                continue
            expected, refusal = None, ""
            try:
                expected = self.oracle.encode_prompt(row)
            except (OracleRejection, RowError) as error:
                refusal = error.found
            found.append(AskedRow(name, row, expected, refusal, ServedPrompt()))
        return found


@dataclass(frozen=True)
class ParsersTarget(JudgedTarget):
    """The parsers of an installed server, which are given the ids of known answers, without a server and a model.

    Attributes:
        judge: The target whose tokenizer reads and writes the ids.
        kind: The name of the kind of server.
        python: The Python of the environment that the server is installed in.
        given_answers: Known answers in place of the packaged ones.
    """

    kind: str = ""
    python: Path = Path()
    given_answers: tuple[KnownAnswer, ...] = ()
    asks_answers: ClassVar[bool] = True

    @property
    def url(self) -> str:
        """The Python, which stands where a server has its address."""
        return str(self.python)

    @property
    def server(self) -> Server:
        """The kind of server that the parsers are of."""
        from pytest_mistral_lora.serving.servers import SERVERS

        return SERVERS[self.kind]

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings with the fixes in the options of the server that the parsers are of."""
        return in_words_of(self.server, findings)

    @KeptProperty
    def parsed(self) -> ParsedAnswers:
        """What the parsers make of each answer, when the first check needs it.

        Raises:
            RunnerError: If the server is not installed there, or its parsers cannot be run.
            TokenizerError: If the tokenizer does not load.
        """
        from pytest_mistral_lora.conformance.answer.parsers import parse_answers
        from pytest_mistral_lora.records.known_answers import known_answers

        answers = [answer for answer in self.given_answers or known_answers() if answer.fits(self.oracle)]
        return parse_answers(self.server, self.python, self.oracle, answers)

    @property
    def served_version(self) -> str:
        """The version of the server."""
        return self.parsed.version

    @property
    def served_by(self) -> str:
        """The server of the parsers, with its version."""
        return f"{self.server.title} {self.served_version}"

    @property
    def forced_answers(self) -> tuple[ForcedAnswer, ...]:
        """The known answers that fit the tokenizer, and what the parsers make of each.

        Raises:
            InputError: As for `parsed`.
        """
        return self.parsed.answers


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """A server as the user names it: `URL`, or `NAME=URL`; `@VERSION` and `:PRECISION` may follow NAME.

    Attributes:
        kind: The kind of server: a key of `SERVERS`, a script, `auto`, or a key with `PARSERS` behind it.
        url: Its address; of parsers, the Python of their environment.
        version: Its version, if it does not report one; else empty.
        precision: The precision of its weights; empty for the reported one.
    """

    kind: str
    url: str
    version: str = ""
    precision: str = ""

    @classmethod
    def parse(cls, text: str) -> ServerChoice:
        """Return the server that a text names.

        Raises:
            InputError: If the kind or the precision is unknown, the address is invalid, or there is no such Python.
        """
        from pytest_mistral_lora.records.addresses import require_url, without_endpoint
        from pytest_mistral_lora.records.judgement import TOLERANCES
        from pytest_mistral_lora.serving.servers import RECOGNISED, find_server

        # an address may also have an equals sign
        is_bare = text.startswith(("http://", "https://")) or "=" not in text
        name, _, url = ("", "", text) if is_bare else text.partition("=")
        kind, _, precision = name.partition(":")
        kind, _, version = (kind or RECOGNISED, "", "") if kind.endswith(".py") or not kind else kind.partition("@")
        if precision and precision not in TOLERANCES:
            raise InputError(f"unknown precision {precision!r}", expected=f"one of {', '.join(TOLERANCES)}")
        if kind.endswith(PARSERS):
            server = find_server(kind.removesuffix(PARSERS))
            if server.parsers is None:
                raise InputError(f"no parsers of {server.title} are known", expected="the address of a server")
            if not os.access(url, os.X_OK) or Path(url).is_dir():
                expected = f"the Python of an environment with {server.title}, such as /opt/server/bin/python"
                raise InputError("no program", place=url, expected=expected)
            return cls(kind, url)
        if kind != RECOGNISED:
            # the checks say so if it is of another package, and does not load
            with suppress(EntryPointError):
                find_server(kind)
        url = require_url(url)
        if not kind.endswith(".py"):
            url = without_endpoint(url)
        return cls(kind, url, version, precision)

    @property
    def is_parsers(self) -> bool:
        """Whether the parsers of an installed server are meant."""
        return self.kind.endswith(PARSERS)

    def __str__(self) -> str:
        """Return the server as the user named it."""
        version = f"@{self.version}" if self.version else ""
        return f"{self.kind}{version}{f':{self.precision}' if self.precision else ''}={self.url}"

    @property
    def name(self) -> Path:
        """A name for the server: its kind and address, without the scheme."""
        if self.is_parsers:
            return Path(self.kind)
        return Path(f"{Path(self.kind).stem}-{self.url.partition('://')[2].replace('/', '-')}")

    def target(
        self, name: str, judge: Target, adapter: Path | None = None, **more: Any
    ) -> ServerTarget | ParsersTarget:
        """Return the target of the server; `more` are further attributes, which parsers do not have."""
        if self.is_parsers:
            return ParsersTarget(name, judge=judge, kind=self.kind.removesuffix(PARSERS), python=Path(self.url))
        server_facts: dict[str, Any] = {
            "kind": self.kind,
            "url": self.url,
            "version": self.version,
            "precision": self.precision,
        }
        return ServerTarget(name, judge=judge, adapter=adapter, **server_facts, **more)
