"""The training template: the official chat template with `{% generation %}` blocks around what the assistant says.

Trainers that mask by the template, such as TRL with `assistant_only_loss`, need such a template, and have none for
Mistral. It renders what the official template renders, byte for byte, and marks each assistant turn from its first
character to the closing `</s>`, tool calls from `[TOOL_CALLS]` on.

What a template cannot do, this one cannot either: an assistant message of weight 0 is marked like any other, text that
spells a control token becomes one, and it differs from mistral-common by the named deviations (`chat.deviations`).
"""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.chat.generation import has_generation, with_generation
from pytest_mistral_lora.chat.template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, oracle_file
from pytest_mistral_lora.errors import NoTemplateError


def training_template(tokenizer: str | Path | CheckpointTokenizer) -> str:
    """Return the training template of a tokenizer, as Jinja text.

    Args:
        tokenizer: A checkpoint folder, or a single tokenizer file (`*.model.vN`, `tekken.json`). Where there is a
            Mistral tokenizer file, the template is the one that mistral-common generates for it; else the folder's own.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded.
        NoTemplateError: If there is no template, or none with a branch for the assistant's messages.
    """
    loaded = tokenizer if isinstance(tokenizer, CheckpointTokenizer) else CheckpointTokenizer(Path(tokenizer))
    source = official_template(loaded)
    marked = source if has_generation(source) else with_generation(source)
    if marked is None:
        raise NoTemplateError(
            "the chat template has no branch for messages of the role assistant",
            place=str(loaded.path),
            next_step="Put {% generation %} and {% endgeneration %} around what it writes for them.",
        )
    return marked


def official_template(tokenizer: CheckpointTokenizer) -> str:
    """Return the template that mistral-common generates, or a checkpoint's own where it has no Mistral tokenizer file.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded.
        NoTemplateError: If there is none.
    """
    if oracle_file(tokenizer.path) is not None:
        return tokenizer.oracle.chat_template()
    return ChatTemplate(tokenizer.fast).source
