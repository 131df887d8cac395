"""Numbers and hashes of the rows of a run, and the same recomputed from a finished folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.chat.encoded import DROPPED, EncodedRow, Policy, PolicyResult
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.likeness import conversation_numbers
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import framed_ids, framed_row, is_held_out, sha256_parts
from pytest_mistral_lora.records.gate import HELD_OUT, RETENTION

HASHED = ("rows", "ids", "labels")

SHOWN = 10
"""The number of places to keep for each change; all rows are counted."""


@dataclass
class RowCounts:
    """Counts of rows and tokens of one side of a split.

    Attributes:
        rows: Rows that were read for it.
        used: Rows that the policy kept.
        tokens: Tokens of the kept rows.
        supervised_tokens: The number of these with loss.
        completions: Kept rows whose answer is a completion, such as one of fill-in-the-middle, and no turn.
        tokens_removed: Tokens of rows that were dropped, and tokens that were cut off.
        supervised_tokens_removed: The number of these with loss.
        changes: Number of rows with each change of `PolicyResult.changes`.
        places: File (its index) and line of the first rows with each change.
        converted: Number of rows with each conversion of `Row.converted`.
    """

    rows: int = 0
    used: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    completions: int = 0
    tokens_removed: int = 0
    supervised_tokens_removed: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)

    def add(self, before: EncodedRow, kept: PolicyResult, file: int = 0, line: int = 0) -> None:
        """Add a row: its encoding, and the policy's result for it."""
        tokens, supervised = (len(kept.encoded.input_ids), kept.encoded.supervised_tokens) if kept.encoded else (0, 0)
        self.rows += 1
        self.used += kept.encoded is not None
        self.completions += kept.encoded is not None and before.spans[-1].role == "completion"
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.tokens_removed += len(before.input_ids) - tokens
        self.supervised_tokens_removed += before.supervised_tokens - supervised
        self.changes.update(kept.changes)
        for change in kept.changes:
            self._place(change, [(file, line)])

    def extend(self, other: RowCounts) -> None:
        """Add the counts of the rows that come next."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.changes += other.changes
        self.converted += other.converted
        for change, places in other.places.items():
            self._place(change, places)

    def _place(self, change: str, places: Sequence[tuple[int, int]]) -> None:
        known = self.places.setdefault(change, [])
        known += places[: SHOWN - len(known)]


@dataclass(frozen=True)
class SplitStats:
    """The statistics of one side of a split.

    Attributes:
        tally: Counts of its rows and tokens.
        sha256: Hashes of the rows that are used, by name: `rows`, `ids` and `labels`, as in `records.hashing`.
    """

    tally: RowCounts
    sha256: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as plain JSON data."""
        return {"tally": vars(self.tally), "sha256": dict(self.sha256)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SplitStats:
        """Return the statistics that `to_json` wrote."""
        counts = RowCounts(**data["tally"])
        counts.changes, counts.converted = Counter(counts.changes), Counter(counts.converted)
        # JSON has no tuples: a place comes back as a list.
        counts.places = {change: [(file, line) for file, line in found] for change, found in counts.places.items()}
        return cls(counts, data["sha256"])


def removed_counts(counts: RowCounts) -> dict[str, Any]:
    """Return the counts of dropped and cut rows and tokens, by the names of a manifest's `dataset`."""
    return {
        "rows_dropped": {reason: counts.changes[reason] for reason in DROPPED if counts.changes[reason]},
        "rows_truncated": counts.changes["cut"],
        "rows_without_loss": counts.changes["without-loss"],
        "tokens_removed": counts.tokens_removed,
        "supervised_tokens_removed": counts.supervised_tokens_removed,
    }


def masking_policy(stats: SplitStats, objectives: Collection[Objective]) -> str:
    """Return which tokens carry loss, in the words of a manifest's `masking`.

    Args:
        stats: The statistics of the rows.
        objectives: The objectives of their files.
    """
    if any(not objective.is_default for objective in objectives):
        return "by the declared objective"
    completions = " and completions" if stats.tally.completions else ""
    return f"assistant turns of weight 1{completions}, to EOS"


def token_stats(stats: SplitStats) -> dict[str, Any]:
    """Return hashes and numbers of the tokens that are used, by the names of a manifest's `masking`."""
    return {
        "ids_sha256": stats.sha256["ids"],
        "labels_sha256": stats.sha256["labels"],
        "tokens": stats.tally.tokens,
        "supervised_tokens": stats.tally.supervised_tokens,
    }


def retention_facts(stats: SplitStats) -> dict[str, Any]:
    """Return hashes and numbers of rows of other subjects, by the names of a manifest's `dataset.retention`."""
    tokens = token_stats(stats)
    return {
        "rows": stats.tally.used,
        "rows_sha256": stats.sha256["rows"],
        **{name: tokens[name] for name in ("ids_sha256", "labels_sha256", "supervised_tokens")},
        "removed": removed_counts(stats.tally),
    }


def held_out_hashes(stats: SplitStats) -> dict[str, str]:
    """Return the hashes of the held-out rows that are used, by the names of a manifest's `dataset`."""
    return {f"held_out_{name}_sha256": stats.sha256[name] for name in HASHED}


class StatsBuilder:
    """Builds the statistics of rows that come in order, singly or in parts."""

    def __init__(self) -> None:
        self.tally: RowCounts = RowCounts()
        self._digests = {name: hashlib.sha256() for name in HASHED}

    def update(self, parts: Mapping[str, bytes]) -> None:
        """Add the bytes of the next rows, as `hashed_parts` returns them."""
        for name, part in parts.items():
            self._digests[name].update(part)

    def build(self) -> SplitStats:
        """Return the statistics of the rows so far."""
        return SplitStats(self.tally, {name: digest.hexdigest() for name, digest in self._digests.items()})


def hashed_parts(row: Row, encoded: EncodedRow) -> dict[str, bytes]:
    """Return the bytes of a row that are hashed, by the names of `SplitStats.sha256`."""
    ids, labels = framed_ids(encoded.input_ids), framed_ids(encoded.labels or ())
    return {"rows": framed_row(row), "ids": ids, "labels": labels}


def stats_of(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> SplitStats:
    """Return the statistics of encoded rows that are all kept."""
    builder = StatsBuilder()
    for row, encoded_row in zip(rows, encoded, strict=True):
        builder.tally.add(encoded_row, PolicyResult(encoded_row))
        builder.update(hashed_parts(row, encoded_row))
    return builder.build()


PROBE = "probe-1"
"""Name of the set. A set of other conversations needs another name."""

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
    """Return the SHA-256 of the ids of a set's conversations; a conversation that the backend refuses has no ids."""
    parts = []
    for number, data in enumerate(PROBES[name]):
        row = parse_row(data, place=Place.of(name) / f"row {number}")
        parts.append(framed_row(row))
        try:
            parts.append(framed_ids(encode(row).input_ids))
        except MistralLoraError:
            parts.append(framed_ids(()))
    return sha256_parts(parts)


GATE = "evaluation.gate."
"""Beginning of the names of the lines of a gate, whose rows and tokens are counted again."""


@dataclass(frozen=True)
class _RecountedStats(SplitStats):
    """The statistics of rows that were read again.

    Attributes:
        conversations: Number of conversations among the rows with a loss.
    """

    conversations: int = 0


class _EncodingError(Exception):
    """The rows cannot be encoded again."""


def recount_rows(
    folder: AdapterFolder,
    train: Sequence[DataFile],
    eval_files: Sequence[DataFile] | None,
    retention: Sequence[DataFile] | None = (),
) -> Iterator[tuple[str, Any]]:
    """Yield the recorded values of the rows, by JSON path in the manifest, each recomputed: a value, or an error.

    Args:
        folder: A folder with a manifest, tokenizer and template.
        train: The training files in recipe order.
        eval_files: The files that were held out, in recipe order; None if they are missing.
        retention: The files of other subjects, in recipe order; None if they are missing.
    """
    data, has_tokens = folder.require_manifest().data, True
    try:
        stats = _split_stats(folder, _split_rows(data, train, (), held_out=False))
        held_out = None
        if eval_files is not None:
            held_out = _split_stats(folder, _split_rows(data, train, eval_files, held_out=True), of_gate=True)
        retained = None
        if retention:
            retained = _split_stats(folder, _split_rows(data, (), retention, held_out=True), of_gate=True)
    except _EncodingError as error:
        yield "masking.ids_sha256", error
        if "drop" in (data["dataset"].get("truncation"), data["dataset"].get("unsupervised")):
            return  # only tokens show which rows a policy dropped
        try:
            stats = _split_stats(folder, _split_rows(data, train, (), held_out=False), without_tokens=True)
        except MistralLoraError as unreadable:
            yield "dataset.rows_sha256", unreadable
            return
        has_tokens = False
    except MistralLoraError as error:
        yield "dataset.rows_sha256", error
        return
    yield "dataset.rows", stats.tally.rows
    yield "dataset.rows_used", stats.tally.used
    yield "dataset.rows_sha256", stats.sha256["rows"]
    if not has_tokens:
        return
    yield from ((f"dataset.{name}", found) for name, found in removed_counts(stats.tally).items())
    yield from ((f"masking.{name}", found) for name, found in token_stats(stats).items())
    if held_out is not None:
        yield "dataset.held_out_rows", held_out.tally.used
        yield from ((f"dataset.{name}", found) for name, found in held_out_hashes(held_out).items())
        removed = removed_counts(held_out.tally).items()
        yield from ((f"dataset.held_out_removed.{name}", found) for name, found in removed)
        yield f"{GATE}{HELD_OUT}", _measured(held_out)
    if retained is not None:
        facts = retention_facts(retained)
        changes = facts.pop("removed").items()
        yield from ((f"dataset.retention.{name}", found) for name, found in facts.items())
        yield from ((f"dataset.retention.removed.{name}", found) for name, found in changes)
        yield f"{GATE}{RETENTION}", _measured(retained)


def _measured(stats: _RecountedStats) -> dict[str, int]:
    """Return the numbers of rows, conversations and tokens whose loss a gate measures."""
    tally = stats.tally
    rows = tally.used - tally.changes["without-loss"]
    return {"rows": rows, "conversations": stats.conversations, "tokens": tally.supervised_tokens}


def _split_rows(
    data: Mapping[str, Any], train: Sequence[DataFile], eval_files: Sequence[DataFile], *, held_out: bool
) -> Iterator[Row]:
    """Yield the rows of the training files that are on one side of the split, then those of the held-out files."""
    # the split is by content, so the order of the files does not change it
    for file in train:
        yield from (row for row in read_rows(file) if is_held_out(row, data["dataset"]["held_out"]) is held_out)
    for file in eval_files:
        yield from read_rows(file)


def _split_stats(
    folder: AdapterFolder, rows: Iterable[Row], *, without_tokens: bool = False, of_gate: bool = False
) -> _RecountedStats:
    """Return the statistics of rows after the run's policy; without tokens, of all rows.

    The conversations of rows that no gate judges are not counted.

    Raises:
        MistralLoraError: If a file cannot be read.
        _EncodingError: If the folder's files do not make a backend, or it cannot encode a row.
    """
    data = folder.require_manifest().data
    chosen = {name: data["dataset"].get(name, "error") for name in ("truncation", "unsupervised")}
    builder, policy = StatsBuilder(), Policy(data["training"]["max_length"], **chosen)
    measured: list[Row] = []
    for row in rows:
        if without_tokens:  # without tokens no policy can run: the caller has checked that it dropped no row
            builder.tally.rows += 1
            builder.tally.used += 1
            builder.update({"rows": framed_row(row)})
            continue
        try:
            encoded = folder.recorded_encoder.encode(row)
        except (MistralLoraError, OSError, ValueError) as error:
            raise _EncodingError(str(error)) from error
        kept = policy.apply(encoded)
        builder.tally.add(encoded, kept)
        if kept.encoded is not None:
            builder.update(hashed_parts(row, kept.encoded))
            measured += [row] if of_gate and kept.encoded.supervised_tokens else []
    stats = builder.build()
    return _RecountedStats(stats.tally, stats.sha256, len({*conversation_numbers(measured)}))
