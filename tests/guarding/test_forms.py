"""The form of a trainer's rows."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from pytest_mistral_lora.guarding.forms import form_of

SAID = [{"role": "assistant", "content": "Hello"}]
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [*ASKED, *SAID], "input_ids": [1]}, "messages"),
        ({"conversations": [*ASKED, *SAID], "input_ids": [1]}, "messages"),
        ({"prompt": ASKED, "completion": SAID, "input_ids": [1]}, "prompt-completion"),
        ({"prompt": "Hi", "completion": "Hello", "input_ids": [1]}, "texts"),
        ({"said": "Hi Hello", "input_ids": [1]}, "text"),
        ({"input_ids": [1], "labels": [1]}, "ids"),
        ({"other": 1}, ""),
    ],
)
def test_the_form_is_told_by_the_columns(row: dict[str, Any], form: str) -> None:
    for read in (Dataset.from_list([row])[0], row):
        assert form_of(read, "said", of_preferences=False, is_packed=False) == form


def test_packed_rows_have_lost_what_they_were_made_of() -> None:
    assert form_of({"input_ids": [1]}, "text", of_preferences=False, is_packed=True) == "packed"


@pytest.mark.parametrize(("answer", "form"), [(SAID, "pairs"), ("Hello", "text-pairs")])
def test_pairs_are_of_messages_or_of_texts(answer: Any, form: str) -> None:
    row = {"prompt": ASKED, "chosen": answer, "rejected": answer}
    assert form_of(row, "text", of_preferences=True, is_packed=False) == form


def test_an_unknown_row_has_no_form() -> None:
    assert form_of({}, "text", of_preferences=False, is_packed=False) == ""
