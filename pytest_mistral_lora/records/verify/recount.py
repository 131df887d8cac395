"""Encode the rows of a run again: an upgraded library that moves one token is found here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.policy import Policy
from pytest_mistral_lora.chat.rows import Row, read_rows
from pytest_mistral_lora.chat.template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.figures import Figures, Sums, hashed, removed, tokens
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import framed_row
from pytest_mistral_lora.records.identity import is_held_out

Encode = Callable[[Row], EncodedRow]


class _EncodingError(Exception):
    """The rows cannot be encoded again."""


def recounted(
    folder: Path, data: Mapping[str, Any], train: Sequence[Path], held: Sequence[Path] | None
) -> Iterator[tuple[str, Any]]:
    """Yield what a manifest records of its rows, by JSON path, with what it comes to now: a value, or an error.

    Args:
        folder: The folder of the manifest, with tokenizer and template.
        data: The manifest.
        train: The training files in recipe order.
        held: The files that were held out, in recipe order; None where they are not at hand.
    """
    try:
        encode = _encoder(folder, data)
        figures = _figures(data, _training_rows(data, train), encode)
        held_out = None if held is None else _figures(data, _held_rows(data, train, held), encode)
    except _EncodingError as error:
        yield "masking.ids_sha256", error
        yield from _without_tokens(data, train)
    except MistralLoraError as error:
        yield "dataset.rows_sha256", error
    else:
        yield from _of_rows(figures)
        yield from _of_tokens(figures)
        yield from _of_held_out(held_out)


def _without_tokens(data: Mapping[str, Any], train: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    if {"drop"} & {data["dataset"].get("truncation"), data["dataset"].get("unsupervised")}:
        return  # which rows were used is not known without their tokens
    try:
        yield from _of_rows(_figures(data, _training_rows(data, train), None))
    except MistralLoraError as unreadable:
        yield "dataset.rows_sha256", unreadable


def _figures(data: Mapping[str, Any], rows: Iterable[Row], encode: Encode | None) -> Figures:
    """Return the figures of rows after the run's policy; without `encode`, of all rows and without their tokens.

    Raises:
        MistralLoraError: If a file cannot be read.
        _EncodingError: If a row cannot be encoded.
    """
    sums, policy = Sums(), _policy(data)
    for row in rows:
        if encode is None:
            sums.tally.rows += 1
            sums.tally.used += 1
            sums.update({"rows": framed_row(row)})
            continue
        encoded = encode(row)
        kept = policy.apply(encoded)
        sums.tally.add(encoded, kept)
        if kept.encoded is not None:
            sums.update(hashed(row, kept.encoded))
    return sums.figures()


def _training_rows(data: Mapping[str, Any], paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from (row for row in read_rows(path) if not is_held_out(row, data["dataset"]["held_out"]))


def _held_rows(data: Mapping[str, Any], train: Sequence[Path], held: Sequence[Path]) -> Iterator[Row]:
    for path in train:
        yield from (row for row in read_rows(path) if is_held_out(row, data["dataset"]["held_out"]))
    for path in held:
        yield from read_rows(path)


def _policy(data: Mapping[str, Any]) -> Policy:
    chosen = {name: data["dataset"].get(name, "error") for name in ("truncation", "unsupervised")}
    return Policy(data["training"]["max_length"], **chosen)


def _of_rows(figures: Figures) -> Iterator[tuple[str, Any]]:
    yield "dataset.rows", figures.tally.rows
    yield "dataset.rows_used", figures.tally.used
    yield "dataset.rows_sha256", figures.sha256["rows"]


def _of_tokens(figures: Figures) -> Iterator[tuple[str, Any]]:
    yield from ((f"dataset.{name}", found) for name, found in removed(figures.tally).items())
    yield from ((f"masking.{name}", found) for name, found in tokens(figures).items())


def _of_held_out(figures: Figures | None) -> Iterator[tuple[str, Any]]:
    if figures is not None:
        yield "dataset.held_out_rows", figures.tally.used
        yield "dataset.held_out_rows_sha256", figures.sha256["rows"]
        yield from ((f"dataset.held_out_removed.{name}", found) for name, found in removed(figures.tally).items())


def _encoder(folder: Path, data: Mapping[str, Any]) -> Encode:

    def encode(row: Row) -> EncodedRow:
        try:
            return own(row)
        except (MistralLoraError, OSError, ValueError) as error:
            raise _EncodingError(str(error)) from error

    try:
        own = backend_of(folder, data)
    except (MistralLoraError, OSError, ValueError) as error:  # a folder without its template, or a damaged one
        raise _EncodingError(str(error)) from error
    return encode


def backend_of(folder: Path, data: Mapping[str, Any]) -> Encode:
    """Return the backend that the manifest names, made of the folder's own tokenizer and template.

    Raises:
        MistralLoraError: If it cannot be made.
        OSError: If a file cannot be read.
        ValueError: If it is not UTF-8.
    """
    if data["tokenizer"]["backend"] == "mistral-common":
        return Oracle(inside(folder, data["tokenizer"]["file"])).encode
    # bytes: line ends are part of the rendering
    template = inside(folder, data["template"]["file"]).read_bytes().decode()
    return ChatTemplate(CheckpointTokenizer(folder).fast, template).encode
