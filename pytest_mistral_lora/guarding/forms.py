"""The form of the rows that a trainer was given, and the fix of each rule in its words for that form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.preference import CHOSEN, REJECTED
from pytest_mistral_lora.conformance.encoded.columns import MASKS
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.runners import Trainer

_FORMS = {
    "messages": "rows of messages",
    "prompt-completion": "prompt and completion as messages",
    "texts": "prompt and completion as texts",
    "text": "rendered text",
    "ids": "ids",
}
"""The forms of rows of a trainer of single answers, in words."""
_CASES = ("ids", "labels", "packing", "supervised-text")
"""Checks whose rules have one fix in a form, unless a rule has its own."""


def form_of(row: Mapping[str, Any], text_field: str, *, of_preferences: bool, is_packed: bool) -> str:
    """Return the form of a dataset's rows, as the sections of fixes name it; empty if it is unknown.

    Args:
        row: A row of the trainer's dataset, perhaps with columns that the trainer has added; empty if it is unknown.
        text_field: The column of rendered texts.
        of_preferences: Whether the trainer is one of preferences.
        is_packed: Whether the trainer has packed the rows, and so taken away what they were made of.
    """
    if of_preferences:
        answers = [row[name] for name in (CHOSEN, REJECTED, "completion") if name in row]
        return "text-pairs" if answers and all(isinstance(answer, str) for answer in answers) else "pairs"
    if "messages" in row or "conversations" in row:
        return "messages"
    if "completion" in row and "prompt" in row:
        return "texts" if isinstance(row["completion"], str) else "prompt-completion"
    if text_field in row:
        return "text"
    if "input_ids" in row:
        return "packed" if is_packed else "ids"
    return ""


def trains(row: Mapping[str, Any], token: int) -> bool:
    """Return whether a token is trained on in a row of ids, before its collator.

    Args:
        row: A row of the trainer's dataset, with the columns that the trainer has added; empty if it is unknown.
        token: The token.
    """
    ids = row.get("input_ids")
    if not isinstance(ids, Sequence):
        return False
    masks = [row[name] for name in MASKS if isinstance(row.get(name), Sequence)]
    labels = row["labels"] if isinstance(row.get("labels"), Sequence) else ids
    columns = zip(ids, labels, *masks, strict=False)
    return any(one == token and label != IGNORE_INDEX and all(marks) for one, label, *marks in columns)


def fixes_of(trainer: Trainer | None, form: str) -> Mapping[str, str]:
    """Return the fix of each rule in the words of a trainer, for rows of a form.

    Args:
        trainer: The trainer; None for an unknown one.
        form: The form; empty if it is unknown. Then a fix names each form for which the trainer has words.
    """
    if trainer is None:
        return {}
    if form and (fixes := trainer.fixes(form)):
        return _by_rule(fixes)
    by_form = {words: _by_rule(fixes) for name, words in _FORMS.items() if (fixes := trainer.fixes(name))}
    if form or not by_form:
        return trainer.fixes("preferences" if form in ("pairs", "text-pairs") else "rows")
    joined = {}
    for rule in {rule for fixes in by_form.values() for rule in fixes}:
        forms: dict[str, list[str]] = {}
        for words, fixes in by_form.items():
            if rule in fixes:
                forms.setdefault(fixes[rule], []).append(words)
        joined[rule] = next(iter(forms)) if len(forms) == 1 else _joined(forms)
    return joined


def _joined(forms: Mapping[str, list[str]]) -> str:
    # the name of a trainer keeps its letters
    begun = {fix: fix if fix[1].isupper() else fix[0].lower() + fix[1:] for fix in forms}
    return " ".join(f"For {' or '.join(words)}: {begun[fix]}" for fix, words in forms.items())


def _by_rule(fixes: Mapping[str, str]) -> Mapping[str, str]:
    """Return fixes with those of checks at each of their rules."""
    of_cases = {rule.id: fixes[case] for case in _CASES if case in fixes for rule in RULES.of("encoded", case)}
    return of_cases | {rule: fix for rule, fix in fixes.items() if rule not in _CASES}
