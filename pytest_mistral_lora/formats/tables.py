"""Read Parquet and Arrow in a process of their own, under limits of the operating system.

A damaged or a hostile table makes pyarrow read beyond its memory, or take all of it, and no argument of pyarrow bounds
either. The process checks each batch, measures its rows, and passes them on as plain objects, a piece at a time.
"""

from __future__ import annotations

import atexit
import datetime
import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.container import ARROW_FILE, PARQUET
from pytest_mistral_lora.chat.reading import in_utf8, limited, limits
from pytest_mistral_lora.chat.reading.limited import LimitedProcess
from pytest_mistral_lora.chat.remedies import AGAIN
from pytest_mistral_lora.errors import InputError, and_more, one_line
from pytest_mistral_lora.places import Place

_SECONDS = 600.0
_WINDOW = 4096
_BUFFER = 1 << 20
# a reserve of address space, such as other allocators take, counts as memory
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
_PLAIN = {
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    ("decimal", "Decimal"),
    ("uuid", "UUID"),
    ("builtins", "str"),
}


class Piece(NamedTuple):
    """Rows of a table that were read at once.

    Attributes:
        first: Number of the first, from 1.
        values: The rows as plain data; its size in place of a row larger than `limits.MAX_ROW_BYTES`.
        read: The share of the file's bytes for these rows.
    """

    first: int
    values: Sequence[dict[str, Any] | int]
    read: int


class _ShortOfMemoryError(Exception):
    """The process needs more memory than its limit."""


def pieces(path: Path, name: str) -> Iterator[Piece]:
    """Yield the rows of a table, in order.

    Args:
        path: The file.
        name: Its container: `PARQUET`, `ARROW_FILE` or `ARROW_STREAM`.

    Raises:
        InputError: If the file is not such a table, is damaged, or is too large.
    """
    expansion = limits.Expansion(path)
    done = 0
    for rows in (limits.PIECE_ROWS, 1):
        try:
            for piece in _pieces(path, name, rows, done, expansion):
                done += len(piece.values)
                yield piece
            return
        except _ShortOfMemoryError:
            # the reader of Parquet holds the texts of all rows of a batch in memory: read one row at a time
            if rows == 1 or name != PARQUET:
                found = f"the rows after row {done} take more memory to read than {limits.READ_MEMORY:,} bytes"
                expected = "smaller pages and batches of rows"
                raise InputError(found, place=str(path), expected=expected) from None


def _pieces(path: Path, name: str, rows: int, skipped: int, expansion: limits.Expansion) -> Iterator[Piece]:
    process = _taken()
    done = skipped
    try:
        question = {
            "path": str(path.absolute()),
            "name": name,
            "rows": rows,
            "skipped": skipped,
            "row_bytes": limits.MAX_ROW_BYTES,
        }
        while True:
            found, data = _answer(process, question, path, name, done)
            if found.get("end"):
                break
            values = _Plain(io.BytesIO(data)).load()
            yield Piece(done + 1, values, found["read"])
            # a row that is too large yields no bytes
            expansion.count(min(found["bytes"], limits.MAX_ROW_BYTES))
            done += len(values)
            question = {}
    except GeneratorExit:
        # the caller needs no more rows, for example to recognise a format by the first
        if process.answer({"stop": True}, _SECONDS) is None:
            process.end()
            raise
    except BaseException:
        # an unread answer would be read as the answer to the next question
        process.end()
        raise
    _idle.setdefault(os.getpid(), []).append(process)


def _answer(
    process: LimitedProcess, question: Mapping[str, Any], path: Path, name: str, done: int
) -> tuple[dict[str, Any], bytes]:
    found = process.answer(question, _SECONDS)
    data = None if found is None else process.read(found.get("size", 0))
    if found is None or data is None:
        overrun = process.overrun(limits.READ_CPU_SECONDS, _SECONDS)
        said = f"take more than {overrun} to read" if overrun else f"take down their reader ({process.ending})"
        raise InputError(
            f"cannot be read as {name}: the rows after row {done} {said}", place=str(path), next_step=AGAIN
        )
    if found.get("kind") == "memory":
        raise _ShortOfMemoryError
    if found.get("kind") == "table":
        raise InputError(f"cannot be read as {name}: {found['found']}", place=str(path), next_step=AGAIN)
    if found.get("kind") == "row":
        raise InputError(f"a row after row {done} cannot be read: {found['found']}", place=str(path))
    if found.get("kind") == "columns":
        raise InputError(found["found"], place=str(path))
    return found, data


