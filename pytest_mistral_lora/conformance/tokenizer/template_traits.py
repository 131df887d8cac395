"""The traits of a stored chat template, whatever the tokenizer version: read from its syntax tree and renderings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.renderer import environment
from pytest_mistral_lora.checkpoint.tokenizer_folder import GENERATION_CONFIG, MODEL_CONFIG
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.template import UNSTEADY
from pytest_mistral_lora.errors import RenderError, RowError, TokenizerError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.templates import ChatTemplate


_CLOCK = ("strftime_now", "now", "datetime", "date_today")


def clock_reads(source: str) -> list[str]:
    """Return the names of the clock functions that a template calls, in order.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    calls = (call.node for call in environment().parse(source).find_all(nodes.Call))
    return sorted({call.name for call in calls if isinstance(call, nodes.Name) and call.name in _CLOCK})


def forbidden_access(source: str) -> list[str]:
    """Return the private attributes and other templates that a template asks for; no chat template needs them.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    tree = environment().parse(source)
    # Attributes are read as `a.b`, as `a["b"]`, and by the filters `attr` and `map`.
    names = [get.attr for get in tree.find_all(nodes.Getattr)]
    constants = [item.arg for item in tree.find_all(nodes.Getitem)]
    constants += [arg for one in tree.find_all(nodes.Filter) if one.name in ("attr", "map") for arg in one.args]
    names += [one.value for one in constants if isinstance(one, nodes.Const) and isinstance(one.value, str)]
    found = [f"the attribute {name!r}" for name in names if name.startswith("__")]
    loads = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    return [*dict.fromkeys(found), *("another template" for _ in tree.find_all(loads))]


_SYSTEM = "Answer in one short verse."
_USER = "What makes the thunder roll?"
_ANSWER = "Warm air that bursts apart."
_USER_2 = "And the rainbow?"
_ANSWER_2 = "Light that bends in drops."


def _row(*texts: str, system: str = "") -> Row:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Row((*([{"role": "system", "content": system}] if system else []), *messages), None, "")


PLAIN = {"a question": _row(_USER), "a question and its answer": _row(_USER, _ANSWER)}
"""Conversations that every template must render."""

SYSTEM = {
    "a system prompt and a question": _row(_USER, system=_SYSTEM),
    "a system prompt, a question and its answer": _row(_USER, _ANSWER, system=_SYSTEM),
    "a system prompt and two questions with answers": _row(_USER, _ANSWER, _USER_2, _ANSWER_2, system=_SYSTEM),
}
"""Conversations that a template may refuse, but must not shorten."""


@dataclass(frozen=True)
class RenderedConversations:
    """The conversations as the template renders them.

    Attributes:
        texts: The text by conversation.
        errors: The error of a refusal, by conversation.
    """

    texts: Mapping[str, str]
    errors: Mapping[str, RenderError]

    @property
    def overrun(self) -> str:
        """The bound that a rendering passed, or the access that the sandbox refused; empty if there is none."""
        stops = ("forbidden", "overrun", "recursion")
        return next((error.found for error in self.errors.values() if error.kind in stops), "")


class TemplateTraits:
    """The template of a target, and its renderings of the conversations."""

    def __init__(self, target: Target) -> None:
        """Take the template that transformers loads.

        Raises:
            TokenizerError: If there is no tokenizer or no template.
        """
        self.tokenizer = target.tokenizer
        self.fast = target.tokenizer.fast
        self.template: ChatTemplate = target.template
        self.oracle = oracle_of(target)
        self.place = str(target.tokenizer.path)
        self.eos_ids: set[int] = end_ids(target)

    @property
    def conversation(self) -> str:
        """A question and its answer, as rendered."""
        return self.rendered.texts["a question and its answer"]

    @property
    def unusable(self) -> bool:
        """Whether a plain conversation cannot be rendered."""
        return any(name not in self.rendered.texts for name in PLAIN)

    @cached_property
    def rendered(self) -> RenderedConversations:
        """The conversations, each rendered once."""
        texts: dict[str, str] = {}
        errors: dict[str, RenderError] = {}
        for name, row in {**PLAIN, **SYSTEM}.items():
            try:
                texts[name] = self.template.render(row, generation_prompt=row.messages[-1]["role"] == "user")
            except RowError as error:
                cause = error.__cause__
                errors[name] = cause if isinstance(cause, RenderError) else RenderError(error.found, kind="error")
        return RenderedConversations(texts, errors)

    def finding(self, rule: str, found: str, expected: str = "", detail: str = "") -> Finding:
        """Return a finding at the template's place."""
        return Finding(rule, found, self.place, expected, detail)


def oracle_of(target: Target) -> Oracle | None:
    """Return the oracle, or None if the target has none that loads, which the check `control-tokens` reports."""
    try:
        return target.oracle
    except TokenizerError:
        return None


