"""The tokens of a first batch to show: which are to have a loss, which have a label, and which are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from pytest_mistral_lora.chat.diff import TokenSide
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.token_rows import Column, TokenRow
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.guarding.rows import GuardedRow

_MOST_ROWS = 8
_MOST_TOKENS = 4096
"""Rows of the batch on the page, and tokens of a row."""


def shown_tokens(
    columns: Mapping[str, torch.Tensor], trained: torch.Tensor, rows: Sequence[GuardedRow], oracle: Oracle | None
) -> Iterator[TokenRow]:
    """Yield rows of a batch with mistral-common's labels, those of the batch, and what the gradient trains on.

    Args:
        columns: The columns of the batch, `(batch, length)`, with `labels`.
        trained: The positions with a gradient, `(batch, length)` bool: each predicts the next token.
        rows: The rows of the batch, in order; with messages, they have mistral-common's labels.
        oracle: Mistral's own tokenization; None if it is not known.
    """
    if oracle is None or len(rows) != len(trained):
        return
    is_trained = torch.nn.functional.pad(trained[:, :-1], (1, 0))
    for number, row in enumerate(rows[:_MOST_ROWS]):
        mask = columns.get("attention_mask")
        is_text = torch.ones_like(trained[number]) if mask is None else mask[number] != 0
        is_text |= is_trained[number]
        ids, labels, train = (
            values[number][is_text][:_MOST_TOKENS].tolist()
            for values in (columns["input_ids"], columns["labels"], is_trained)
        )
        targets = [token if on else IGNORE_INDEX for token, on in zip(ids, train, strict=True)]
        sides = [
            TokenSide("labels of the batch", ids, labels, oracle.piece),
            TokenSide("trained on, by the gradient", ids, targets, oracle.piece),
        ]
        spans: Sequence[Any] = ()
        with suppress(MistralLoraError, KeyError):  # a finding says what is wrong with the row
            expected = oracle.encode({"messages": row.record["messages"], **_tools_of(row)})
            known = list(expected.input_ids)
            if ids[: len(known)] == known[:_MOST_TOKENS]:
                behind = [IGNORE_INDEX] * (len(ids) - len(known))  # padding that is trained on
                sides.insert(0, TokenSide("mistral-common", ids, [*(expected.labels or ()), *behind], oracle.piece))
                spans = expected.spans
        yield _row(f"{row.place}, in the step", sides, spans)


def _tools_of(row: GuardedRow) -> dict[str, Any]:
    tools = row.record.get("tools")
    return {} if tools is None else {"tools": tools}


def _row(title: str, sides: Sequence[TokenSide], spans: Sequence[Any]) -> TokenRow:
    """Return one row of tokens with a line for each side; a token is marked if the sides differ in its loss."""
    owners = sides[0]._replace(spans=spans).owners()
    columns = []
    for index in range(len(sides[-1].ids)):
        tokens = tuple(side.token(index) for side in sides)
        mark = ">" if len({token.trained for token in tokens}) > 1 else ""
        columns.append(Column(tokens, mark, *owners[index]))
    return TokenRow(title, tuple(side.name for side in sides), tuple(columns))
