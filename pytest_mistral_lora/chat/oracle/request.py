"""A row as mistral-common's request, and the fields of a request that a tokenizer has beside texts and tools."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.fields import without_nulls
from pytest_mistral_lora.chat.rows import Row, weight_of


@dataclass(frozen=True, slots=True)
class RowFeatures:
    """The fields of a row that only some tokenizers encode.

    Attributes:
        thinking: Whether answers may have thinking chunks.
        efforts: The values of `reasoning_effort`, in the tokenizer's order; empty if it has no such setting.
        schemas: Whether the schema of a `response_format` is shown to the model.
    """

    thinking: bool = False
    efforts: tuple[str, ...] = ()
    schemas: bool = False

    @classmethod
    def of(cls, version: str, literals: Collection[str], builder: Any) -> RowFeatures:
        """Return the features of a tokenizer.

        Args:
            version: Its version.
            literals: Its control tokens.
            builder: mistral-common's `ModelSettingsBuilder` of the file, or None.
        """
        # from v13 on only: a file of v11 may have the two markers, and its encoder does not use them
        thinking = int(version[1:]) >= 13 and {"[THINK]", "[/THINK]"} <= {*literals}
        # the fields of a builder that this mistral-common does not know yet are not there
        effort = getattr(builder, "reasoning_effort", None)
        efforts = () if effort is None else tuple(str(value) for value in effort.values)
        return cls(thinking, efforts, getattr(builder, "json_schema", None) is not None)


def request_data(row: Row) -> dict[str, Any]:
    """Return the request of a row as plain data, without nulls."""
    messages = []
    for message in row.messages:
        data = without_nulls(message)
        if data["role"] == "assistant":
            # An absent weight is 1, so that a spelled-out 1 does not split a turn.
            data["weight"] = weight_of(message)
            data["tool_calls"] = [without_nulls(call) for call in data.get("tool_calls", ())] or None
        messages.append(data)
    settings: dict[str, Any] = {} if row.reasoning_effort is None else {"reasoning_effort": row.reasoning_effort}
    if row.response_format is not None:
        # not within the schema, where a null is a value
        settings["response_format"] = given = without_nulls(row.response_format)
        if named := given.get("json_schema"):
            given["json_schema"] = without_nulls(named)
    tools = [{"type": "function", "function": without_nulls(tool["function"])} for tool in row.tools or ()]
    return {"messages": messages, "tools": tools or None, **settings}
