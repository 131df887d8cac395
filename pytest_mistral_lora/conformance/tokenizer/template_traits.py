"""A chat template with its tokenizer: its renderings of a few conversations, and their faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.faults import REASONING_DROPPED
from pytest_mistral_lora.chat.templates.generation_blocks import has_generation
from pytest_mistral_lora.chat.templates.renderer import environment
from pytest_mistral_lora.checkpoint.tokenizer_folder import loaded_place
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.template import UNSTEADY, own_prompt_finding
from pytest_mistral_lora.conformance.tokenizer.ids import end_ids, oracle_of
from pytest_mistral_lora.errors import RenderError, RowError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer


_SYSTEM_PROMPT = "Answer in one short verse."
_QUESTION = "What makes the thunder roll?"
_ANSWER = "Warm air that bursts apart."
_USER_2 = "And the rainbow?"
_ANSWER_2 = "Light that bends in drops."


def _row(*texts: str, system: str = "") -> Row:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Row((*([{"role": "system", "content": system}] if system else []), *messages))


PLAIN = {"a question": _row(_QUESTION), "a question and its answer": _row(_QUESTION, _ANSWER)}
"""Conversations that every template must render."""

SYSTEM = {
    "a system prompt and a question": _row(_QUESTION, system=_SYSTEM_PROMPT),
    "a system prompt, a question and its answer": _row(_QUESTION, _ANSWER, system=_SYSTEM_PROMPT),
    "a system prompt and two questions with answers": _row(
        _QUESTION, _ANSWER, _USER_2, _ANSWER_2, system=_SYSTEM_PROMPT
    ),
}
"""Conversations that a template may refuse, but must not shorten."""

_TURNS, _WORDS = 24, 10_000
WHOLE = {
    "a conversation of 48 messages": _row(*(f"{text} {n}" for n in range(_TURNS) for text in ("Question", "Answer"))),
    "a question of 60,000 letters": _row(" ".join(f"w{n:04}" for n in range(_WORDS)), _ANSWER),
    "an answer with a thought in tags": _row(
        _QUESTION, f"<think>\nHeat moves air.\n</think>\n\n{_ANSWER}", _USER_2, _ANSWER_2
    ),
}
"""Conversations that a template of a Mistral tokenizer must not shorten: others drop thoughts on purpose."""


@dataclass(frozen=True)
class RenderedConversations:
    """The conversations, rendered by the template.

    Attributes:
        texts: The text by conversation.
        errors: The error of a refusal, by conversation.
    """

    texts: Mapping[str, str]
    errors: Mapping[str, RenderError]

    @property
    def overrun(self) -> str:
        """The bound that a rendering exceeded, or the access that the sandbox refused; may be empty."""
        stops = ("forbidden", "overrun", "recursion")
        return next((error.found for error in self.errors.values() if error.kind in stops), "")


class TemplateTraits:
    """The template of a target, and its renderings of the conversations."""

    def __init__(self, target: Target) -> None:
        """Take the template that transformers loads.

        Raises:
            TokenizerError: If there is no tokenizer or no template.
        """
        self.tokenizer: CheckpointTokenizer = target.tokenizer
        self.fast: Any = target.tokenizer.fast
        self.template: ChatTemplate = target.template
        self.oracle: Oracle | None = oracle_of(target)
        self.place: Place = target.tokenizer.place
        self.eos_ids: set[int] = end_ids(target)

    @property
    def conversation(self) -> str:
        """A question and its answer, as rendered."""
        return self.rendered.texts["a question and its answer"]

    @cached_property
    def rendered(self) -> RenderedConversations:
        """The conversations, each rendered once."""
        texts: dict[str, str] = {}
        errors: dict[str, RenderError] = {}
        for name, row in {**PLAIN, **SYSTEM, **(WHOLE if self.oracle else {})}.items():
            try:
                texts[name] = self.template.render(row, generation_prompt=row.messages[-1]["role"] == "user")
            except RowError as error:
                cause = error.__cause__
                errors[name] = cause if isinstance(cause, RenderError) else RenderError(error.found, kind="error")
        return RenderedConversations(texts, errors)

    def finding(self, rule: str, found: str, expected: str = "", detail: str = "") -> Finding:
        """Return a finding at the template's place."""
        return Finding(rule, found, self.place, expected, detail)


_CLOCK = ("strftime_now", "now", "datetime", "date_today")


