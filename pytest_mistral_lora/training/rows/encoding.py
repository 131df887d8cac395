"""The one pass over a run's data files: each row encoded, kept as the policy says, and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy, PolicyResult
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile, bar, chunks, cpus, in_order, is_long, total_bytes
from pytest_mistral_lora.chat.rows import Row, read_row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowError, RowsError
from pytest_mistral_lora.records.data_stats import HASHED, Figures, Sums, Tally, hashed
from pytest_mistral_lora.records.hashing import is_held_out
from pytest_mistral_lora.training.rows.table import Columns


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be known to encode a row, in a form that crosses process boundaries.

    Attributes:
        tokenizer: The tokenizer file or checkpoint folder.
        backend: `mistral-common` or `chat-template`.
        policy: What is done with a row that cannot be trained on as it is.
        held_out: Fraction of the training rows that is held out.
    """

    tokenizer: Path
    backend: str
    policy: Policy
    held_out: float


@dataclass
class Part:
    """What a chunk adds to one side of a split: an Arrow batch, figures, and what is hashed of its rows."""

    batch: Any
    tally: Tally
    hashed: dict[str, bytes]


@dataclass
class EncodedChunk:
    """What becomes of a chunk: its file and number of rows, both sides of the split, and the rows that are refused."""

    file: int
    rows: int
    sides: tuple[Part, Part]
    errors: list[RowError]


class ChunkEncoder:
    """Encodes chunks, as a plan says."""

    def __init__(self, plan: Plan, encoder: Encoder | None = None) -> None:
        """Load the tokenizer of the plan, or use the one given."""
        self._plan = plan
        self._encoder = encoder or Encoder(plan.backend, CheckpointTokenizer(plan.tokenizer))

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Encode the rows of a chunk."""
        sides = (_Side(), _Side())
        errors: list[RowError] = []
        rows = 0
        for number, line in chunk.lines:
            item = read_row(chunk.path, number, line)
            if item is None:
                continue
            rows += 1
            try:
                if isinstance(item, RowError):
                    raise item
                encoded = self._encode(item)
            except RowError as error:
                errors.append(error)
                continue
            held = chunk.is_held_out or (self._plan.held_out > 0 and is_held_out(item, self._plan.held_out))
            kept = self._plan.policy.apply(encoded)
            sides[held].add(item, encoded, kept, (chunk.file, number, line or b""))
        return EncodedChunk(chunk.file, rows, (sides[0].part(chunk.file), sides[1].part(chunk.file)), errors)

    def _encode(self, row: Row) -> EncodedRow:
        encoded = self._encoder.encode(row)
        for _, fault in self._plan.policy.faults(encoded, row):
            raise fault
        return encoded


class _Side:
    """The rows of a chunk on one side of the split."""

    def __init__(self) -> None:
        self._columns = Columns()
        self._tally = Tally()
        self._hashed = {name: bytearray() for name in HASHED}

    def add(self, row: Row, encoded: EncodedRow, kept: PolicyResult, source: tuple[int, int, bytes]) -> None:
        file, number, line = source
        self._tally.add(encoded, kept, file, number)
        if kept.encoded is None:
            return
        self._columns.add(kept.encoded, number, line)
        for name, part in hashed(row, kept.encoded).items():
            self._hashed[name] += part

    def part(self, file: int) -> Part:
        return Part(self._columns.batch(file), self._tally, {name: bytes(one) for name, one in self._hashed.items()})


Encoded = tuple[tuple[Figures, Figures], list[int]]
"""The figures of both sides, and the number of rows of each file."""


def encode_files(
    plan: Plan,
    files: Sequence[DataFile],
    sinks: tuple[Callable[[Any], None], Callable[[Any], None]],
    *,
    encoder: Encoder | None = None,
    processes: int | None = None,
    progress: TextIO | None = None,
) -> Encoded:
    """Encode every row of some files, in file order whatever the number of processes.

    Args:
        plan: How.
        files: The files, in order.
        sinks: Get the Arrow batches of the rows to train on, and of those that are held out.
        encoder: The plan's backend, where it is loaded already.
        processes: How many processes encode; None for one where there is little to do, else one for each CPU.
        progress: Where a progress bar is drawn if it is a terminal and the pass takes long; None for nowhere.

    Returns:
        The figures of both sides, and the number of rows of each file.

    Raises:
        RowsError: Naming every row and every file that cannot be used.
        MistralLoraError: If a process that encodes rows dies.
    """
    if processes is None:
        processes = cpus() if is_long(files) else 1
    errors: list[RowError] = []
    refused: list[RowError] = []
    rows = [0] * len(files)
    sums = (Sums(), Sums())

    def refuse(error: InputError) -> None:
        refused.append(RowError(error.found, place=error.place, expected=error.expected))

    prepare = ChunkEncoder if processes > 1 else lambda plan: ChunkEncoder(plan, encoder)
    with bar(progress, total_bytes(files), "Encoding rows") as advance:
        for done, read in in_order(prepare, plan, chunks(files, refuse), processes):
            errors += done.errors
            rows[done.file] += done.rows
            for part, side, sink in zip(done.sides, sums, sinks, strict=True):
                sink(part.batch)
                side.tally.extend(part.tally)
                side.update(part.hashed)
            advance(read)
    if errors or refused:
        raise RowsError([*errors, *refused], place=", ".join(str(file.path) for file in files))
    return (sums[0].figures(), sums[1].figures()), rows
