"""A stored chat template with its tokenizer, and its renderings of a few conversations, for all checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizer_folder import GENERATION_CONFIG, MODEL_CONFIG
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import RenderError, RowError, TokenizerError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.templates import ChatTemplate


SYSTEM_PROMPT = "Answer in one short verse."
QUESTION = "What makes the thunder roll?"
_ANSWER = "Warm air that bursts apart."
_USER_2 = "And the rainbow?"
_ANSWER_2 = "Light that bends in drops."


def _row(*texts: str, system: str = "") -> Row:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Row((*([{"role": "system", "content": system}] if system else []), *messages), None, "")


PLAIN = {"a question": _row(QUESTION), "a question and its answer": _row(QUESTION, _ANSWER)}
"""Conversations that every template must render."""

SYSTEM = {
    "a system prompt and a question": _row(QUESTION, system=SYSTEM_PROMPT),
    "a system prompt, a question and its answer": _row(QUESTION, _ANSWER, system=SYSTEM_PROMPT),
    "a system prompt and two questions with answers": _row(QUESTION, _ANSWER, _USER_2, _ANSWER_2, system=SYSTEM_PROMPT),
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
