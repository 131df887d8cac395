"""The script of vLLM's parsers with mistral-common's decoder in their place: it reads and writes the files itself.

`python FILE FAULT SCRIPT ANSWERS.json MESSAGES.json`; FAULT is one of `FAULTS`, or `none`.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.answer_decoder import AnswerDecoder

Message = dict[str, Any]


class Decoded:
    """A request whose answers mistral-common decodes."""

    def __init__(self, oracle: Oracle, fault: str, request: Mapping[str, Any]) -> None:
        """Prepare nothing: the decoder needs no request.

        Raises:
            TypeError: If the fault is a request with tools that cannot be prepared.
        """
        if fault == "unprepared" and request.get("tools"):
            raise TypeError("get_lark_from_jinja() missing 1 required positional argument: 'force_tool_names'")
        self._oracle, self._decoder, self._fault = oracle, AnswerDecoder(oracle), fault

    def whole(self, ids: list[int]) -> Message:
        """Return the message of an answer.

        Raises:
            ValueError: If the fault is a parser that fails.
        """
        if self._fault == "raises":
            raise ValueError("no parser")
        message = self._decoder.message(ids)
        calls = [
            {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in message.calls
        ]
        return {"content": message.text, "reasoning": message.thinking, "calls": calls}

    def streamed(self, parts: Sequence[list[int]]) -> Message:
        """Return the message of a stream, which loses the end of a text if a part has several tokens and a fault."""
        message = self.whole([token for part in parts for token in part])
        if self._fault == "cut" and len(parts) == 2 and len(parts[1]) > 2:
            message["content"] = message["content"][:-1]
        return message


FAULTS = ("cut", "raises", "unprepared")


def opened(folder: str, has_thinking: bool) -> tuple[str, Callable[[Any, list[int]], Decoded]]:
    """Return a version, and what prepares a request, for the tokenizer in a folder."""
    [file] = Path(folder).iterdir()
    oracle = Oracle(file)
    assert oracle.features.thinking is has_thinking
    return "0.0-decoder", lambda request, prompt: Decoded(oracle, FAULT, request)


if __name__ == "__main__":
    FAULT = sys.argv[1]
    script = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_path(script)["main"](opened)
