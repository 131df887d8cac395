"""Encode the rows of a run in one pass over its data files; the policy applies to each, and all are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy, PolicyResult
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile, bar, chunks, in_order, processes_for, total_bytes
from pytest_mistral_lora.chat.row_files import read_row
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowError, RowsError, and_more
from pytest_mistral_lora.formats.report import conversion_words
from pytest_mistral_lora.records.data_stats import HASHED, RowCounts, SplitStats, StatsBuilder, hashed_parts
from pytest_mistral_lora.records.files import is_held_out
from pytest_mistral_lora.training.rows.dataset import ColumnBuilder
from pytest_mistral_lora.training.rows.judgement import ChunkJudge, RowsJudge

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodingPlan:
    """The settings that decide how a row is encoded, in a form that crosses process boundaries.

    Attributes:
        tokenizer: The tokenizer file or checkpoint folder.
        backend: `mistral-common` or `chat-template`.
        policy: The policy for rows that cannot be trained on unchanged.
        held_out: Fraction of the training rows that is held out.
    """

    tokenizer: Path
    backend: str
    policy: Policy
    held_out: float

    @classmethod
    def of(cls, encoder: Encoder, policy: Policy, held_out: float = 0.0) -> EncodingPlan:
        """Return the settings of a loaded backend; by default, no row of a training file is held out."""
        # a worker loads the oracle's file, and need not recognise the folder again
        source = encoder.file if encoder.backend == "mistral-common" else encoder.tokenizer.path
        return cls(source, encoder.backend, policy, held_out)


@dataclass
class ChunkSide:
    """The rows of a chunk on one side of the split.

    Attributes:
        batch: The rows as an Arrow record batch, once the chunk has ended.
        tally: Their numbers.
        hashed: The bytes of each row that are hashed, by the names of `Figures.sha256`.
    """

    batch: Any = None
    tally: RowCounts = field(default_factory=RowCounts)
    hashed: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in HASHED})
    _columns: ColumnBuilder = field(default_factory=ColumnBuilder)

    def add(self, row: Row, encoded: EncodedRow, kept: PolicyResult, source: tuple[int, int, bytes]) -> None:
        """Add a row, with the index of its file, and the number and the bytes of its line."""
        file, number, line = source
        self.tally.add(encoded, kept, file, number)
        self.tally.converted.update(row.converted)
        if kept.encoded is None:
            return
        self._columns.add(kept.encoded, number, line)
        for name, part in hashed_parts(row, kept.encoded).items():
            self.hashed[name] += part

    def end(self, file: int) -> None:
        """Make the batch of the rows, all of one file, which is cheaper to send to another process than lists."""
        self.batch = self._columns.batch(file)
        self._columns = ColumnBuilder()


@dataclass
class EncodedChunk:
    """The result of a chunk.

    Attributes:
        file: The index of its file.
        rows: The number of its rows.
        train: The rows to train on.
        held_out: The rows that are held out.
        errors: The rows that were refused.
        judged: The part of the verdict; None if nobody judges the rows.
    """

    file: int
    rows: int = 0
    train: ChunkSide = field(default_factory=ChunkSide)
    held_out: ChunkSide = field(default_factory=ChunkSide)
    errors: list[RowError] = field(default_factory=list)
    judged: Any = None


class ChunkEncoder:
    """Encodes the rows of chunks by a plan."""

    def __init__(self, plan: EncodingPlan, encoder: Encoder | None = None, judge: ChunkJudge | None = None) -> None:
        """Load the tokenizer of the plan, or use what is given.

        Args:
            plan: The plan.
            encoder: Its backend, if it is loaded.
            judge: Encodes each row once, and judges it; None for rows that nobody judges.
        """
        self._plan, self._judge = plan, judge
        if judge is None:
            self._encoder = encoder or make_encoder(plan.backend, CheckpointTokenizer(plan.tokenizer))

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Encode the rows of a chunk."""
        result = EncodedChunk(chunk.file)
        lines = dict(chunk.lines)

        def take(number: int, row: Row | None, encoded: EncodedRow | RowError) -> None:
            self._take(result, chunk, (number, lines[number]), row, encoded)

        if self._judge is not None:
            result.judged = self._judge(chunk, take)
        else:
            for number, line in chunk.lines:
                row = read_row(chunk.path, number, line, chunk.objective, place=chunk.place(number))
                if isinstance(row, RowError):
                    take(number, None, row)
                elif row is not None:
                    take(number, row, self._encoded(row))
        result.train.end(chunk.file)
        result.held_out.end(chunk.file)
        return result

    def _encoded(self, row: Row) -> EncodedRow | RowError:
        try:
            return self._encoder.encode(row)
        except RowError as error:
            return error

    def _take(
        self,
        result: EncodedChunk,
        chunk: Chunk,
        line: tuple[int, bytes | int | RowError],
        row: Row | None,
        encoded: EncodedRow | RowError,
    ) -> None:
        """Add a row to the result of its chunk: one bad row does not end the pass, all are reported at once."""
        plan = self._plan
        result.rows += 1
        if row is None or isinstance(encoded, RowError):
            result.errors += [encoded] if isinstance(encoded, RowError) else []
            return
        for _, fault in plan.policy.faults(encoded, row):
            result.errors.append(fault)
            return
        held_out = chunk.is_held_out or (plan.held_out > 0 and is_held_out(row, plan.held_out))
        side = result.held_out if held_out else result.train
        number, text = line
        side.add(
            row, encoded, plan.policy.apply(encoded), (chunk.file, number, text if isinstance(text, bytes) else b"")
        )


