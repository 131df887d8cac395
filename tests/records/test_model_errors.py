"""The words for pydantic's errors, for every kind of value of a recipe."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from pytest_mistral_lora.records.schema import error_in_words


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rank: int = Field(default=8, gt=0, le=64)
    names: list[str] = Field(default_factory=lambda: ["q"], min_length=1)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["linear", "cosine"] = "linear"
    rate: float = 1.0
    dry: StrictBool = False
    inner: _Inner | Literal["none"] = Field(default_factory=_Inner)
    several: dict[str, _Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"kind": "cosin"}, "expected 'linear' or 'cosine' (did you mean 'cosine'?)"),
        ({"kind": "x"}, "expected 'linear' or 'cosine'"),
        ({"rate": "fast"}, "expected a number"),
        ({"rate": float("inf")}, "expected a finite number"),
        ({"dry": 1}, "expected true or false"),
        ({"rat": 1}, "no such key (did you mean 'rate'?)"),
        ({"zzzz": 1}, "no such key; expected one of dry, inner, kind, rate, several"),
        ({"inner": {"rank": 0}}, "expected more than 0"),
        ({"inner": {"rank": 65}}, "expected at most 64"),
        ({"inner": {"rank": 1.5}}, "expected a whole number"),
        ({"inner": {"names": []}}, "expected at least 1, found 0"),
        ({"inner": {"names": "q"}}, "expected a list"),
        ({"inner": {"rnk": 1}}, "no such key (did you mean 'rank'?)"),
        ({"several": 3}, "expected a mapping"),
    ],
)
def test_each_error_says_what_was_expected(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Model.model_validate(data)
    assert error_in_words(caught.value.errors()[0], _Model) == words
