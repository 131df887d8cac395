"""Encode the rows of a run again, and the probe conversations that are part of every record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.rows import Row, parse_row, read_rows
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.data_stats import SplitStats, StatsBuilder, hashed_parts, removed_counts, token_stats
from pytest_mistral_lora.records.hashing import framed_ids, framed_row, is_held_out, sha256_parts

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
    """Return the SHA-256 of the ids of a set's conversations; one that the backend refuses has no ids."""

    def parts() -> Iterator[bytes]:
        for row in _probe_rows(name):
            yield framed_row(row)
            try:
                yield framed_ids(encode(row).input_ids)
            except MistralLoraError:
                yield framed_ids(())

    return sha256_parts(parts())


@cache
def _probe_rows(name: str) -> tuple[Row, ...]:
    return tuple(parse_row(data, place=f"{name}, row {number}") for number, data in enumerate(PROBES[name]))


class _EncodingError(Exception):
    """The rows cannot be encoded again."""


def recount_rows(
    folder: AdapterFolder, train: Sequence[Path], held: Sequence[Path] | None
) -> Iterator[tuple[str, Any]]:
    """Yield the recorded values of the rows, by JSON path in the manifest, each recomputed: a value, or an error.

    Args:
        folder: A folder with a manifest, tokenizer and template.
        train: The training files in recipe order.
        held: The files that were held out, in recipe order; None if they are missing.
    """
    data = folder.require_manifest().data
    try:
        encode = _recorded_encode(folder)
        stats = _split_stats(data, _split_rows(data, train, (), held_out=False), encode)
        held_out = None
        if held is not None:
            held_out = _split_stats(data, _split_rows(data, train, held, held_out=True), encode)
    except _EncodingError as error:
        yield "masking.ids_sha256", error
        if "drop" not in (data["dataset"].get("truncation"), data["dataset"].get("unsupervised")):
            yield from _counts_without_tokens(data, train)
        return  # without tokens, nothing shows which rows a policy dropped
    except MistralLoraError as error:
        yield "dataset.rows_sha256", error
        return
    yield from _row_values(stats)
    yield from ((f"dataset.{name}", found) for name, found in removed_counts(stats.tally).items())
    yield from ((f"masking.{name}", found) for name, found in token_stats(stats).items())
    if held_out is not None:
        yield "dataset.held_out_rows", held_out.tally.used
        yield "dataset.held_out_rows_sha256", held_out.sha256["rows"]
        yield from (
            (f"dataset.held_out_removed.{name}", found) for name, found in removed_counts(held_out.tally).items()
        )


def _counts_without_tokens(data: Mapping[str, Any], train: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    try:
        yield from _row_values(_split_stats(data, _split_rows(data, train, (), held_out=False), None))
    except MistralLoraError as unreadable:
        yield "dataset.rows_sha256", unreadable


def _row_values(stats: SplitStats) -> Iterator[tuple[str, Any]]:
    yield "dataset.rows", stats.tally.rows
    yield "dataset.rows_used", stats.tally.used
    yield "dataset.rows_sha256", stats.sha256["rows"]


def _split_rows(
    data: Mapping[str, Any], train: Sequence[Path], held: Sequence[Path], *, held_out: bool
) -> Iterator[Row]:
    """Yield the rows of the training files that are on one side of the split, then those of the held-out files."""
    for path in train:
        yield from (row for row in read_rows(path) if is_held_out(row, data["dataset"]["held_out"]) is held_out)
    for path in held:
        yield from read_rows(path)


def _split_stats(
    data: Mapping[str, Any], rows: Iterable[Row], encode: Callable[[Row], EncodedRow] | None
) -> SplitStats:
    """Return the statistics of rows after the run's policy; without `encode`, of all rows and without their tokens.

    Raises:
        MistralLoraError: If a file cannot be read.
        _EncodingError: If a row cannot be encoded.
    """
    chosen = {name: data["dataset"].get(name, "error") for name in ("truncation", "unsupervised")}
    sums, policy = StatsBuilder(), Policy(data["training"]["max_length"], **chosen)
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


def _recorded_encode(folder: AdapterFolder) -> Callable[[Row], EncodedRow]:
    """Return the encoding of the run; whatever is wrong with its files or a row is an `_EncodingError`."""
    try:
        encoder = folder.recorded_encoder
    except (MistralLoraError, OSError, ValueError) as error:
        raise _EncodingError(str(error)) from error

    def encode(row: Row) -> EncodedRow:
        try:
            return encoder.encode(row)
        except (MistralLoraError, OSError, ValueError) as error:
            raise _EncodingError(str(error)) from error

    return encode
