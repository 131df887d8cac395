"""The one pass over a dataset: streamed, in several processes where it pays, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from pytest_mistral_lora.chat.chunks import Chunk, DataFile, chunks, is_long, total_bytes
from pytest_mistral_lora.chat.pool import bar, cpus, in_order
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.rows import Judge, Plan
from pytest_mistral_lora.conformance.dataset.tally import Tally
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import InputError


def scan(
    plan: Plan,
    files: Sequence[DataFile],
    *,
    tokenizer: CheckpointTokenizer | None = None,
    processes: int | None = None,
    progress: TextIO | None = None,
) -> Tally:
    """Read every row of some files once and return what there is to know of them.

    Args:
        plan: How the rows are judged.
        files: The files, in order.
        tokenizer: The plan's tokenizer, where it is loaded already.
        processes: How many processes judge rows; None for one where there is little to do, else one for each CPU.
        progress: Where a progress bar is drawn if it is a terminal and the pass takes long; None for nowhere.

    Raises:
        MistralLoraError: If a process that judges rows dies.
    """
    if processes is None:
        processes = cpus() if is_long(files) else 1
    tally = Tally()

    def note(error: InputError) -> None:
        tally.findings.add(Finding("ML602", error.found, error.place, error.expected))

    prepare = _judge if processes > 1 else lambda plan: Judge(plan, tokenizer).chunk
    with bar(progress, total_bytes(files), "Judging rows") as advance:
        for part, read in in_order(prepare, plan, chunks(files, note), processes):
            tally.extend(part)
            advance(read)
    return tally


def _judge(plan: Plan) -> Callable[[Chunk], Tally]:
    return Judge(plan).chunk
