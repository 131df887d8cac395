"""The chat template that mistral-common generates writes the JSON of a tool call as HTML."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mistral_common
import transformers
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


def main() -> None:
    """Render a tool call as transformers does, and look for HTML."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(FILE.read_bytes())
        # transformers 4 has the older name
        loader = getattr(transformers, "TokenizersBackend", transformers.LlamaTokenizerFast)
        fast = loader.from_pretrained(folder)
    template = convert_tokenizer_to_chat_template(FILE)
    text = str(fast.apply_chat_template(MESSAGES, chat_template=template, tokenize=False))
    print(f"{'still true' if '&#34;' in text else 'no longer true'}: {text!r}")


if __name__ == "__main__":
    main()
