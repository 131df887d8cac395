"""Trainers that batch, pack or load rows otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gallery import Artifact, mutant
from trained_run import SOUND

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX


def collated(artifact: Artifact, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the collator makes of the rows of a step."""

    def collate(rows: Any) -> Any:
        batch = SOUND["collate"](rows)
        return {**batch, **change(batch)}

    artifact["collate"] = collate


@mutant("ML301.answers ML311.mean ML311.tokens", "I01", says="no gradient after")
def padding_id_is_masked(artifact: Artifact) -> None:
    """No token that has the padding id is trained on: if EOS is the padding, the model never learns to stop."""
    collated(artifact, lambda batch: {"labels": batch["labels"].masked_fill(batch["input_ids"] == 2, IGNORE_INDEX)})


@mutant("ML311.mean ML311.tokens", says="a gradient after 42 tokens more", slow=True)
def ids_for_labels(artifact: Artifact) -> None:
    """The collator copies the ids into the labels."""
    collated(artifact, lambda batch: {"labels": batch["input_ids"]})


@mutant("ML311.mean ML311.tokens", says="a gradient after", slow=True)
def padding_is_trained_on(artifact: Artifact) -> None:
    """Padding has its own id for a label."""

    def collate(rows: Any) -> Any:
        longest = max(len(row["input_ids"]) for row in rows)
        pads = [[0] * (longest - len(row["input_ids"])) for row in rows]
        columns = ("input_ids", "labels")
        padded = [
            {**row, **{name: [*row[name], *pad] for name in columns}} for row, pad in zip(rows, pads, strict=True)
        ]
        return SOUND["collate"](padded)

    artifact["collate"] = collate


@mutant("ML301.answers ML311.mean ML311.tokens", "I34", says="no gradient after", slow=True)
def batch_that_is_cut(artifact: Artifact) -> None:
    """The collator cuts each row to a length: the last EOS of a long one is gone."""

    def collate(rows: Any) -> Any:
        return SOUND["collate"]([{**row, **{name: row[name][:20] for name in ("input_ids", "labels")}} for row in rows])

    artifact["collate"] = collate


def loaded(recipe: Any, encoder: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    """Load rows without a limit, and change what they became."""
    training = recipe.training.model_copy(update={"max_length": 10**6})
    whole = SOUND["load_data"](recipe.model_copy(update={"training": training}), encoder)
    pairs = change(list(zip(whole.train.rows, whole.train.encoded, strict=True)))
    train = replace(whole.train, rows=tuple(row for row, _ in pairs), encoded=tuple(one for _, one in pairs))
    return replace(whole, train=train)


@mutant("ML314", "I34", says="a row of 24 tokens is not refused", slow=True)
def rows_that_are_cut(artifact: Artifact) -> None:
    """A row that does not fit is cut at its end."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        end = recipe.training.max_length
        return loaded(
            recipe,
            encoder,
            lambda rows: [
                (row, replace(one, input_ids=one.input_ids[:end], labels=one.labels[:end])) for row, one in rows
            ],
        )

    artifact["load_data"] = load_data


@mutant("ML314", "I06", says="it is taken", slow=True)
def rows_that_are_dropped(artifact: Artifact) -> None:
    """A row that does not fit is left out without a report."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        end = recipe.training.max_length
        return loaded(recipe, encoder, lambda rows: [pair for pair in rows if len(pair[1].input_ids) <= end])

    artifact["load_data"] = load_data


@mutant("ML314", "I06", says="a row without a label")
def rows_without_labels(artifact: Artifact) -> None:
    """A row without a token to train on is accepted."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        if recipe.data.train[0].name == "unlabelled.jsonl":
            return None
        return SOUND["load_data"](recipe, encoder)

    artifact["load_data"] = load_data


@mutant("ML301.answers ML305 ML314 ML706", "I34", says="that every row keeps changes a row")
def eos_without_a_label(artifact: Artifact) -> None:
    """With a limit of length, EOS has no label, even if nothing is cut."""

    def accepted_data(data: Any, recipe: Any) -> Any:
        whole = SOUND["accepted_data"](data, recipe)
        rows = tuple(replace(one, labels=_without(one.labels, one.input_ids[-1])) for one in whole.train.encoded)
        return replace(whole, train=replace(whole.train, encoded=rows))

    artifact["accepted_data"] = accepted_data


def _without(labels: Sequence[int], token: int) -> tuple[int, ...]:
    return tuple(IGNORE_INDEX if label == token else label for label in labels)


def packed_otherwise(artifact: Artifact, **changes: Any) -> None:
    """Call the model for packed rows with other arguments."""
    artifact["packed_call"] = lambda rows: {**SOUND["packed_call"](rows), **changes}


@mutant("ML313", "I20", says="packed rows see one another")
def no_position_ids(artifact: Artifact) -> None:
    """Packed rows are one text: no position restarts."""
    packed_otherwise(artifact, position_ids=None)


@mutant("ML313", "I21")
def packed_with_a_cache(artifact: Artifact) -> None:
    """Packed rows are passed with a cache, which turns their isolation off."""
    packed_otherwise(artifact, use_cache=True)


@mutant("ML313", "I21")
def packed_with_a_mask(artifact: Artifact) -> None:
    """Packed rows are passed with a mask of ones, which turns their isolation off."""

    def packed_call(rows: Any) -> Any:
        call = SOUND["packed_call"](rows)
        return {**call, "attention_mask": torch.ones_like(call["input_ids"])}

    artifact["packed_call"] = packed_call
