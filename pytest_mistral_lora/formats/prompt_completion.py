"""Prompt and completion: a question and its answer, each a text, a message or a list of messages."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.formats.drafts import Draft, RecordReading, add_answer, add_side, take
from pytest_mistral_lora.formats.report import Change, changed
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat

_PAIRS = (*itertools.product(("prompt", "question"), ("completion", "response", "answer")), ("input", "output"))


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    for prompt, completion in _PAIRS:
        if prompt in present and completion in present:
            kind = "text" if isinstance(record[prompt], str) else "messages"
            words = f"`{prompt}` and `{completion}` of {kind}"
            return Evidence(words, {"prompt": prompt, "completion": completion})
    return None


def _convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    prompt, completion = reading.keys["prompt"], reading.keys["completion"]
    changes = [changed("turns", f"{prompt}/{completion}")]
    answer, draft = take(draft, "completion", reading)
    if isinstance(answer, str) and answer[:1] == " " and answer[1:2] not in ("", " "):
        # OpenAI's advice if the text directly follows the prompt; turns have markers between them
        answer = answer[1:]
        changes.append(changed("completion-space"))
    question, draft = take(draft, "prompt", reading)
    draft, more = add_side(draft, prompt, question, "user", reading, weight=0)
    changes += more
    draft, more = add_answer(draft, completion, answer, reading)
    return draft, changes + more


PROMPT_COMPLETION = RowFormat(
    "prompt-completion",
    "prompt and completion",
    {"prompt": "prompt", "completion": "completion"},
    _recognise,
    _convert,
)
