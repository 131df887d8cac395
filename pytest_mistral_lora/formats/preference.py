"""Preference pairs: a prompt with a chosen and a rejected answer, or with several answers that have scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.chat.fields import error_at
from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS
from pytest_mistral_lora.formats.declared_keys import is_number
from pytest_mistral_lora.formats.drafts import (
    Draft,
    RecordReading,
    add_answer,
    add_history,
    add_pair,
    add_side,
    take,
    take_joined,
)
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat

_PAIRS = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_messages", "rejected_messages"),
)
_FEWEST = 2
_PROMPTS = ("prompt", "input", *MESSAGE_LISTS[:3], "question")


_ANSWERS = ("responses", "completions", "answers", "candidates")
_SCORES = ("scores", "rewards", "ratings")
_TEXT_OF_ANSWER = ("response", "content", "text")
_SCORE_OF_ANSWER = ("overall_score", "score")
"""Keys of an answer that is an object, as in UltraFeedback."""


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    for chosen, rejected in _PAIRS:
        if chosen in present and rejected in present:
            keys = {"chosen": chosen, "rejected": rejected}
            return Evidence(f"`{chosen}` and `{rejected}`", {**keys, **_prompt_keys(present)})
    answers = next((key for key in _ANSWERS if key in present), "")
    scores = next((key for key in _SCORES if key in present), "")
    prompt = _prompt_keys(present)
    if not prompt or _scored(record.get(answers), record.get(scores)) is None:
        return None
    words = f"`{answers}` and `{scores}`" if scores else f"`{answers}` with a score each"
    return Evidence(words, {"answers": answers, "scores": scores or answers, **prompt})


def _prompt_keys(present: Collection[str]) -> dict[str, str]:
    """Return the keys of the prompt of a record, by the name of the field."""
    if "instruction" in present:
        return {"prompt": "instruction", **{key: key for key in ("input", "history") if key in present}}
    prompt = next((key for key in _PROMPTS if key in present), "")
    return {"prompt": prompt} if prompt else {}


def _scored(answers: Any, scores: Any) -> list[tuple[float, Any]] | None:
    """Return the score and the value of each of several answers; None for values of another form.

    Args:
        answers: The answers, or objects with an answer and its score.
        scores: The scores of the answers; None if they are in the objects.
    """
    if not isinstance(answers, list) or len(answers) < _FEWEST:
        return None
    if scores is None and all(isinstance(answer, Mapping) for answer in answers):
        scores = [next((answer[key] for key in _SCORE_OF_ANSWER if key in answer), None) for answer in answers]
        answers = [next((answer[key] for key in _TEXT_OF_ANSWER if key in answer), None) for answer in answers]
    if not isinstance(scores, list) or len(scores) != len(answers) or not all(map(is_number, scores)):
        return None
    return list(zip(scores, answers, strict=True))


def _convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    chosen, rejected, draft, changes = _sides(draft, reading)
    keeps_both = "rejected" not in reading.lossy
    # a pair has no weights: its prompt is not scored
    weight = None if keeps_both else 0
    draft, more = add_history(draft, reading, weight=weight)
    changes += more
    if "input" in reading.keys:
        question, draft, more = take_joined(draft, "prompt", reading)
        changes += more
    else:
        question, draft = take(draft, "prompt", reading)
    if question is not None:
        draft, more = add_side(draft, reading.keys.get("prompt", "prompt"), question, "user", reading, weight=weight)
        changes += more
    if keeps_both:
        draft, more = add_pair(draft, chosen, rejected, reading)
    else:
        changes += [lost("rejected"), changed("chosen")]
        draft, more = add_answer(draft, *chosen, reading)
    return draft, changes + more


def _sides(draft: Draft, reading: RecordReading) -> tuple[tuple[str, Any], tuple[str, Any], Draft, list[Change]]:
    """Return the key and the value of both answers, the draft without them, and the changes.

    Raises:
        RowError: If none of several answers is the best.
    """
    if "answers" not in reading.keys:
        chosen, draft = take(draft, "chosen", reading)
        rejected, draft = take(draft, "rejected", reading)
        draft, changes = _without_copy(draft, chosen, reading)
        return (reading.keys["chosen"], chosen), (reading.keys["rejected"], rejected), draft, changes
    key, scores_key = reading.keys["answers"], reading.keys["scores"]
    answers, draft = take(draft, "answers", reading)
    scores, draft = take(draft, "scores", reading)
    scored = _scored(answers, scores)
    if scored is None:
        expected = "several answers, and a number for each"
        raise error_at(reading.place / scores_key, "not a score for each answer", expected)
    # of equal scores, the first answer
    best, worst = (choose(scored, key=lambda answer: answer[0]) for choose in (max, min))
    if best[0] == worst[0]:
        expected = "a best and a worst answer"
        raise error_at(reading.place / scores_key, f"a tie: each answer has the score {best[0]:g}", expected)
    return (key, best[1]), (key, worst[1]), draft, [changed("best-worst", key)]


def _without_copy(draft: Draft, chosen: Any, reading: RecordReading) -> tuple[Draft, list[Change]]:
    """Return the draft without a copy of the chosen conversation, such as UltraFeedback's `messages`."""
    copies = [key for key in MESSAGE_LISTS if key in draft.fields and key not in reading.keys.values()]
    rest = {key: value for key, value in draft.fields.items() if key not in copies or value != chosen}
    return draft._replace(fields=rest), [changed("chosen-copy")] if len(rest) < len(draft.fields) else []


PREFERENCE = RowFormat(
    "preference",
    "preference pairs",
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    _recognise,
    _convert,
    is_tried_first=True,
)
