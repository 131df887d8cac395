"""mistral-common's grammar of answers refuses [CALL_ID], which its encoder writes into each call of v11."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
from llguidance import LLMatcher
from mistral_common.guidance.grammar_factory import GrammarFactory
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

FILE = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
WORDS = 8_000
MARKERS = ("[ARGS]", "[CALL_ID]")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = Tool(function=Function(name="weather", parameters=CITY))
CALL = ToolCall(id="abcdefgh1", function=FunctionCall(name="weather", arguments='{"city": "Oslo"}'))


def write_v11(file: Path) -> None:
    """Derive a file of v11 from a shipped one: its first words, and the markers of v11."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    tokenizer = MistralTokenizer.from_file(FILE).instruct_tokenizer.tokenizer
    names = [tokenizer.id_to_piece(number) for number in range(20)]
    names += [*(f"<SPECIAL_{number}>" for number in range(20, 32)), *MARKERS]
    data["special_tokens"] = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    size = WORDS + data["config"]["default_num_special_tokens"]
    data["config"] = {**data["config"], "version": "v11", "default_vocab_size": size}
    data["vocab"] = data["vocab"][:WORDS]
    file.write_text(json.dumps(data), encoding="utf-8")


def main() -> None:
    """Feed the grammar the ids of a call, as the encoder writes them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tekken.json"
        write_v11(file)
        tokenizer = MistralTokenizer.from_file(file)
        encoder = MistralTokenizer.from_file(file, mode=ValidationMode.finetuning)
    asked: list[Any] = [UserMessage(content="a")]
    request = ChatCompletionRequest(messages=asked, tools=[TOOL])
    answered = ChatCompletionRequest(messages=[*asked, AssistantMessage(tool_calls=[CALL])], tools=[TOOL])
    prompt = tokenizer.encode_chat_completion(request).tokens
    answer = encoder.encode_chat_completion(answered).tokens[len(prompt) :]
    factory = GrammarFactory(tokenizer)
    lark = str(factory.get_grammar_for_chat_request(request=request, template=factory.select_jinja_template()))
    matcher = LLMatcher(factory.llg_tokenizer, LLMatcher.grammar_from_lark(lark))
    taken = int(matcher.try_consume_tokens(answer))
    pieces = [tokenizer.instruct_tokenizer.tokenizer.id_to_piece(token) for token in answer]
    if taken < len(answer):
        print(f"still true: {pieces[taken]!r}, token {taken + 1} of {len(answer)}, is refused")
    else:
        print(f"no longer true: all of {len(answer)} tokens are taken")


if __name__ == "__main__":
    main()
