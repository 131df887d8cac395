"""Known answers through vLLM's own parsers, in the Python that vLLM is installed in: without a server and a model.

    vllm_parsers.py ANSWERS.json MESSAGES.json

`ANSWERS.json` has the tokenizer's folder, whether it has thinking, and the answers: the chat request, the ids of its
prompt, and the ids that a model says. `MESSAGES.json` gets the version of vLLM and, for each answer, the message
`whole` and those of its `streams`. The first stream has a part for each token, and `"cut": null`. Each other one is cut
in two before the token `cut`, and is written only if its message differs from those before it. This project is not
installed there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

Message = dict[str, Any]


class Prepared(Protocol):
    """A chat request that a server has prepared, which reads answers to it."""

    def whole(self, ids: list[int]) -> Message:
        """Return the message of an answer that is not streamed."""
        ...

    def streamed(self, parts: Sequence[list[int]]) -> Message:
        """Return the message that a client joins from the stream of an answer in these parts."""
        ...


Prepare = Callable[[Any, list[int]], Prepared]
"""Prepares a chat request whose prompt has some ids."""


class ParsedRequest:
    """A chat request, as a server with these parsers prepares it.

    Args:
        tokenizer: vLLM's tokenizer.
        parser_class: The class that vLLM composes of the parsers of calls and of thinking.
        request: The request.
        prompt: The ids of its prompt.
    """

    def __init__(self, tokenizer: Any, parser_class: Any, request: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._parser_class = parser_class
        self._prompt = prompt
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        self._request = ChatCompletionRequest.model_validate({"model": "model", **request})
        # as vllm/renderers/online_renderer.py: a parser may want special tokens in the text, and ask for a grammar
        is_adjusted = (
            parser_class.always_adjust_request
            or parser_class.reasoning_parser_cls is not None
            or self._request.tool_choice != "none"
            or tokenizer.supports_grammar
        )
        if is_adjusted:
            self._request = self._parser().adjust_request(request=self._request)

    def _parser(self) -> Any:
        """Return a parser without a state: a server makes one for each answer."""
        return self._parser_class(self._tokenizer, self._request.tools)

    def _texts(self, parts: Sequence[list[int]]) -> list[str]:
        """Return the text of each part of an answer, as the engine's detokenizer gives it."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        settings = SamplingParams(skip_special_tokens=self._request.skip_special_tokens)
        detokenizer = IncrementalDetokenizer.from_new_request(
            self._tokenizer,
            EngineCoreRequest(
                request_id="answer",
                prompt_token_ids=self._prompt,
                mm_features=None,
                sampling_params=settings,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            ),
        )
        texts = []
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            # the last id is EOS, which stops the answer
            detokenizer.update(part, is_last)
            texts.append(detokenizer.get_next_output_text(is_last, True))
        return texts

    def whole(self, ids: list[int]) -> Message:
        """Return the message of an answer that is not streamed."""
        text = "".join(self._texts([ids]))
        parser = self._parser()
        parser.set_prompt_token_ids(self._prompt)
        thinking, content, calls = parser.parse(text, self._request, enable_auto_tools=True, model_output_token_ids=ids)
        named = [{"name": call.name, "arguments": call.arguments} for call in calls or ()]
        return {"content": content, "reasoning": thinking, "calls": named}

    def streamed(self, parts: Sequence[list[int]]) -> Message:
        """Return the message that a client joins from the stream of an answer in these parts."""
        parser = self._parser()
        content = thinking = ""
        calls: dict[int, dict[str, str]] = {}
        for number, (part, text) in enumerate(zip(parts, self._texts(parts), strict=True), start=1):
            delta = parser.parse_delta(
                delta_text=text,
                delta_token_ids=part,
                request=self._request,
                prompt_token_ids=self._prompt,
                finished=number == len(parts),
            )
            if delta is None:
                continue
            content += delta.content or ""
            thinking += delta.reasoning or ""
            for call in delta.tool_calls or ():
                joined = calls.setdefault(call.index, {"name": "", "arguments": ""})
                if call.function is not None:
                    joined["name"] += call.function.name or ""
                    joined["arguments"] += call.function.arguments or ""
        return {"content": content, "reasoning": thinking, "calls": [calls[index] for index in sorted(calls)]}


def _caught(make: Callable[[], Message]) -> Message:
    """Return a message, or the error in place of it, as the server answers it."""
    try:
        return make()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def messages(prepare: Prepare, answer: Any) -> Message:
    """Return the messages of a known answer: whole, and as streams."""
    ids: list[int] = answer["answer_ids"]
    try:
        request = prepare(answer["request"], answer["prompt_ids"])
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {error}"}
        return {"whole": failed, "streams": [{"cut": None, **failed}]}
    seen = [_caught(partial(request.streamed, [[token] for token in ids]))]
    streams = [{"cut": None, **seen[0]}]
    for cut in range(1, len(ids)):
        message = _caught(partial(request.streamed, [ids[:cut], ids[cut:]]))
        if message not in seen:
            seen.append(message)
            streams.append({"cut": cut, **message})
    return {"whole": _caught(partial(request.whole, ids)), "streams": streams}


def opened_parsers(tokenizer_folder: str, has_thinking: bool) -> tuple[str, Prepare]:
    """Return the version of vLLM, and what prepares a request for its parsers.

    Args:
        tokenizer_folder: The folder of the tokenizer.
        has_thinking: Whether the tokenizer has thinking, so that answers are read by a parser of it, too.
    """
    import regex
    import vllm
    from vllm.parser.parser_manager import ParserManager
    from vllm.tokenizers.mistral import MistralTokenizer

    # each new parser compiles a pattern for each of Tekken's 1,000 special tokens, and `regex` keeps 500 of them
    regex.compile = cache(regex.compile)
    tokenizer = MistralTokenizer.from_pretrained(tokenizer_folder)
    parser_class = ParserManager.get_parser(
        tool_parser_name="mistral",
        reasoning_parser_name="mistral" if has_thinking else None,
        enable_auto_tools=True,
        model_name="model",
        tokenizer=tokenizer,
    )
    return vllm.__version__, partial(ParsedRequest, tokenizer, parser_class)


def main(opened: Callable[[str, bool], tuple[str, Prepare]] = opened_parsers) -> None:
    """Read the answers, and write their messages.

    Args:
        opened: Returns the version of the parsers, and what prepares a request for them.
    """
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    version, prepare = opened(given["tokenizer"], given["has_thinking"])
    made = [messages(prepare, answer) for answer in given["answers"]]
    Path(sys.argv[2]).write_text(json.dumps({"version": version, "answers": made}), encoding="utf-8")


if __name__ == "__main__":
    main()
