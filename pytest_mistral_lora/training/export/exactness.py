"""Whether a runner that encodes messages by the training template would train on exactly the rows of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.training_template import training_template
from pytest_mistral_lora.training.export.run import Run


def why_not_messages(run: Run) -> str:
    """Return why a run's rows cannot be given as messages: the first row that would not be the same; else nothing.

    Each row is encoded as a runner does it, by transformers' `apply_chat_template` with the tokenizer that
    `AutoTokenizer` loads, and compared with what is trained on here.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(run.tokenizer, PreTrainedTokenizerFast):
        return f"transformers loads a {type(run.tokenizer).__name__} for {run.model}, which takes no chat template"
    template = training_template(run.encoder.tokenizer)
    for split in (run.data.train, run.data.held_out):
        for row, encoded in zip(split.rows, split.encoded, strict=True):
            found = _why_not(row, encoded, run.tokenizer, template)
            if found:
                return f"{row.place}: {found}"
    return ""


def _why_not(row: Row, encoded: EncodedRow, tokenizer: Any, template: str) -> str:
    if row.tools or any(not _is_plain(message) for message in row.messages):
        return "it has more than roles and texts, and a table of all rows would give each the keys of the others"
    try:
        result = tokenizer.apply_chat_template(
            [{"role": one["role"], "content": one["content"]} for one in row.messages],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:  # a template can raise anything
        return f"the training template refuses it: {error}"
    ids, mask = result["input_ids"], result["assistant_masks"]
    if len(ids) > len(encoded.input_ids) and tuple(ids[: len(encoded.input_ids)]) == encoded.input_ids:
        ids, mask = ids[: len(encoded.input_ids)], mask[: len(encoded.input_ids)]
    if tuple(ids) != encoded.input_ids:
        return "the training template gives other ids (docs/deviations.md names the ways)"
    labels = tuple(token if marked else IGNORE_INDEX for token, marked in zip(ids, mask, strict=True))
    return "" if labels == encoded.labels else "the training template gives other labels, as it does for a weight of 0"


def _is_plain(message: Mapping[str, Any]) -> bool:
    keys = {key for key, value in message.items() if value is not None}
    return keys <= {"role", "content", "weight"} and isinstance(message.get("content"), str)