def forbidden_access(source: str) -> list[str]:
    """Return the private attributes and other templates that a template uses; chat templates never need them.

    Raises:
        jinja2.TemplateError: If the text is not a template.
    """
    from jinja2 import nodes

    tree = environment().parse(source)
    # Attributes are read as `a.b`, as `a["b"]`, and by the filters `attr` and `map`.
    names = [get.attr for get in tree.find_all(nodes.Getattr)]
    constants = [item.arg for item in tree.find_all(nodes.Getitem)]
    constants += [
        arg for applied in tree.find_all(nodes.Filter) if applied.name in ("attr", "map") for arg in applied.args
    ]
    names += [
        constant.value
        for constant in constants
        if isinstance(constant, nodes.Const) and isinstance(constant.value, str)
    ]
    found = [f"the attribute {name!r}" for name in names if name.startswith("__")]
    loads = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    return [*dict.fromkeys(found), *("another template" for _ in tree.find_all(loads))]


def bounds(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML221 if the template exceeds a bound or uses forbidden attributes, ML222 if it cannot render."""
    errors = traits.rendered.errors.values()
    unsteady = next((error for error in errors if error.kind in UNSTEADY), None)
    if unsteady is not None:
        yield traits.finding(UNSTEADY[unsteady.kind], unsteady.found, "one text for a row")
        return
    if any(error.kind == "overrun" for error in errors):
        # the source of such a template may be too long, or too deep, to be parsed here
        yield traits.finding("ML221", traits.rendered.overrun)
        return
    try:
        reached = forbidden_access(traits.template.source)
    except Exception as error:
        # not only Jinja's errors: a number of 5,000 digits is a ValueError
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
    """Yield ML223 for a template that reads the clock, and ML224 for a template with its own system prompt."""
    from jinja2 import nodes

    calls = (call.node for call in environment().parse(traits.template.source).find_all(nodes.Call))
    reads = sorted({call.name for call in calls if isinstance(call, nodes.Name) and call.name in _CLOCK})
    if reads:
        yield traits.finding("ML223", f"the chat template calls {', '.join(reads)}", "a text that no date changes")
    own_prompt = own_prompt_finding(traits.template, traits.place, has_oracle=traits.oracle is not None)
    if own_prompt is not None:
        yield own_prompt
        return
    texts = traits.rendered.texts
    with_system, without = texts.get("a system prompt and a question"), texts.get("a question")
    if with_system is None or without is None:
        return
    # a text of a conversation without a system prompt, in another place than a prompt, and replaced by a prompt
    added, other = _added_text(traits, without), _added_text(traits, with_system)
    if added not in other and len(added) > len(other):
        yield traits.finding(
            "ML224", f"a conversation without a system prompt gets one: {added[:120]!r}", "nothing that no one wrote"
        )


def _added_text(traits: TemplateTraits, text: str) -> str:
    """Return the text that a template adds to the messages, without control tokens."""
    for token in sorted(traits.fast.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, "")
    for message in (_SYSTEM_PROMPT, _QUESTION):
        text = text.replace(message, "")
    return text.strip()


def dropped_texts(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML225 for each conversation from which the template silently leaves out a message."""
    for name, row in {**PLAIN, **SYSTEM, **WHOLE}.items():
        text = traits.rendered.texts.get(name)
        lost = [] if text is None else [message for message in row.messages if message["content"] not in text]
        if lost:
            shown, expected = f"{lost[0]['content']!r:.80}", "every message, or a refusal"
            found = f"the {lost[0]['role']} message {shown} is left out of {name}"
            yield traits.finding("ML225", found, expected, detail=f"rendered: {text!r:.1000}")


_THOUGHT = "Heat moves air."
_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
"""The fields of a message where servers and trainers keep a thought."""


def dropped_thoughts(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML225 if the template renders a thought as a chunk, and silently leaves it out of each field for it."""
    oracle = traits.oracle
    if oracle is None or not oracle.features.thinking:
        return
    question = {"role": "user", "content": _QUESTION}
    chunks = [THINKING.chunk(_THOUGHT), {"type": "text", "text": _ANSWER}]
    answers: list[dict[str, Any]] = [
        {"content": chunks},
        *({"content": _ANSWER, name: _THOUGHT} for name in _THOUGHT_FIELDS),
    ]
    texts: list[str] = []
    for answer in answers:
        try:
            texts.append(traits.template.render(Row((question, {"role": "assistant", **answer}))))
        except RowError as error:
            texts.append(f"refused: {_THOUGHT} {error.found}")
    as_chunk, *as_fields = texts
    if _THOUGHT in as_chunk and not any(_THOUGHT in text for text in as_fields):
        found = f"the thought of an answer is left out if the message has it as {' or '.join(_THOUGHT_FIELDS)}"
        expected = "[THINK] and the thought, as of a thinking chunk"
        detail = f"rendered: {as_fields[0][-200:]!r}"
        yield Finding("ML225", found, traits.place, expected, detail, name=REASONING_DROPPED)


def rendered_ends(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML226 if a rendered conversation does not begin with its only BOS, or an answer does not end with EOS.

    Without an oracle, the EOS of the tokenizer or of the generation settings count.
    """
    fast, oracle = traits.fast, traits.oracle
    unset = [name for name in ("bos_token", "eos_token") if getattr(fast, name) is None]
    used = [name for name in unset if name in traits.template.source]
    if used:
        yield traits.finding("ML226", f"the chat template writes {', '.join(used)}, which is not set", "a token")
    elif oracle is not None:
        ids = fast(traits.conversation, add_special_tokens=False)["input_ids"]
        # a template of another layout writes no control token at all: ML004 is the cause
        cause = "" if traits.template.writes_controls else "ML004"
        if ids[:1] != [oracle.bos_id] or ids.count(oracle.bos_id) != 1:
            found = f"a conversation has {ids.count(oracle.bos_id)} BOS and begins with {ids[:1]}"
            finding = traits.finding("ML226", found, f"one BOS ({oracle.bos_id}), at the start")
            yield replace(finding, effect_of=cause)
        if ids[-1:] != [oracle.eos_id]:
            finding = traits.finding("ML226", f"a conversation ends with {ids[-1:]}", f"EOS ({oracle.eos_id})")
            yield replace(finding, effect_of=cause)
    if used or oracle is not None:
        return
    eos = [traits.fast.convert_ids_to_tokens(token) for token in sorted(traits.eos_ids)]
    for name, row in {**PLAIN, **SYSTEM}.items():
        text, at = traits.rendered.texts.get(name, ""), 0
        for message in row.messages:
            at = text.find(message["content"], at) + len(message["content"])
            after = text[at:].lstrip()
            if message["role"] == "assistant" and message["content"] in text and not after.startswith(tuple(eos)):
                found = f"the answer {message['content']!r} of {name} is followed by {after[:40]!r}"
                yield traits.finding("ML226", found, f"EOS: {' or '.join(eos) or 'the tokenizer has none'}")
                return


def prompt_is_the_beginning(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML234 if the prompt of a question is not the beginning of the question with its answer."""
    prompt, whole = traits.rendered.texts["a question"], traits.conversation
    if not whole.startswith(prompt):
        same = equal_beginning(prompt, whole)
        found = f"the prompt of a question ends with {prompt[same:]!r}, and its answer is written after"
        yield traits.finding("ML234", f"{found} {whole[same:][:60]!r}", "the same text up to the answer")


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


def unread_template(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML235 for a template of another layout beside tekken.json, ML236 for one whose blocks nothing reads."""
    files = traits.tokenizer.files
    if TEKKEN not in files.names or not traits.tokenizer.loads_as_it_is:
        return
    import transformers
    from packaging.version import Version

    from pytest_mistral_lora.programs.facts import find_fact

    place, known = files.place(TEKKEN), find_fact("tekken-first")
    since = known.since["transformers"] if known is not None else transformers.__version__
    number = transformers.__version__ if Version(transformers.__version__) >= Version(since) else f"{since} and later"
    gives = f"beside {TEKKEN}, AutoTokenizer of transformers {number} takes MistralCommonBackend, which gives"
    question = next(iter(traits.rendered.texts.values()), "")
    if "[INST]" not in question:
        found = f"{loaded_place(files)} renders {question[:60]!r}; {gives} [INST] in its place"
        yield Finding("ML235", found, place, f"no {TEKKEN} beside a template of another layout")
    elif has_generation(traits.template.source):
        yield Finding("ML236", f"{loaded_place(files)} has generation blocks; {gives} no mask", place)


def guessed_thinking(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML237 for a template of v11 that writes thinking as text in <think>: no file shows whether it may."""
    oracle = traits.oracle
    if oracle is not None and oracle.facts.plain_thinking and "<think>" in traits.template.source:
        found = (
            "the chat template writes thinking as <think> text, and no tokenizer of "
            f"{oracle.version} shows whether its model thinks"
        )
        yield traits.finding("ML237", found, "the template of a model that thinks in this way")
