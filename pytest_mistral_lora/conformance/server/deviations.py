"""The causes of a served prompt's difference: a named deviation, or the ids of another tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding, shown_difference
from pytest_mistral_lora.conformance.server.chat_causes import with_file
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerTarget
from pytest_mistral_lora.errors import InputError, NoTemplateError, OracleRejection, RowError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.chat.templates.deviations import Deviation
    from pytest_mistral_lora.serving.deviations import ReadDeviation

INJECTED = "control-literal"
"""The named deviation of text that becomes a control token."""

_SPELL = "spell the rows' texts by"
_COUNT = "have as many tokens as by"


@dataclass(frozen=True, slots=True)
class TakenRow:
    """A row that server and mistral-common both accept.

    Attributes:
        asked: The row.
        ids: The served ids, or the ids of the served text; None if both are hidden.
        count: The number of prompt tokens that the server reports; None if it does not report it.
    """

    asked: AskedRow
    ids: tuple[int, ...] | None
    count: int | None


class PromptDeviations:
    """The named deviations of the prompts of one server."""

    def __init__(self, target: ServerTarget) -> None:
        self._target = target

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The template that a server would render with: the folder's own, or the generated one."""
        from pytest_mistral_lora.chat.templates import ChatTemplate

        judge = self._target.judge
        try:
            return judge.template if judge.has_template else ChatTemplate(judge.tokenizer.fast)
        except NoTemplateError:
            return None

    def explain(self, asked_row: AskedRow, served: tuple[int, ...]) -> tuple[str, ...] | None:
        """Return the named deviations that explain the served ids of a prompt; None if they do not."""
        return self._explain(asked_row, lambda ids: ids == served)

    def explain_count(self, asked_row: AskedRow, count: int) -> tuple[str, ...] | None:
        """Return the named deviations that explain the number of tokens of a prompt; None if they do not."""
        return self._explain(asked_row, lambda ids: len(ids) == count)

    def _explain(self, asked_row: AskedRow, is_served: Callable[[tuple[int, ...]], bool]) -> tuple[str, ...] | None:
        from pytest_mistral_lora.chat.templates.compare import compare

        template = self._template
        if template is None:
            return None
        prompt = asked_row.prompt
        # a deviation of the answer is not a deviation of the prompt
        turn = asked_row.row.messages[len(prompt.messages)]
        answer = {key: turn[key] for key in ("role", "weight") if key in turn} | {"content": "x"}
        for own, read in self._as_read(prompt):
            try:
                named = compare(replace(read, messages=(*read.messages, answer)), self._target.oracle, template)
                text = template.render(read, generation_prompt=True)
            except (OracleRejection, RowError):
                continue
            # a server that accepts a row which the template refuses in training has another difference
            # nor may a server deviate by the template's own system prompt
            if named.differences or named.own_prompt or named.template is None:
                continue
            found = (*named.deviations, *own)
            if found and is_served(tuple(template.tokenizer(text, add_special_tokens=False)["input_ids"])):
                return found
        return None

    def _as_read(self, prompt: Row) -> Iterator[tuple[tuple[str, ...], Row]]:
        """Yield a prompt as servers read it, each time with the names of what this kind of server changes before."""
        from pytest_mistral_lora.serving.deviations import READ_DEVIATIONS

        own = [one for one in READ_DEVIATIONS if one.id in self._target.server.known_deviations("prompts")]
        for read in _as_read(prompt):
            yield (), read
            for deviation in own:
                if (changed := deviation.change(read)) is not read:
                    yield (deviation.id,), changed

    def are_unavoidable(self, explained: Collection[str]) -> bool:
        """Return whether text becomes a control token as it does in every prompt of this server and version.

        A server with a setting that prevents it is not excused.

        Args:
            explained: The named deviations that explain a prompt.
        """
        return INJECTED in explained and self._target.server.reads_rendered_text and not self._unknown(explained)

    def are_unknown(self, explained: Collection[str]) -> bool:
        """Return whether a named deviation is not known of the server and its version."""
        return bool(self._unknown(explained))

    def fix_of_kind(self, explained: Collection[str]) -> str:
        """Return the fix of prompts with named deviations that are not known of the server; empty without one."""
        from pytest_mistral_lora.serving.servers import SERVERS

        names = [name for name in explained if name != INJECTED] or list(explained)
        kinds = [
            server
            for server in SERVERS.of_this_package()
            if names and server.name != self._target.server.name and names[0] in server.known_deviations("prompts")
        ]
        if not kinds:
            return ""
        named = " or ".join(f"{server.name}@VERSION={self._target.url}" for server in kinds)
        titles = " or ".join(server.title for server in kinds)
        return (
            f"It is the number of a named deviation ({names[0]}). If {titles} is behind this address, name it: {named}."
        )

    def unknown_finding(
        self, asked_row: AskedRow, served: tuple[int, ...], explained: Collection[str]
    ) -> Finding | None:
        """Return the finding of a prompt with named deviations that are not known of the server, if any."""
        from pytest_mistral_lora.chat.diff import TokenDiff
        from pytest_mistral_lora.serving.servers import SERVERS

        target, version = self._target, self._target.served_version
        kind = target.server.name
        deviations = self._unknown(explained)
        if not deviations:
            return None
        names = ", ".join(deviation.id for deviation in deviations)
        kinds = {server.name: server for server in (*SERVERS.of_this_package(), target.server)}
        known = [
            f"{server.title} {versions}"
            for server in kinds.values()
            if (versions := server.known_deviations("prompts").get(deviations[0].id)) is not None
        ]
        served_by = f"{target.server.title} {version or 'of unknown version'}"
        found = f"{asked_row.name}: a named deviation ({names}) that is not known of {served_by}"
        expected = f"the ids of mistral-common; {deviations[0].id} is known of {', '.join(known) or 'no server'}"
        named = f"{kind}@VERSION={target.url}"
        if target.declared_name and not target.is_elsewhere:
            named = f"{named}, or `kind: {kind}@VERSION` in the recipe"
        fix = "" if version else with_file(target, f"Name the version, since the server reports none: {named}.")
        sides = (asked_row.expected or (), None), (served, None)
        diff = TokenDiff.of(*sides, target.oracle.piece, ("mistral-common", "served"))
        parts = shown_difference(diff, Place.of(asked_row.name))
        return Finding("ML902", found, Place.of(target.url), expected, row=asked_row.row.to_jsonl(), fix=fix, **parts)

    def _unknown(self, explained: Collection[str]) -> list[Deviation | ReadDeviation]:
        """Return the named deviations that are not known of the server and its version."""
        from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS
        from pytest_mistral_lora.serving.deviations import READ_DEVIATIONS

        server, version = self._target.server, self._target.served_version
        every: tuple[Deviation | ReadDeviation, ...] = (*DEVIATIONS, *READ_DEVIATIONS)
        named = (deviation for deviation in every if deviation.id in explained)
        return [deviation for deviation in named if not server.has_deviation("prompts", deviation.id, version)]


