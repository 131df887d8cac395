"""Keys beside the text of a record that declare something about its answer: it is good, bad or cut, or has a number.

One table for `import`, which acts on them, and for the checks, which tell what no token shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pytest_mistral_lora.chat.fields import error_at
from pytest_mistral_lora.places import Place

_CUT = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
"""Why an answer ended, in small letters, if the model did not end it: OpenAI's, Mistral's, Anthropic's, Google's."""


class Meaning(NamedTuple):
    """What a key declares.

    Attributes:
        is_mark: Whether true and false mark the answer as good and bad.
        is_rating: Whether a column of nothing but 1 and -1 does.
        is_bad: Whether a value shows by itself that the answer was a bad one.
        is_cut: Whether a value shows by itself that the answer was cut.
    """

    is_mark: bool = False
    is_rating: bool = False
    is_bad: Callable[[Any], bool] = lambda value: False
    is_cut: Callable[[Any], bool] = lambda value: False


_MARK = Meaning(is_mark=True, is_rating=True)
_END = Meaning(is_cut=lambda value: isinstance(value, str) and value.lower() in _CUT)

DECLARED_KEYS: Mapping[str, Meaning] = {
    "label": _MARK,
    "kto_tag": _MARK,
    "score": Meaning(is_rating=True),
    "reward": Meaning(is_rating=True, is_bad=lambda value: is_number(value) and value <= 0),
    "advantage": Meaning(is_bad=lambda value: is_number(value) and value < 0),
    "is_correct": Meaning(is_bad=lambda value: flag_of(value) is False),
    "rating": Meaning(is_bad=lambda value: value in ("bad", "thumbs_down", "negative")),
    "finish_reason": _END,
    "stop_reason": _END,
    "done_reason": _END,
    "is_truncated": Meaning(is_cut=lambda value: flag_of(value) is True),
    "loss": Meaning(),
    "weight": Meaning(),
}
"""The keys, each with its meaning."""


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flag_of(value: Any) -> bool | None:
    """Return the truth of a field, which a column of CSV holds as text; None if it is not a truth value."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower())
    return bool(value) if value in (True, False) else None


def number_of(value: Any) -> float | None:
    """Return the number of a field, which a column of CSV holds as text; None if it is none."""
    try:
        return float(value) if is_number(value) or isinstance(value, str) else None
    except (ValueError, OverflowError):
        return None


def declared_values(record: Any) -> tuple[tuple[str, Any], ...]:
    """Return what a record has under the keys of the table."""
    # most rows have no key but those of a conversation
    if not isinstance(record, Mapping) or record.keys().isdisjoint(DECLARED_KEYS):
        return ()
    return tuple((key, record[key]) for key in record if key in DECLARED_KEYS and record[key] is not None)


def unwanted_key(fields: Mapping[str, Any]) -> str:
    """Return the key that shows by itself that the answer of a record is bad or was cut; empty if no key does."""
    meanings = ((key, value, DECLARED_KEYS[key]) for key, value in declared_values(fields))
    return next((key for key, value, meaning in meanings if meaning.is_bad(value) or meaning.is_cut(value)), "")


def is_signed(values: Collection[Any]) -> bool:
    """Return whether the values of a column are 1 and -1, both of them and nothing else."""
    return {*values} == {1, -1}


class Mark(NamedTuple):
    """The mark of an answer as a good or a bad one, and its key."""

    key: str
    is_good: bool


class MarkColumns:
    """The values of the columns of a file that can mark answers: what one number means, the others tell."""

    _MOST = 3

    def __init__(self, records: Callable[[], Iterable[Any]]) -> None:
        """Take a function that reads the values of the records again; it is called once, if a number is a mark."""
        self._records = records

    @cached_property
    def _values(self) -> Mapping[str, set[float | str]]:
        """For each key, some of its values: numbers, `flag` for true and false, and `other`."""
        found: dict[str, set[float | str]] = {key: set() for key, each in DECLARED_KEYS.items() if each.is_rating}
        for record in self._records():
            for key, value in declared_values(record):
                if key in found and len(found[key]) <= self._MOST:
                    number = number_of(value)
                    is_flag = _is_word(value)
                    found[key].add("flag" if is_flag else "other" if number is None else number)
        return found

    def meaning(self, key: str) -> Literal["1 and -1", "1 and 0", "flags", ""]:
        """Return what the values of a key are; empty if they mark no answers."""
        values = self._values.get(key, set())
        if "flag" in values:
            return "flags"
        if is_signed(values):
            return "1 and -1"
        return "1 and 0" if values <= {0, 1} else ""


def _is_word(value: Any) -> bool:
    return str(value).lower() in ("true", "false")


def mark_of(
    fields: Mapping[str, Any], columns: MarkColumns, place: Place, *, declared: str, rates: bool
) -> Mark | None:
    """Return the mark of the answer of a record; None if no key marks it.

    Args:
        fields: The fields of the record.
        columns: The columns of its file.
        place: Its place.
        declared: The key that its layout declares as a mark; empty if it declares none.
        rates: Whether 1 and 0 are marks: beside a prompt and its completion, `label` is KTO's.

    Raises:
        RowError: If a value is no mark where the others of its column are marks.
    """
    marks = (
        mark for key, value in _rated(fields, declared) if (mark := _mark(key, value, columns, place, declared, rates))
    )
    return next(marks, None)


def _rated(fields: Mapping[str, Any], declared: str) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if key and (key == declared or (key in DECLARED_KEYS and DECLARED_KEYS[key].is_rating)):
            yield key, value


def _mark(key: str, value: Any, columns: MarkColumns, place: Place, declared: str, rates: bool) -> Mark | None:
    flag, is_mark = flag_of(value), key == declared or DECLARED_KEYS[key].is_mark
    if key == declared and flag is None:
        raise error_at(place / key, repr(value), "true or false")
    if flag is not None and is_mark and (key == declared or _is_word(value)):
        return Mark(key, flag)
    number = number_of(value)
    if number is None:
        return None
    meaning = columns.meaning(key)
    if meaning == "flags" and is_mark and flag is None:
        raise error_at(place / key, repr(value), "true or false, as in other records")
    if meaning == "1 and -1":
        return Mark(key, number > 0)
    # 0 may be a user's class, but beside a prompt and its completion it is KTO's mark
    is_rated = flag is not None and is_mark and rates and meaning in ("1 and 0", "flags")
    return Mark(key, number > 0) if is_rated else None