def end_ids(target: Target) -> set[int]:
    """Return the ids that end an answer: EOS of the tokenizer, and those at which the folder's model stops."""
    fast, files = target.tokenizer.fast, target.tokenizer.files
    stops = files.json(GENERATION_CONFIG).get("eos_token_id", files.json(MODEL_CONFIG).get("eos_token_id"))
    special = {token for token, added in fast.added_tokens_decoder.items() if added.special}
    given = {token for token in (stops if isinstance(stops, list) else [stops]) if isinstance(token, int)} & special
    return {token for token in (*given, fast.eos_token_id) if token is not None}


def of_target(target: Target) -> TemplateTraits | Result:
    """Return the traits of a target's template; a result with the reason if there is no template."""
    _ = target.tokenizer.fast  # A tokenizer that does not load is an error of the check, not a missing template.
    try:
        return TemplateTraits(target)
    except TokenizerError as error:
        return Result(not_checked=str(error))


def bounds(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML221 if the template passes a bound or asks for forbidden attributes, ML222 if it cannot render."""
    errors = traits.rendered.errors.values()
    observed = next((error for error in errors if error.kind in UNSTEADY), None)
    if observed is not None:
        yield traits.finding(UNSTEADY[observed.kind], observed.found, "one text for a row")
        return
    if any(error.kind == "overrun" for error in errors):
        # the source of such a template may be too long, or too deep, to be parsed here
        yield traits.finding("ML221", traits.rendered.overrun)
        return
    try:
        reached = forbidden_access(traits.template.source)
    except Exception as error:
        # not Jinja's own alone: a number of 5,000 digits is a ValueError
        yield traits.finding("ML222", f"is not a template: {error}", "a Jinja template")
        return
    if reached or traits.rendered.overrun:
        deed = f"asks for {', '.join(reached)}" if reached else traits.rendered.overrun
        yield traits.finding("ML221", f"the chat template {deed}".replace("template the chat template", "template"))
        return
    for name in PLAIN:
        if name in traits.rendered.errors:
            why = traits.rendered.errors[name].found
            yield traits.finding("ML222", f"the chat template cannot render {name}: {why}")
            return
    rows = [row for name, row in {**PLAIN, **SYSTEM}.items() if name in traits.rendered.texts]
    try:
        printed = traits.template.printed_unknowns(rows)
    except RenderError as error:
        yield traits.finding("ML221", error.found)
        return
    # An unset BOS or EOS is the rule ML226.
    for name in sorted({*printed} - {"bos_token", "eos_token"}):
        yield traits.finding("ML222", f"the chat template prints {name}, which nothing gives", "a variable that exists")


def clock_and_defaults(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML223 for a template that reads the clock, and ML224 for one with a system prompt of its own."""
    reads = clock_reads(traits.template.source)
    if reads:
        yield traits.finding("ML223", f"the chat template calls {', '.join(reads)}", "a text that no date changes")
    texts = traits.rendered.texts
    with_system, without = texts.get("a system prompt and a question"), texts.get("a question")
    if with_system is None or without is None:
        return
    # A default system prompt stands in a conversation without one, and gives way to one.
    own, other = _added_text(traits, without), _added_text(traits, with_system)
    if own not in other and len(own) > len(other):
        yield traits.finding(
            "ML224", f"a conversation without a system prompt gets one: {own[:120]!r}", "nothing that no one wrote"
        )


def _added_text(traits: TemplateTraits, text: str) -> str:
    """Return the text that a template adds to the messages, without control tokens."""
    for token in sorted(traits.fast.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, "")
    for message in (_SYSTEM, _USER):
        text = text.replace(message, "")
    return text.strip()


def dropped_texts(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML225 for each conversation from which the template silently leaves out a message."""
    for name, row in {**PLAIN, **SYSTEM}.items():
        text = traits.rendered.texts.get(name)
        if text is None:
            continue
        for message in row.messages:
            if message["content"] not in text:
                found = f"the {message['role']} message {message['content']!r} is left out of {name}"
                yield traits.finding("ML225", found, "every message, or a refusal", detail=f"rendered: {text!r}")
                break


def encoded_again(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML227 if encoding a rendered conversation as plain text adds tokens, ML228 if it loses control tokens."""
    fast, text = traits.fast, traits.conversation
    plain = fast(text, add_special_tokens=False)["input_ids"]
    again = fast(text)["input_ids"]
    if again != plain:
        found = f"encoding a rendered text adds {len(again) - len(plain)} tokens: it begins with {again[:3]}"
        yield traits.finding("ML227", found, str(plain[:3]))
    placed = {token.content: token_id for token_id, token in fast.added_tokens_decoder.items() if token.content in text}
    lost = [literal for literal, token_id in placed.items() if token_id not in plain]
    if lost:
        yield traits.finding("ML228", f"{', '.join(lost)} of a rendered text is encoded as letters", "control tokens")
