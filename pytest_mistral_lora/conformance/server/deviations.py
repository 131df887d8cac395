"""The named deviations of served prompts: those that explain a difference, and if the table has them of a server."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerTarget
from pytest_mistral_lora.errors import NoTemplateError, OracleRejection, RowError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.chat.templates import ChatTemplate

INJECTED = "control-literal"
"""The named deviation of text that becomes a control token."""


class PromptDeviations:
    """The named deviations of the prompts of one server."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The template that a server would render by: the folder's own, or the generated one."""
        from pytest_mistral_lora.chat.templates import ChatTemplate

        judge = self._target.judge
        try:
            return judge.template if judge.has_template else ChatTemplate(judge.tokenizer.fast)
        except NoTemplateError:
            return None

    def explain(self, asked: AskedRow, served: tuple[int, ...]) -> tuple[str, ...] | None:
        """Return the named deviations that explain the served ids of a prompt; None if they do not."""
        from pytest_mistral_lora.chat.templates.compare import compare

        template = self._template
        if template is None:
            return None
        prompt = asked.prompt
        # a deviation of the answer itself is none of the prompt
        own = asked.row.messages[len(prompt.messages)]
        answer = {key: own[key] for key in ("role", "weight") if key in own} | {"content": "x"}
        for read in _as_read(prompt):
            try:
                named = compare(replace(read, messages=(*read.messages, answer)), self._target.oracle, template)
                text = template.render(read, generation_prompt=True)
            except (OracleRejection, RowError):
                continue
            # of a row that the template refuses in training, a server that takes it has another difference
            if named.unexplained or not named.deviations or named.template is None:
                continue
            if tuple(template.tokenizer(text, add_special_tokens=False)["input_ids"]) == served:
                return named.deviations
        return None

    def unknown_finding(self, asked: AskedRow, served: tuple[int, ...], explained: Collection[str]) -> Finding | None:
        """Return the finding of a prompt with named deviations that the table does not have of the server, if any."""
        from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS
        from pytest_mistral_lora.conformance.alignment import Alignment
        from pytest_mistral_lora.serving.servers import SERVERS

        target, version = self._target, self._target.served_version
        kind = target.server.name
        deviations = [one for one in DEVIATIONS if one.id in explained and not one.known_of(kind, version)]
        if not deviations:
            return None
        names = ", ".join(deviation.id for deviation in deviations)
        known = [f"{SERVERS[one].title} {versions}" for one, versions in deviations[0].servers.items()]
        server = f"{target.server.title} {version or 'of unknown version'}"
        found = f"{asked.name}: a named deviation ({names}) that is not known of {server}"
        expected = f"the ids of mistral-common; {deviations[0].id} is known of {', '.join(known) or 'no server'}"
        named = f"{kind}@VERSION={target.url}"
        fix = "" if version else f"Name the version, since the server reports none: {named}"
        sides = (asked.expected or (), None), (served, None)
        parts = Alignment(*sides, target.oracle.piece, ("mistral-common", "served")).parts(asked.name)
        return Finding("ML902", found, target.url, expected, row=asked.row.to_jsonl(), fix=fix, **parts)


def _as_read(prompt: Row) -> Iterator[Row]:
    """Yield a prompt as it was sent, and as servers read it: arguments as objects, then tools without further keys."""
    from pytest_mistral_lora.serving.server import parsed, with_arguments

    yield prompt
    prompt = replace(prompt, messages=tuple(with_arguments(message, parsed) for message in prompt.messages))
    # vLLM
    yield prompt
    functions = [tool["function"] for tool in prompt.tools or ()]
    known = ({key: one.get(key, "") for key in ("name", "description", "parameters")} for one in functions)
    # llama.cpp
    yield replace(prompt, tools=tuple({"type": "function", "function": one} for one in known) or None)
