"""mistral-common's own grammar of answers: what a server that decodes by it lets a model say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.oracle.request import request_data
from pytest_mistral_lora.errors import LibraryError, one_line, shortened
from pytest_mistral_lora.extras import MissingExtraError, is_installed

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.oracle import Oracle
    from pytest_mistral_lora.chat.rows import Row

_KEPT = 256
"""Most compiled grammars to keep: the rows of a dataset share a few sets of tools."""
_SHOWN = 4
"""Most tokens to show of those that a grammar would take."""


def has_grammar(oracle: Oracle) -> bool:
    """Return whether mistral-common makes grammars for a tokenizer: a server in its mode decodes each answer by one."""
    return oracle.kind == "tekken" and oracle.facts.calls_as == "markers"


@dataclass(frozen=True, slots=True)
class RefusedToken:
    """The first token of an answer that a grammar does not allow.

    Attributes:
        index: Its index in the answer; the number of ids if the answer may not end there.
        found: The token as the vocabulary writes it; empty if the answer may not end there.
        expected: What the grammar allows there, in words.
    """

    index: int
    found: str
    expected: str

    @property
    def is_end(self) -> bool:
        """Whether the answer is refused for ending where it does."""
        return not self.found


class AnswerGrammar:
    """The grammars that mistral-common makes for the requests of one tokenizer."""

    @classmethod
    def unavailable(cls, oracle: Oracle) -> str:
        """Return why there are no grammars for a tokenizer; empty if there are."""
        if not has_grammar(oracle):
            kind = "SentencePiece" if oracle.kind == "spm" else "Tekken"
            return f"mistral-common has no grammar for {kind} of version {oracle.version}: only for Tekken from v11 on"
        if not is_installed("llguidance"):
            return str(MissingExtraError("llguidance"))
        return ""

    def __init__(self, oracle: Oracle) -> None:
        """Prepare the grammars of a tokenizer for which they are not `unavailable`: this takes about a second.

        Args:
            oracle: Mistral's own tokenization.

        Raises:
            LibraryError: If the installed mistral-common makes no grammars.
        """
        try:
            import llguidance
            from mistral_common.guidance.grammar_factory import GrammarFactory
            from mistral_common.protocol.instruct.request import ChatCompletionRequest

            self._factory: Any = GrammarFactory(oracle.library_tokenizer)
            self._template: str = self._factory.select_jinja_template()
        except (ImportError, AttributeError, ValueError) as error:
            raise LibraryError(f"this mistral-common makes no grammar of answers: {one_line(error)}") from error
        self._oracle = oracle
        self._request: Any = ChatCompletionRequest
        self._matcher: Any = llguidance.LLMatcher
        self._matchers: dict[str, Any] = {}

    def refused(self, row: Row, ids: Sequence[int], settings: Mapping[str, Any] | None = None) -> RefusedToken | None:
        """Return the first token of an answer that the grammar of its request refuses; None if it takes them all.

        Args:
            row: The row, whose tools and `response_format` are those of the request.
            ids: The ids of the answer, with or without the closing EOS.
            settings: Further keys of the request: `tool_choice`, `parallel_tool_calls`.

        Raises:
            LibraryError: If mistral-common makes no grammar of the request, or llguidance cannot use it.
        """
        matcher = self._matcher_of(row, settings or {})
        if matcher is None:
            return None
        said = [token for token in ids if token != self._oracle.eos_id]
        matcher.reset()
        taken = matcher.try_consume_tokens(said)
        if matcher.is_error():
            # not a refusal: a limit of the parser, or a schema that it compiles while it reads
            self._matchers.clear()
            raise LibraryError(f"llguidance cannot use the grammar: {one_line(matcher.get_error())}")
        if taken == len(said) and matcher.is_accepting():
            return None
        found = "" if taken == len(said) else self._oracle.piece(said[taken])
        return RefusedToken(taken, found, self._allowed(matcher, said[:taken]))

    def _matcher_of(self, row: Row, settings: Mapping[str, Any]) -> Any:
        # the order of keys in a schema is that of the grammar
        key = json.dumps([row.tools, row.response_format, settings], default=dict)
        if key not in self._matchers:
            if len(self._matchers) >= _KEPT:
                self._matchers.clear()
            data = request_data(replace(row, messages=()))
            asked = {name: data[name] for name in ("tools", "response_format") if data.get(name) is not None}
            self._matchers[key] = self._new_matcher({**asked, **settings})
        return self._matchers[key]

    def _new_matcher(self, request: Mapping[str, Any]) -> Any:
        """Return the matcher of a request; None if mistral-common makes no grammar for it."""
        question = {"messages": [{"role": "user", "content": ""}], **request}
        try:
            lark = self._factory.get_grammar_for_chat_request(
                request=self._request.model_validate(question), template=self._template
            )
        except Exception as error:  # InvalidRequestException, pydantic's ValidationError, or one of Jinja
            raise LibraryError(f"mistral-common makes no grammar for the request: {one_line(error)}") from error
        if lark is None:
            return None
        matcher = self._matcher(self._factory.llg_tokenizer, self._matcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            raise LibraryError(f"llguidance cannot use the grammar: {one_line(matcher.get_error())}")
        return matcher

    def _allowed(self, matcher: Any, said: Sequence[int]) -> str:
        """Return in words what a grammar allows after some ids of an answer."""
        # a refused token leaves the matcher with an error
        matcher.reset()
        matcher.try_consume_tokens([*said])
        ends = ["the end of the answer"] if matcher.is_accepting() else []
        bias = matcher.compute_logit_bias()
        allowed = [token for token in range(self._oracle.vocab_size) if bias[token]]
        markers = [self._oracle.control_tokens[token] for token in allowed if token in self._oracle.control_tokens]
        words = {self._oracle.decode([token]) for token in allowed if token not in self._oracle.control_tokens}
        # white space is allowed nearly everywhere, and a letter says more than a word that begins with it
        texts = sorted(words - {"\ufffd"}, key=lambda text: (text.isspace(), len(text), text))
        shown = [shortened(text) for text in texts[:_SHOWN]]
        if len(texts) > _SHOWN:
            shown.append(f"{len(texts) - _SHOWN:,} more texts")
        return ", ".join([*ends, *(marker for marker in markers if marker != "</s>"), *shown]) or "nothing"
