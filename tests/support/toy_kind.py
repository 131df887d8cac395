"""A kind of record that the package does not know: a poem, which is trained on as a whole, without turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import check_text, error_at, kind_of
from pytest_mistral_lora.chat.rows import Message, RecordKind, Row
from pytest_mistral_lora.chat.turns import Tokenization, Turn
from pytest_mistral_lora.places import NOWHERE, Place


class Poem(RecordKind):
    """A poem: `{"poem": [line, ...]}`."""

    name = "poem"
    title = row_title = "a poem"
    importable = f"{__name__}:POEM"
    keys = ("poem",)
    roles = ("completion",)
    answer_roles = ("verse",)
    is_prose = True
    count = "poems"

    def claims(self, record: Mapping[str, Any]) -> bool:
        return "poem" in record

    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
        lines = data["poem"]
        if not isinstance(lines, list) or not lines:
            found = f"is {kind_of(lines)}" if lines != [] else "is empty"
            raise error_at(place / "poem", found, "a list of lines")
        for index, line in enumerate(lines):
            check_text(line, place / "poem" / index)
        return (Row(tuple({"role": "verse", "content": line} for line in lines), place=place, kind=self),)

    def claims_prompt(self, record: Mapping[str, Any]) -> bool:
        return record.get("poem") == []

    def answered(self, prompt: Mapping[str, Any], answer: Sequence[Message], place: Place = NOWHERE) -> Row:
        return self.parse({"poem": [message.get("content") for message in answer]}, place)[0]

    def to_json(self, row: Row) -> dict[str, Any]:
        return {"poem": [message["content"] for message in row.messages]}

    def prompt_json(self, row: Row) -> dict[str, Any]:
        return {"poem": []}

    def answer_groups(self, row: Row) -> list[list[int]]:
        return [[*range(len(row.messages))]]

    def content_part(self, row: Row, index: int) -> tuple[str | int, ...]:
        return "poem", index

    def answer_words(self, turn: int | None) -> str:
        return "the poem"

    def claims_ids(self, ids: Sequence[int], oracle: Tokenization) -> bool:
        # v1 writes a conversation without control tokens, too
        inside = {*ids} - {oracle.bos_id, oracle.eos_id}
        return "[INST]" in oracle.control_ids and bool(inside) and inside.isdisjoint(oracle.control_ids.values())

    def read_ids(self, ids: Sequence[int], oracle: Tokenization, labels: Sequence[int] | None, place: Place) -> Row:
        return self.parse({"poem": oracle.decode(list(ids)).split("\n")}, place)[0]

    def turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        text = "\n".join(message["content"] for message in row.messages)
        ids, end = oracle.encode_text(text), (oracle.eos_id,)
        return [Turn("completion", (*ids, *end), [(text, ids), (None, end)])]

    def prompt_turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        return []


POEM = Poem()