class _Plain(pickle.Unpickler):
    """Unpickles only objects of the standard library's types for values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_idle: dict[int, list[LimitedProcess]] = {}


def _taken() -> LimitedProcess:
    """Return an idle process; the caller keeps it for the next table after reading to the end."""
    waiting = _idle.get(os.getpid(), [])
    while waiting:
        with suppress(IndexError):  # another thread may have taken the process
            process = waiting.pop()
            if process.is_running:
                return process
            process.end()
    return LimitedProcess(
        "pytest_mistral_lora.formats.tables",
        "serve",
        (limits.READ_CPU_SECONDS, limits.READ_MEMORY),
        title="reads tables",
        check="import pyarrow.parquet",
        environment=_ENVIRONMENT,
    )


@atexit.register
def _end_idle() -> None:
    for process in _idle.pop(os.getpid(), []):
        process.end()


class _ToPlain(pickle.Pickler):
    """Restricts values to the types that `_Plain` makes."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type):
            return NotImplemented
        # pyarrow turns nanoseconds into objects of pandas
        for name in ("to_pydatetime", "to_pytimedelta"):
            value = getattr(value, name)() if hasattr(value, name) else value
        if isinstance(value, datetime.datetime) and value.tzinfo is not None:
            value = value.astimezone(datetime.UTC)
        kind = type(value)
        if (kind.__module__, kind.__name__) in _PLAIN:
            return value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return str, (str(value),)


def _pickled(values: Sequence[Any], **said: int) -> tuple[dict[str, Any], bytes]:
    file = io.BytesIO()
    _ToPlain(file, pickle.HIGHEST_PROTOCOL).dump(values)
    return {**said, "size": file.tell()}, file.getvalue()


def refuse_two_columns(names: Sequence[str], place: Place) -> None:
    """Refuse a table with two columns of one name: one of them would be lost."""
    if len(set(names)) == len(names):
        return
    twice = [name for name, count in Counter(names).items() if count > 1]
    shown = ", ".join(one_line(name, 60) for name in twice[:8])
    raise InputError(f"two columns have one name: {shown}{and_more(8, len(twice))}", place=place)


