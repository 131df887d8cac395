"""What a chat template would do, read from its syntax tree and from one rendering that notes what it misses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import RowError, TokenizerError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
    from pytest_mistral_lora.chat.templates.render import ChatTemplate


_CLOCK = ("strftime_now", "now", "datetime", "date_today")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def clock_reads(source: str) -> list[str]:
    """Return the names by which a template asks for the time, in order.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    calls = (call.node for call in _tree(source).find_all(nodes.Call))
    return sorted({call.name for call in calls if isinstance(call, nodes.Name) and call.name in _CLOCK})


def forbidden_access(source: str) -> list[str]:
    """Return what a template asks for that no chat template needs: private attributes, other templates.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    tree = _tree(source)
    loads = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    found = [f"the attribute {name!r}" for name in _attributes(tree) if name.startswith("__")]
    return [*dict.fromkeys(found), *("another template" for _ in tree.find_all(loads))]


def _attributes(tree: Any) -> Iterator[str]:
    from jinja2 import nodes

    for get in tree.find_all(nodes.Getattr):
        yield get.attr
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
            yield item.arg.value
    for one in tree.find_all(nodes.Filter):
        if one.name in ("attr", "map"):
            yield from (arg.value for arg in one.args if isinstance(arg, nodes.Const) and isinstance(arg.value, str))


def printed_unknowns(source: str, renderings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that a template prints though nothing gives them, which leaves a hole in the text.

    Only for a template that has been rendered within bounds with the same variables.
    """
    from jinja2 import Undefined

    missing: list[str] = []

    class Noting(Undefined):
        """Notes that it was printed."""

        def __str__(self) -> str:
            if self._undefined_obj is _missing_object():
                missing.append(str(self._undefined_name))
            return ""

    environment = _environment().overlay(undefined=Noting)
    template = environment.from_string(source)
    for variables in renderings:
        template.render({**dict.fromkeys(_GIVEN), **variables})
    return sorted(set(missing))


def _missing_object() -> Any:
    from jinja2.utils import missing

    return missing


def _environment() -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment


def _tree(source: str) -> Any:
    return _environment().parse(source)


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
class Rendered:
    """The conversations as the template renders them.

    Attributes:
        texts: The text by conversation.
        errors: Why the template refused, by conversation.
    """

    texts: Mapping[str, str]
    errors: Mapping[str, BaseException]

    @property
    def overrun(self) -> str:
        """What the template did that it must not, or nothing."""
        from jinja2.exceptions import SecurityError

        from pytest_mistral_lora.chat.templates.sandbox import OverrunError

        stops = (SecurityError, OverrunError, MemoryError, RecursionError)
        return next((str(error) or "recursion" for error in self.errors.values() if isinstance(error, stops)), "")


class Traits:
    """The template of a target, and what it makes of the conversations."""

    def __init__(self, target: Target) -> None:
        """Take the template that transformers loads.

        Raises:
            TokenizerError: If there is no tokenizer or no template.
        """
        self.fast = target.tokenizer.fast
        self.template: ChatTemplate = target.template
        self.oracle = _oracle(target)
        self.place = str(target.tokenizer.path)

    @property
    def conversation(self) -> str:
        """A question and its answer, as rendered."""
        return self.rendered.texts["a question and its answer"]

    @property
    def unusable(self) -> bool:
        """Whether a plain conversation cannot be rendered."""
        return any(name not in self.rendered.texts for name in PLAIN)

    @cached_property
    def rendered(self) -> Rendered:
        """The conversations, each rendered once."""
        texts: dict[str, str] = {}
        errors: dict[str, BaseException] = {}
        for name, row in {**PLAIN, **SYSTEM}.items():
            try:
                texts[name] = self.template.render(row, generation_prompt=row.messages[-1]["role"] == "user")
            except RowError as error:
                errors[name] = error.__cause__ or error
        return Rendered(texts, errors)

    def finding(self, rule: str, found: str, expected: str = "", detail: str = "") -> Finding:
        """Return a finding at the template's place."""
        return Finding(rule, found, self.place, expected, detail)


def _oracle(target: Target) -> Oracle | None:
    try:
        return target.oracle
    except TokenizerError:
        return None


def of_target(target: Target) -> Traits | Result:
    """Return the traits of a target's template, or why there is nothing to look at."""
    _ = target.tokenizer.fast
    try:
        return Traits(target)
    except TokenizerError as error:
        return Result(not_checked=str(error))


def bounds(traits: Traits) -> Iterator[Finding]:
    """Yield ML221 where the template runs away or reaches for what is not its own, ML222 where it cannot render."""
    from jinja2.exceptions import TemplateError

    try:
        reached = forbidden_access(traits.template.source)
    except (TemplateError, RecursionError) as error:
        yield traits.finding("ML222", f"is not a template: {error}", "a Jinja template")
        return
    if reached or traits.rendered.overrun:
        said = f"asks for {', '.join(reached)}" if reached else traits.rendered.overrun
        yield traits.finding("ML221", f"the chat template {said}".replace("template the chat template", "template"))
        return
    for name in PLAIN:
        if name in traits.rendered.errors:
            why = traits.rendered.errors[name]
            yield traits.finding("ML222", f"the chat template cannot render {name}: {why or type(why).__name__}")
            return
    for name in sorted(_unknowns(traits)):
        yield traits.finding("ML222", f"the chat template prints {name}, which nothing gives", "a variable that exists")


def _unknowns(traits: Traits) -> set[str]:

    given: dict[str, Any] = traits.fast.special_tokens_map
    rows = [row for name, row in {**PLAIN, **SYSTEM}.items() if name in traits.rendered.texts]
    printed = printed_unknowns(traits.template.source, ({**given, "messages": list(row.messages)} for row in rows))
    return {*printed} - {"bos_token", "eos_token"}  # these are a rule of their own


def clock_and_defaults(traits: Traits) -> Iterator[Finding]:
    """Yield ML223 for a template that reads the clock, and ML224 for one with a system prompt of its own."""
    reads = clock_reads(traits.template.source)
    if reads:
        yield traits.finding("ML223", f"the chat template calls {', '.join(reads)}", "a text that no date changes")
    own = _default_system(traits)
    if own:
        yield traits.finding(
            "ML224", f"a conversation without a system prompt gets one: {own[:120]!r}", "nothing that no one wrote"
        )


def _default_system(traits: Traits) -> str:
    """Return the text that stands in a conversation without a system prompt and gives way to one."""
    texts = traits.rendered.texts
    with_system, without = texts.get("a system prompt and a question"), texts.get("a question")
    if with_system is None or without is None:
        return ""
    rest, other = _leftover(traits, without), _leftover(traits, with_system)
    return rest if rest not in other and len(rest) > len(other) else ""


def _leftover(traits: Traits, text: str) -> str:
    """Return what a template adds to the messages beside control tokens."""
    for token in sorted(traits.fast.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, "")
    for said in (_SYSTEM, _USER):
        text = text.replace(said, "")
    return text.strip()


def dropped_texts(traits: Traits) -> Iterator[Finding]:
    """Yield ML225 for each conversation of which the template silently leaves a message out."""
    for name, row in {**PLAIN, **SYSTEM}.items():
        text = traits.rendered.texts.get(name)
        if text is None:
            continue
        for message in row.messages:
            if message["content"] not in text:
                found = f"the {message['role']} message {message['content']!r} is left out of {name}"
                yield traits.finding("ML225", found, "every message, or a refusal", detail=f"rendered: {text!r}")
                break