def _judging(make: Callable[[], ChunkJudge], plan: EncodingPlan) -> ChunkEncoder:
    return ChunkEncoder(plan, judge=make())


class Sinks(NamedTuple):
    """The functions that get the Arrow batches of the rows to train on and of the held-out rows."""

    train: Callable[[Any], None]
    held_out: Callable[[Any], None]


class SplitFigures(NamedTuple):
    """The figures of both sides of the split, and for each data file the number of rows and its conversion."""

    train: SplitStats
    held_out: SplitStats
    rows: list[int]
    sources: list[Mapping[str, Any] | None]


def encode_files(
    plan: EncodingPlan,
    files: Sequence[DataFile],
    sinks: Sinks,
    *,
    encoder: Encoder | None = None,
    judge: RowsJudge | None = None,
    first: int = 0,
    processes: int | None = None,
    progress: TextIO | None = None,
) -> SplitFigures:
    """Encode every row of some files, in file order whatever the number of processes.

    Args:
        plan: The settings.
        files: The files, in order.
        sinks: Get the Arrow batches.
        encoder: The plan's backend, if it is loaded.
        judge: Judges the rows in the same pass; None if nobody does.
        first: The index of the first file among those that are judged.
        processes: Number of processes that encode; by default one for little work, else one for each CPU.
        progress: A terminal for a progress bar, drawn if the pass takes long; None for no bar.

    Raises:
        RowsError: If any row or file cannot be used; all are named.
        MistralLoraError: If a process that encodes rows dies.
    """
    if processes is None:
        processes = processes_for(files)
    errors: list[RowError] = []
    refused: list[InputError] = []
    rows = [0] * len(files)
    train, held_out = StatsBuilder(), StatsBuilder()

    prepare: Callable[[EncodingPlan], ChunkEncoder]
    if judge is not None:
        prepare = partial(_judging, judge.in_chunks(first, processes))
    else:
        # a class crosses process boundaries; the loaded encoder does not need to
        prepare = ChunkEncoder if processes > 1 else lambda plan: ChunkEncoder(plan, encoder)

    def refuse(file: int, error: InputError) -> None:
        refused.append(error)
        if judge is not None:
            judge.refuse(first + file, error)

    read = (chunks([file], partial(refuse, index), index) for index, file in enumerate(files))
    title = "Encoding rows" if judge is None else "Encoding and judging rows"
    with bar(progress, total_bytes(files), title) as advance:
        for chunk, bytes_read in in_order(prepare, plan, chain.from_iterable(read), processes):
            if judge is not None:
                judge.take(chunk.judged)
            errors += chunk.errors
            rows[chunk.file] += chunk.rows
            for side, sums, sink in ((chunk.train, train, sinks.train), (chunk.held_out, held_out, sinks.held_out)):
                # chunks come in file order, so that several processes write the same bytes as one
                sink(side.batch)
                sums.tally.extend(side.tally)
                sums.update({name: bytes(part) for name, part in side.hashed.items()})
            advance(bytes_read)
    errors += [RowError(error.found, place=error.place, expected=error.expected) for error in refused]
    if errors:
        raise RowsError(errors, place=", ".join(str(file.path) for file in files))
    return SplitFigures(
        train.build(), held_out.build(), rows, [file.source.facts() if file.source else None for file in files]
    )


@dataclass(frozen=True)
class ReadFile:
    """A data file after reading.

    Attributes:
        path: Its path.
        is_held_out: Whether its rows are held out as a whole.
        sha256: Hash of its bytes.
        rows: Number of its rows, used or not.
        source: The facts of its conversion, `source` in a manifest; None for a JSONL file of rows.
        objective: The declared objective of its rows.
    """

    path: Path
    is_held_out: bool
    sha256: str
    rows: int
    source: Mapping[str, Any] | None = None
    objective: Objective = ANSWERS


_CHANGE_TEXTS = {
    "too-long": "dropped, longer than training.max_length",
    "nothing-supervised": "dropped, no token is trained on",
    "cut": "cut on the right to training.max_length",
    "without-loss": "kept, though no token is trained on",
}


def warn_of_changes(side: str, tally: RowCounts, paths: Sequence[Path]) -> None:
    """Log how many rows were converted, and how many dropped and cut, with the first places; nothing if none was.

    Args:
        side: Name of the rows.
        tally: Their numbers.
        paths: The data files.
    """
    if words := conversion_words(tally.converted):
        _log.warning("%s: converted as by import: %s", side, words)
    if not tally.changes:
        return
    lines = [f"{side}: {tally.used} of {tally.rows} rows are used"]
    for change, text in _CHANGE_TEXTS.items():
        if number := tally.changes[change]:
            places = [f"{paths[file]}:{line}" for file, line in tally.places[change]]
            more = and_more(len(places), number)
            lines.append(f"  {number} {text}: {', '.join(places)}{more}")
    removed = f"{tally.tokens_removed} tokens, {tally.supervised_tokens_removed} of them with loss"
    _log.warning("\n".join([*lines, f"  removed: {removed}"]))


def warn_of_losses(file: ReadFile) -> None:
    """Log what the conversion of a file left out, as the recipe allows; log nothing if it left nothing out."""
    source = file.source or {}
    lost = [f"{kind} in {number} records" for kind, number in source.get("losses", {}).items()]
    lost += [f"{source['left_out']} records as a whole"] if source.get("left_out") else []
    if lost:
        _log.warning("%s: left out as its `lossy` allows: %s", file.path, ", ".join(lost))
