"""Work on chunks of rows in several processes; results come in the order of the chunks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from pytest_mistral_lora.chat.chunks import MANY_BYTES, Chunk
from pytest_mistral_lora.errors import MistralLoraError

Plan = TypeVar("Plan")
Result = TypeVar("Result")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    prepare: Callable[[Plan], Callable[[Chunk], Result]], plan: Plan, chunks: Iterable[Chunk], processes: int
) -> Iterator[tuple[Result, int]]:
    """Yield what comes of each chunk, in order, with the number of bytes that were read for it.

    Args:
        prepare: Makes the work of a plan, once in each process; with several processes, plan and `prepare` must be
            picklable.
        plan: What the work has to know.
        chunks: The chunks; only a few are in flight, so memory does not grow with their number.
        processes: How many processes work; one is this one.

    Raises:
        MistralLoraError: If a process dies.
    """
    if processes <= 1:
        work = prepare(plan)
        for chunk in chunks:
            yield work(chunk), chunk.size
        return
    try:
        yield from _in_pool(prepare, plan, chunks, processes)
    except BrokenProcessPool as error:
        raise MistralLoraError(
            "a process that reads rows ended early: out of memory, killed, or started from a script without a guard",
            next_step='Start the work below `if __name__ == "__main__":`, or give processes=1.',
        ) from error


def _in_pool(
    prepare: Callable[[Plan], Callable[[Chunk], Result]], plan: Plan, chunks: Iterable[Chunk], processes: int
) -> Iterator[tuple[Result, int]]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (prepare, plan))
    waiting: deque[tuple[Future[Result], int]] = deque()
    try:
        for chunk in chunks:
            waiting.append((pool.submit(_do, chunk), chunk.size))
            if len(waiting) > 2 * processes:
                future, read = waiting.popleft()
                yield future.result(), read
        while waiting:
            future, read = waiting.popleft()
            yield future.result(), read
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Chunk], Any] | None = None


def _start(prepare: Callable[[Any], Callable[[Chunk], Any]], plan: Any) -> None:
    """Prepare a process of the pool."""
    import signal
    import threading
    import warnings

    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    _work = prepare(plan)


def _end_with_parent() -> None:
    """End this process when the parent is killed: the pool itself would wait for work for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(chunk: Chunk) -> Any:
    if _work is None:
        raise RuntimeError("the process was not prepared")
    return _work(chunk)


@contextmanager
def bar(stream: TextIO | None, size: int, title: str) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar in bytes on a terminal, for a pass that takes long; nothing elsewhere."""
    if stream is None or size < MANY_BYTES or not stream.isatty():
        yield lambda read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as shown:
        task = shown.add_task("", total=size)
        yield lambda read: shown.advance(task, read)
