"""mistral-common's own decoder of answers: the message that it reads from the ids of a turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.answer_message import AnswerChunk, AnswerMessage
from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.completions import GeneratedCall
from pytest_mistral_lora.errors import LibraryError, MistralLoraError, one_line

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.oracle import Oracle


class UndecodableAnswerError(MistralLoraError):
    """Ids of which mistral-common's decoder makes no message; the message gives its reason."""


class AnswerDecoder:
    """mistral-common's decoder, for one tokenizer.

    It does what mistral-common's server does with the tokens of an engine: `detokenize_to_assistant_message` of
    `mistral_common/experimental/app/routers.py`. The functions are that server's; the server itself needs FastAPI.
    """

    def __init__(self, oracle: Oracle) -> None:
        """Prepare the decoder.

        Args:
            oracle: Mistral's own tokenization.

        Raises:
            LibraryError: If the installed mistral-common has no such functions.
        """
        try:
            from mistral_common.experimental import think, tools

            self._split_thoughts: Any = think._split_content_and_think_chunks
            self._split_calls: Any = tools._split_content_and_tool_calls
            self._decode_calls: Any = tools._decode_tool_calls
        except (ImportError, AttributeError) as error:
            raise LibraryError(f"this mistral-common has no decoder of answers: {error}") from error
        self._oracle = oracle
        self._text = oracle.library_tokenizer.instruct_tokenizer.tokenizer

    def message(self, ids: Sequence[int]) -> AnswerMessage:
        """Return the message of the ids of one turn of the assistant.

        Args:
            ids: The ids, with or without the closing EOS.

        Raises:
            UndecodableAnswerError: If the decoder refuses the ids.
        """
        try:
            return self._message([token for token in ids if token != self._oracle.eos_id])
        except (ValueError, RecursionError) as error:
            # its errors of calls, of JSON and of pydantic are all of ValueError
            raise UndecodableAnswerError(one_line(error)) from error

    def _message(self, ids: list[int]) -> AnswerMessage:
        oracle = self._oracle
        spoken, calls = ids, ()
        if oracle.facts.calls_as is not None:
            spoken, calls = self._split_calls(ids, oracle.tool_calls_id)
        runs = [(spoken, False)] if spoken else []
        if oracle.features.thinking:
            runs = self._split_thoughts(spoken, oracle.control_ids[THINKING.opens], oracle.control_ids[THINKING.closes])
        return AnswerMessage(
            tuple(
                AnswerChunk(
                    oracle.decode(run), is_thinking, not is_thinking or run[-1] == oracle.control_ids[THINKING.closes]
                )
                for run, is_thinking in runs
            ),
            tuple(self._call(call) for call in self._decode_calls(calls, self._text)),
        )

    def _call(self, call: Any) -> GeneratedCall:
        # the decoder gives each call of a version without ids the id "null"
        call_id = call.id if self._oracle.facts.writes_call_ids else None
        return GeneratedCall(call.function.name, json.loads(call.function.arguments), call_id)
