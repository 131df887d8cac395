"""A fact of a manifest, computed again: it matches, it does not, or there is nothing to compute it from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.rows import Row, parse_row, read_rows
from pytest_mistral_lora.chat.templates.render import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.data_stats import (
    SplitStats,
    StatsBuilder,
    hashed_parts,
    removed_counts,
    token_stats,
)
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import framed_ids, framed_row, is_held_out, sha256_parts

State = Literal["match", "mismatch", "not available"]


@dataclass(frozen=True)
class Fact:
    """One recorded fact, computed again.

    Attributes:
        name: Its JSON path in the manifest, without `$.`.
        state: Whether it was found again.
        recorded: What the manifest says; None of a file that it does not list.
        found: What was computed, or why it could not be.
        place: The artifact that it was computed from; empty where there is none.
    """

    name: str
    state: State
    recorded: Any
    found: Any
    place: str = ""

    @property
    def is_unlisted(self) -> bool:
        """Whether it is about a file that the manifest does not list."""
        return self.recorded is None and self.name.startswith("files.")


def computed(name: str, recorded: Any, compute: Callable[[], Any], place: Path | str) -> Fact:
    """Return a fact whose artifact is at hand; what cannot be computed from it is a mismatch."""
    try:
        found = compute()
    except (MistralLoraError, OSError, KeyError, TypeError, ValueError) as error:  # a damaged artifact, of any kind
        return Fact(name, "mismatch", recorded, f"cannot be computed: {error}", str(place))
    return Fact(name, "match" if found == recorded else "mismatch", recorded, found, str(place))


def absent(name: str, recorded: Any, why: str) -> Fact:
    """Return a fact that there is nothing to compute from."""
    return Fact(name, "not available", recorded, why)


PROBE = "probe-1"
"""Name of the set. Other conversations would be another set, under another name."""

_CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather now.", "parameters": _CITY}}
PROBES = {
    PROBE: (
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]},
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "2 + 3 = ?"},
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "And in German?\n\n"},
                {"role": "assistant", "content": "fünf"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "  spaces\tand 漢字, é and e\u0301, 👩‍👩‍👧  "},
                {"role": "assistant", "content": "def f(x):\n    return x\n"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "How is the weather in Oslo?"},
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "name": "weather", "tool_call_id": "a1B2c3D4e", "content": '{"celsius": -3}'},
                {"role": "assistant", "content": "It is -3 °C."},
            ],
            "tools": [_TOOL],
        },
    )
}
"""Conversations by the name of their set."""


def probe_sha256(encode: Callable[[Row], EncodedRow], name: str = PROBE) -> str:
    """Return the SHA-256 of the ids of a set's conversations; one that the backend refuses counts as refused."""
    return sha256_parts(_parts(encode, name))


def _parts(encode: Callable[[Row], EncodedRow], name: str) -> Iterator[bytes]:
    for row in _rows(name):
        yield framed_row(row)
        try:
            yield framed_ids(encode(row).input_ids)
        except MistralLoraError:
            yield framed_ids(())


@cache
def _rows(name: str) -> tuple[Row, ...]:
    return tuple(parse_row(data, place=f"{name}, row {number}") for number, data in enumerate(PROBES[name]))


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


def _figures(data: Mapping[str, Any], rows: Iterable[Row], encode: Encode | None) -> SplitStats:
    """Return the figures of rows after the run's policy; without `encode`, of all rows and without their tokens.

    Raises:
        MistralLoraError: If a file cannot be read.
        _EncodingError: If a row cannot be encoded.
    """
    sums, policy = StatsBuilder(), _policy(data)
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
            sums.update(hashed_parts(row, kept.encoded))
    return sums.build()


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


def _of_rows(figures: SplitStats) -> Iterator[tuple[str, Any]]:
    yield "dataset.rows", figures.tally.rows
    yield "dataset.rows_used", figures.tally.used
    yield "dataset.rows_sha256", figures.sha256["rows"]


def _of_tokens(figures: SplitStats) -> Iterator[tuple[str, Any]]:
    yield from ((f"dataset.{name}", found) for name, found in removed_counts(figures.tally).items())
    yield from ((f"masking.{name}", found) for name, found in token_stats(figures).items())


def _of_held_out(figures: SplitStats | None) -> Iterator[tuple[str, Any]]:
    if figures is not None:
        yield "dataset.held_out_rows", figures.tally.used
        yield "dataset.held_out_rows_sha256", figures.sha256["rows"]
        yield from (
            (f"dataset.held_out_removed.{name}", found) for name, found in removed_counts(figures.tally).items()
        )


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
