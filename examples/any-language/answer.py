"""A program for run.py: it answers by mistral-common, without labels. Usage: python answer.py TOKENIZER_FILE"""

import functools
import json
import sys

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

MODES = {"row": ValidationMode.finetuning, "prompt": ValidationMode.test}


@functools.cache
def tokenizer(key):
    """Return the tokenizer for whole rows or for prompts, loaded once."""
    return MistralTokenizer.from_file(sys.argv[1], mode=MODES[key])


for line in sys.stdin:
    question = json.loads(line)
    [key] = MODES.keys() & question.keys()
    try:
        request = ChatCompletionRequest.from_openai(**question[key])
        answer = {"input_ids": tokenizer(key).encode_chat_completion(request).tokens}
    except (MistralCommonException, ValueError) as error:
        answer = {"refused": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
