"""Fill-in-the-middle rows: the text before a gap, the text after it, and the text that fills it.

A row is `{"prompt": …, "suffix": …, "completion": …}`, as Codestral's API names the first two. It has no turns and no
chat layout: mistral-common encodes it as `[SUFFIX]`, the suffix, `[PREFIX]`, the prompt, and the completion follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import ROW_KEYS, check_text, error_at, kind_of, refuse_keys
from pytest_mistral_lora.chat.kinds.fim.rows import FIM_KEYS, FIM_ROLES, FimRow
from pytest_mistral_lora.chat.rows import Message, RecordKind, Row
from pytest_mistral_lora.chat.turns import Tokenization, Turn
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place

__all__ = ["FIM", "FIM_KEYS", "FIM_ROLES", "FimRow", "parse_fim_row"]


class Fim(RecordKind):
    """Fill-in-the-middle: the completion is trained on."""

    name = "fim"
    title = "fill-in-the-middle"
    row_title = "a fill-in-the-middle row"
    importable = f"{__name__}:FIM"
    keys = FIM_KEYS
    order = 30
    roles = FIM_ROLES
    answer_roles = ("completion",)
    text_law = "pytest_mistral_lora.conformance.mask.fim_law:fim_violation"
    text_rule = "ML670"
    count = "fim_rows"
    signs = "pytest_mistral_lora.conformance.dataset.fim:fim_signs"
    file_faults = "pytest_mistral_lora.conformance.dataset.fim:FIM_FAULTS"
    id_fault = "pytest_mistral_lora.conformance.encoded.fim_faults:fim_fault"
    answer_marker = "[PREFIX]"
    row_format = "pytest_mistral_lora.formats.fill_in_the_middle:FILL_IN_THE_MIDDLE"

    def claims(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has the keys of a gap: a suffix is in no other row."""
        return all(record.get(key) is not None for key in FIM_KEYS)

    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[FimRow, ...]:
        """Check a record, and return its row.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        return (parse_fim_row(data, place=place),)

    def claims_prompt(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has a suffix, and no completion."""
        return record.get("suffix") is not None and record.get("completion") is None

    def answered(self, prompt: Mapping[str, Any], answer: Sequence[Message], place: Place = NOWHERE) -> FimRow:
        """Return the row of the texts around a gap and the one message of its completion.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        if len(answer) != 1:
            raise RowError(f"{len(answer)} answers", place=place, expected="the completion alone")
        return parse_fim_row({**prompt, "completion": answer[0].get("content")}, place=place)

    def to_json(self, row: Row) -> dict[str, Any]:
        """Return the three texts by their keys."""
        texts = _texts(row)
        return {key: texts[key] for key in FIM_KEYS}

    def prompt_json(self, row: Row) -> dict[str, Any]:
        """Return the texts that the completion follows."""
        texts = _texts(row)
        return {"prompt": texts["prompt"], "suffix": texts["suffix"]}

    def answer_groups(self, row: Row) -> list[list[int]]:
        """Return the index of the completion: the one text that the model writes."""
        return [[FIM_ROLES.index("completion")]]

    def content_part(self, row: Row, index: int) -> tuple[str | int, ...]:
        """Return the key of a text."""
        return (FIM_ROLES[index],)

    def answer_words(self, turn: int | None) -> str:
        """Return the one answer in words."""
        return "the completion"

    def turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns of suffix, prompt and completion.

        Raises:
            OracleRejection: If the tokenizer has no encoding of fill-in-the-middle.
        """
        from pytest_mistral_lora.chat.kinds.fim.encoder import FimEncoder

        return FimEncoder.of(oracle).turns(row)

    def prompt_turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns of suffix and prompt.

        Raises:
            OracleRejection: If the tokenizer has no encoding of fill-in-the-middle.
        """
        from pytest_mistral_lora.chat.kinds.fim.encoder import FimEncoder

        return FimEncoder.of(oracle).prompt_turns(row)

    def answer_text(self, oracle: Tokenization, ids: Sequence[int]) -> str:
        """Return the text of a completion, with the space that it begins with."""
        from pytest_mistral_lora.chat.kinds.fim.encoder import FimEncoder

        return FimEncoder.of(oracle).decode_completion(ids)

    def claims_ids(self, ids: Sequence[int], oracle: Tokenization) -> bool:
        """Return whether `[SUFFIX]` stands behind BOS."""
        start = next((n for n, token in enumerate(ids) if token != oracle.bos_id), len(ids))
        return start < len(ids) and ids[start] == oracle.control_ids.get("[SUFFIX]")

    def read_ids(self, ids: Sequence[int], oracle: Tokenization, labels: Sequence[int] | None, place: Place) -> FimRow:
        """Return the row of some ids; its completion begins with the first label.

        Raises:
            UnreadableIdsError: If the ids have no `[PREFIX]`, or no label tells where the completion begins.
        """
        from pytest_mistral_lora.chat.kinds.fim.encoder import FimEncoder

        return FimRow.of(*FimEncoder.of(oracle).texts_of(tuple(ids), labels), place=place)


FIM = Fim()


def _texts(row: Row) -> dict[str, str]:
    return {message["role"]: str(message["content"]) for message in row.messages}


def parse_fim_row(data: Any, *, place: Place = NOWHERE) -> FimRow:
    """Check plain JSON data and return it as a fill-in-the-middle row.

    Raises:
        RowError: With the field and the value, if the data is not such a row.
    """
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {kind_of(data)}", place=place, expected='an object with "prompt" and "suffix"')
    refuse_keys(data, place)
    for key in ROW_KEYS:
        if data.get(key) is not None:
            raise error_at(place / key, "beside a suffix", "a row of turns, or prompt, suffix and completion")
    for key in FIM_KEYS:
        if data.get(key) is None:
            raise RowError(f'no "{key}"', place=place, expected=f'a text under "{key}"')
        check_text(data[key], place / key)
    return FimRow.of(*(data[key] for key in FIM_KEYS), place=place)
