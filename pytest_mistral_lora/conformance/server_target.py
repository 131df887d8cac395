"""The target of a running server, and all that it is asked, once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.causes import KeptProperty
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError, OracleRejection, RowError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.serving.servers import ServedPrompt, Server, ServerFacts


@dataclass(frozen=True, slots=True)
class AskedRow:
    """A row whose prompt a server was asked for.

    Attributes:
        name: Name of the row.
        row: The row, with an answer behind the prompt.
        expected: The ids of mistral-common; None if it refuses the prompt.
        refusal: The reason of mistral-common; empty if it takes the prompt.
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
    """All that a server was asked in a run.

    Attributes:
        facts: Its version and models.
        model: The model that was asked.
        rows: The rows.
    """

    facts: ServerFacts
    model: str
    rows: tuple[AskedRow, ...]


@dataclass(frozen=True)
class ServerTarget(Target):
    """A running server.

    Attributes:
        judge: The target whose tokenizer its prompts are held to.
        kind: The kind of server, a key of `SERVERS`.
        url: Its address.
        model: The model to ask; empty for the first that it lists.
        rows: Files of rows to ask in place of the packaged ones.
    """

    judge: Target = field(default_factory=lambda: Target("spm-v3"))
    kind: str = "openai"
    url: str = ""
    model: str = ""
    rows: tuple[Path, ...] = ()

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer that the prompts are held to."""
        return self.judge.tokenizer

    @property
    def server(self) -> Server:
        """The kind of server."""
        from pytest_mistral_lora.serving.servers import find_server

        return find_server(self.kind)

    @KeptProperty
    def answers(self) -> ServerAnswers:
        """The server's answers to the packaged rows, asked when the first check needs them.

        Raises:
            InputError: If it is not there, is not of the kind, or does not serve the model.
            TokenizerError: If the tokenizer does not load.
        """
        return asyncio.run(self._ask())

    async def _ask(self) -> ServerAnswers:
        from pytest_mistral_lora.serving.client import ServerClient, require_url
        from pytest_mistral_lora.serving.servers import ask_prompts

        asked = list(self._rows())
        async with ServerClient(require_url(self.url)) as client:
            facts = await self.server.facts(client)
            model = self.model or next(iter(facts.models), "")
            if model not in facts.models:
                served = ", ".join(facts.models) or "none"
                raise InputError(f"the model {model!r} is not served", place=self.url, expected=f"one of: {served}")
            prompts = await ask_prompts(self.server, client, [one.row for one in asked], model)
        rows = tuple(replace(one, served=prompt) for one, prompt in zip(asked, prompts, strict=True))
        return ServerAnswers(facts, model, rows)

    def _rows(self) -> list[AskedRow]:
        """Return the rows that a chat request can hold, each with mistral-common's prompt."""
        from pytest_mistral_lora.serving.servers import ServedPrompt

        found = []
        for name, row in self._named_rows():
            # settings and thinking are parts of a request that each server names otherwise
            if row.reasoning_effort is not None or row.response_format is not None or not row.assistant_groups():
                continue
            expected, refusal = None, ""
            try:
                expected = self.oracle.encode_prompt(row)
            except (OracleRejection, RowError) as error:
                refusal = error.found
            found.append(AskedRow(name, row, expected, refusal, ServedPrompt()))
        return found

    def _named_rows(self) -> Iterator[tuple[str, Row]]:
        from pytest_mistral_lora.chat.rows import Row, scan_rows
        from pytest_mistral_lora.records.goldens import packaged_cases

        for path in self.rows:
            # a row that cannot be read is a finding of the dataset, not of the server
            yield from ((row.place, row) for row in scan_rows(path) if isinstance(row, Row))
        if not self.rows:
            cases = (one for one in packaged_cases() if self.oracle.version in one.versions and not one.needs)
            yield from ((one.name, one.row) for one in cases)


def parse_server(text: str) -> tuple[str, str]:
    """Return the kind and the address of a server that is written as `NAME=URL`.

    Raises:
        InputError: If the kind is unknown, or the address is none.
    """
    from pytest_mistral_lora.serving.client import require_url
    from pytest_mistral_lora.serving.servers import find_server

    name, _, url = text.partition("=")
    return find_server(name).name, require_url(url)


def server_name(kind: str, url: str) -> Path:
    """Return a name for a server: its kind and address, without the scheme."""
    return Path(f"{kind}-{url.partition('://')[2].replace('/', '-')}")
