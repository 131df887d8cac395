"""The checkpoint's chat template: rendered in a sandbox, given generation blocks, compared with the oracle."""

from pytest_mistral_lora.chat.templates.chat_template import REFUSES, ChatTemplate

__all__ = ["REFUSES", "ChatTemplate"]