def other_tokenizer_finding(target: ServerTarget, taken: Sequence[TakenRow]) -> Finding | None:
    """Return the finding of prompts from another shipped tokenizer; None if no other tokenizer makes most of them.

    The proof is the ids of the prompts, or else the texts that they spell; for hidden ids, the number of tokens.
    """
    from pytest_mistral_lora.chat.diff import split_at_markers
    from pytest_mistral_lora.chat.oracle import SHIPPED
    from pytest_mistral_lora.conformance.encoded.row_faults import ids_of, other_oracles
    from pytest_mistral_lora.conformance.encoded.text_reasons import spells_row

    prompts = [
        (taken_row.asked.prompt, found)
        for taken_row in taken
        if not isinstance(found := taken_row.asked.served, InputError)
    ]
    shown = [(row, found.ids) for row, found in prompts if found.ids is not None]
    counted = [] if shown else [(row, found.count) for row, found in prompts if found.count is not None]

    def spells(row: Row, ids: Sequence[int], oracle: Oracle) -> bool:
        # a smaller vocabulary lacks some ids
        return spells_row(row, split_at_markers([token for token in ids if 0 <= token < oracle.vocab_size], oracle))

    # with the share below which the named tokenizer is refuted, and the share from which another is proven: versions of
    # one vocabulary share most prompts, and a number is a weak proof
    proofs: list[tuple[str, float, float, Callable[[Oracle], list[bool]]]] = [
        ("have the ids of", 1.0, 0.5, lambda oracle: [ids_of(row, oracle) == ids for row, ids in shown]),
        (_SPELL, 0.5, 0.5, lambda oracle: [spells(row, ids, oracle) for row, ids in shown]),
        (_COUNT, 0.5, 0.75, lambda oracle: [len(ids_of(row, oracle) or ()) == count for row, count in counted]),
    ]
    for words, below, least, judge in proofs:
        share_of_named = mean(judge(target.oracle) or [True])
        shares = (
            {name: mean(judge(other)) for name, other in other_oracles(target.oracle)} if share_of_named < below else {}
        )
        most = max(shares.values(), default=0.0)
        if most > share_of_named and most >= least:
            names = [name for name, share in shares.items() if share == most]
            path, rule = target.oracle.path, "ML902" if any(taken_row.ids for taken_row in taken) else "ML904"
            named = next((name for name, file in SHIPPED.items() if file == path.name), str(path))
            text = f"{most:.0%} of the prompts {words} {' or '.join(names)}, and {share_of_named:.0%} {words} {named}"
            name = f"If the model was trained with {' or '.join(names)}, name it: --tokenizer {names[-1]}."
            if words == _SPELL:
                # another version, or a fault in each prompt
                name = f"Name the tokenizer of the served model, whose vocabulary is {names[0]}'s: --tokenizer FOLDER."
            fix = with_file(target, f"{name} Else another model is served, or one with another's tokenizer.")
            return Finding(rule, text, Place.of(target.url), f"{named}, the tokenizer that you named", fix=fix)
    return None


def _as_read(prompt: Row) -> Iterator[Row]:
    """Yield a prompt as sent, and as servers read it: arguments as objects, then also tools without further keys."""
    from pytest_mistral_lora.serving.server import parsed, with_arguments

    yield prompt
    prompt = replace(prompt, messages=tuple(with_arguments(message, parsed) for message in prompt.messages))
    yield prompt
    functions = [tool["function"] for tool in prompt.tools or ()]
    known = ({key: function.get(key, "") for key in ("name", "description", "parameters")} for function in functions)
    yield replace(prompt, tools=tuple({"type": "function", "function": function} for function in known) or None)