def serve(cpu_seconds: float, memory: int) -> None:
    """Serve the rows of tables, in a process that may fail.

    Args:
        cpu_seconds: CPU time of one piece.
        memory: Bytes that may be added to those of the libraries.
    """
    none: Iterator[tuple[dict[str, Any], bytes]] = iter(())
    reading = [none]

    def answer(question: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        import pyarrow as pa

        try:
            if question:
                reading[0] = none if "stop" in question else _read(memory=memory, **question)
            return next(reading[0], ({"end": True}, b""))
        except MemoryError:  # Arrow's errors, too
            raise
        except InputError as error:
            return {"kind": "columns", "found": error.found}, b""
        except (pa.ArrowException, OSError) as error:
            return {"kind": "table", "found": one_line(error)}, b""
        except (ValueError, OverflowError, NotImplementedError, RecursionError) as error:
            # values without an equivalent in Python: a year beyond 9999, an object with two fields of one name
            return {"kind": "row", "found": one_line(error)}, b""

    limited.serve(_prepare, answer, cpu_seconds=cpu_seconds, memory=memory)


def _prepare() -> None:
    import pyarrow as pa
    import pyarrow.parquet

    # threads take address space, and do not make a single batch faster
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def _read(
    path: str, name: str, rows: int, skipped: int, row_bytes: int, memory: int
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield pieces of a table: the facts of some rows, and their pickle."""
    number = 0
    for batch, read in _batches(path, name, rows, memory):
        refuse_two_columns(batch.schema.names, Place.of(path))
        names = sum(map(_name_bytes, batch.schema))
        if names > limits.MAX_NAME_BYTES:
            found = f"the names of columns have {names:,} bytes"
            raise InputError(f"{found}; expected {limits.at_most(limits.MAX_NAME_BYTES)}")
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _WINDOW):
            window = batch.slice(start, _WINDOW)
            if number + window.num_rows <= skipped:
                number += window.num_rows
                continue
            for at, size, weight in _cuts(window, rows, row_bytes):
                number += size
                if number <= skipped:
                    continue
                values = [weight] if weight > row_bytes else window.slice(at, size).to_pylist()
                part = read * size // batch.num_rows
                yield _pickled(values, bytes=weight, read=part)


def _name_bytes(field: Any) -> int:
    from pyarrow import types

    kind, inner = field.type, []
    if types.is_struct(kind):
        inner = [kind.field(index) for index in range(kind.num_fields)]
    elif types.is_map(kind):
        inner = [kind.key_field, kind.item_field]
    elif hasattr(kind, "value_field"):
        inner = [kind.value_field]
    return len(field.name) + sum(map(_name_bytes, inner))


def _batches(path: str, name: str, rows: int, memory: int) -> Iterator[tuple[Any, int]]:
    """Yield the batches of a table, each with its share of the file's bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    size = Path(path).stat().st_size
    # a mapped file counts as memory, but takes none; the table before may have had another limit
    limited.limit_memory(memory if name == PARQUET else memory + size)
    if name == PARQUET:
        with in_utf8(Path(path)) as named, parquet.ParquetFile(named, buffer_size=_BUFFER, pre_buffer=False) as table:
            total = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(rows, use_threads=False):
                yield batch, size * batch.num_rows // total
        return
    with in_utf8(Path(path)) as named, pa.memory_map(str(named)) as mapped:
        if name == ARROW_FILE:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(mapped))
        for batch in batches:
            yield batch, batch.nbytes


def _cuts(window: Any, rows: int, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, number of rows and bytes of pieces of at most `row_bytes`; a larger row is its own piece."""
    import numpy as np

    weights = np.broadcast_to(_row_weights(window), window.num_rows)
    totals = np.concatenate(([0], np.cumsum(weights, dtype=np.float64)))
    at = 0
    while at < window.num_rows:
        # the first end with too many bytes
        end = int(np.searchsorted(totals, totals[at] + row_bytes, side="right")) - 1
        size = min(max(end - at, 1), rows)
        yield at, size, int(totals[at + size] - totals[at])
        at += size


def _row_weights(window: Any) -> Any:
    named = zip(window.schema.names, window.columns, strict=True)
    return sum((len(name) + _weights(column) for name, column in named), limits.VALUE_BYTES)


def _weights(array: Any) -> Any:
    """Return the bytes of each value of an array, or one number if all are the same.

    One number, because an array may have any number of nulls; floats, because a product of sizes cannot overflow them.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import types

    kind, least = array.type, limits.VALUE_BYTES
    if isinstance(array, pa.ExtensionArray):
        return _weights(array.storage)
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        width = np.int64 if types.is_large_string(kind) or types.is_large_binary(kind) else np.int32
        offsets = np.frombuffer(array.buffers()[1] or b"", width)[array.offset : array.offset + len(array) + 1]
        return np.diff(offsets).astype(np.float64) + least if len(array) else least
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return views[array.offset : array.offset + len(array), 0].astype(np.float64) + least
    if types.is_dictionary(kind):
        return _taken_weights(_weights(array.dictionary), array.indices)
    if types.is_struct(kind):
        fields = range(kind.num_fields)
        return sum((len(kind.field(index).name) + _weights(array.field(index)) for index in fields), least)
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        inner = _weights(array.values.slice(array.offset * size, len(array) * size))
        return least + (inner.reshape(len(array), size).sum(axis=1) if isinstance(inner, np.ndarray) else size * inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = array.offsets.to_numpy()
        return _list_weights(array, offsets[:-1], offsets[1:])
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        offsets = array.offsets.to_numpy()
        return _list_weights(array, offsets, offsets + array.sizes.to_numpy())
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        raise InputError(f"a column holds {one_line(kind, 80)}, which is not read")
    # null, which takes no memory, and the types of fixed width
    return least if types.is_null(kind) else max(least, kind.bit_width // 8)


def _taken_weights(weights: Any, indices: Any) -> Any:
    """Return the weights of values that are indices of others; nulls have the least weight."""
    import numpy as np

    if not isinstance(weights, np.ndarray):
        return weights
    found = indices.fill_null(0).to_numpy()
    return weights[found] if len(weights) else limits.VALUE_BYTES


def _list_weights(array: Any, starts: Any, ends: Any) -> Any:
    import numpy as np

    least = limits.VALUE_BYTES
    if not len(array):
        return least
    first = int(starts.min())
    inner = _weights(array.values.slice(first, int(ends.max()) - first))
    if not isinstance(inner, np.ndarray):
        return least + (ends - starts) * float(inner)
    totals = np.concatenate(([0.0], np.cumsum(inner)))
    return least + totals[ends - first] - totals[starts - first]
