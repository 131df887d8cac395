"""The errors of this project, and the exit code of each.

An error has a place, the offending value, the expected value, and the next step for its reader.
"""

from __future__ import annotations

import errno
import json
import re
import reprlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pytest_mistral_lora.escaping import in_block, printable
from pytest_mistral_lora.places import NOWHERE, Place

_PACKAGE = Path(__file__).parent

EXIT_OK = 0
EXIT_FINDING = 1
EXIT_BAD_INPUT = 2
EXIT_OUT_OF_MEMORY = 3
# a shell reports 128 + the number of the signal that ended a process: SIGINT is 2, SIGTERM is 15
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return ` (did you mean 'NAME'?)` for the name most similar to a word, or the empty string.

    Args:
        word: A word that is not among the names.
        names: The right names.
    """
    by_lower = {name.lower(): name for name in names if name != word}  # a dangling link has the word itself
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


class MistralLoraError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        found: The fault, with the offending value.
        place: File, line and field: ``data/train.jsonl:17, messages[2].role``; a text is the name of a source as a
            whole. Empty if there is no place.
        expected: A right value. Empty if ``found`` makes it clear.
        next_step: A command or a change that helps the reader, as a sentence.

    Attributes:
        exit_code: The exit code of a command that this error ends.
        several_lines: Whether `found` may have line ends, for our own layout; else they are spelled out.
        several_steps: The same for `next_step`.
    """

    exit_code: int = EXIT_FINDING
    several_lines: bool = True
    several_steps: bool = False

    def __init__(self, found: str, *, place: Place | str = NOWHERE, expected: str = "", next_step: str = "") -> None:
        # each may quote a file, and reaches terminals and reports in UTF-8, which cannot hold half of a surrogate pair
        self.found: str = in_block(found) if self.several_lines else printable(found, lines=False)
        self.place: Place = Place.of(place)
        self.expected: str = printable(expected, lines=False)
        self.next_step: str = printable(next_step, lines=self.several_steps)
        text = f"{self.place}: {self.found}" if place else self.found
        text += f"; expected {self.expected}" if expected else ""
        if next_step:
            text = f"{text.rstrip('.')}. {self.next_step}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields if the error crosses a process boundary.

        By default, Python calls the class with `args`, and so loses every keyword.
        """
        return type(self).__new__, (type(self), str(self)), self.__dict__.copy()


class InputError(MistralLoraError):
    """Bad usage or bad input: a file, a setting or a value that cannot be used (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class NoAnswerError(InputError):
    """A request to a server that no answer came to: it is busy, too slow, or is not reached any more."""


class RowError(InputError):
    """One chat row that cannot be used."""

    # it quotes the row, and is a line of a list: none of its lines may look like another item
    several_lines = False


class OracleRejection(RowError):
    """A row of the right shape that mistral-common's validation refuses."""


class UncheckedRowError(OracleRejection):
    """A row that is not judged here, and may be sound: something in it becomes tokens that are not known.

    Args:
        found: What it is.
        reason: The same without values of the row, in a word or two, by which rows are counted; `found` if it has none.
        fields: The other fields of a `MistralLoraError`.

    Attributes:
        reason: As above.
    """

    def __init__(self, found: str, *, reason: str = "", **fields: Any) -> None:
        self.reason: str = reason or found
        super().__init__(found, **fields)


class RowsError(InputError):
    """Every bad row of one file.

    Attributes:
        errors: One `RowError` for each bad row, in file order.
    """

    # The message of a file with a million bad rows must stay readable; `errors` has all of them
    shown = 20

    def __init__(self, errors: Sequence[RowError], *, place: Place | str) -> None:
        self.errors: tuple[RowError, ...] = tuple(errors)
        lines = [counted(len(errors), "bad row")]
        # a file of another format has the same fault in each row
        faults = {(error.found, error.next_step) for error in errors}
        same = len(errors) > 2 and len(faults) == 1 and bool(errors[0].next_step)
        shown = 1 if same else self.shown
        lines += [f"  {error}" for error in errors[:shown]]
        if len(errors) > shown:
            lines.append(f"  … and {len(errors) - shown} more" + (" like it" if same else ""))
        super().__init__("\n".join(lines), place=place)


class TokenizerError(InputError):
    """A tokenizer file or folder that cannot be loaded, or whose content contradicts its name or configuration."""


class NoOracleError(TokenizerError):
    """A checkpoint without a Mistral tokenizer file: checks against mistral-common cannot run."""


class LibraryError(InputError):
    """A library version that lacks an interface that this package uses."""


class EntryPointError(InputError):
    """An object of another package that does not load: checks that need it cannot run."""


class NoTemplateError(TokenizerError):
    """A checkpoint without a chat template: checks of the template cannot run."""


class RenderError(MistralLoraError):
    """A template that cannot be rendered for a row, or must not be.

    Attributes:
        kind: `overrun`: it passed a bound; `forbidden`: Jinja's sandbox refused an access; `recursion`: it calls itself
            too deeply; `unsteady`: each rendering differs;
            `surrogate`: its text is not Unicode; `error`: any other error that it raises.
    """

    def __init__(self, found: str, *, kind: str = "error", **fields: Any) -> None:
        super().__init__(found, **fields)
        self.kind = kind


class PinError(InputError):
    """A base model whose exact revision is not given, not present or not allowed."""


class RunnerError(InputError):
    """Another trainer that is missing, does not finish in time, or refuses its configuration."""


class RecipeError(InputError):
    """A recipe that cannot be run as written."""


class MachineError(RecipeError):
    """A recipe that this machine cannot run, but another can: a device or a library is missing."""


class TrainingError(MistralLoraError):
    """A training run that must stop, for example because no row has a loss or a layer does not change."""


class MemoryShortageError(MistralLoraError):
    """A training step that does not fit into the memory of the device (exit code 3)."""

    exit_code = EXIT_OUT_OF_MEMORY
    several_steps = True


class FindingsError(MistralLoraError):
    """A verdict that is not ok: a finding is an error, nothing was judged, or a known deviation is out of date.

    Args:
        found: The verdict as text.
        verdict: The `Verdict`.
        fields: The other fields of a `MistralLoraError`.

    Attributes:
        verdict: The `Verdict`. Its type is not named here, because this module imports nothing.
    """

    def __init__(self, found: str, *, verdict: Any = None, **fields: Any) -> None:
        self.verdict: Any = verdict
        super().__init__(found, **fields)


class GuardError(FindingsError):
    """A run that its guard stopped before a weight moved, because of the batches, the model or the tokenizer."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is NaN, infinite, or larger than the recipe allows.

    Attributes:
        rows: Indices, among the training rows, of the rows whose own loss is not finite; of all rows of the step if
            no single row is the cause. May be empty if the error is raised below the level of rows.
        places: The places of the same rows.
    """

    def __init__(self, found: str, *, rows: Sequence[int] = (), places: Sequence[Place] = (), **fields: Any) -> None:
        self.rows: tuple[int, ...] = tuple(rows)
        self.places: tuple[Place, ...] = tuple(places)
        super().__init__(found, **fields)


class MergeError(MistralLoraError):
    """A merged model that answers differently from base and adapter; its folder is removed."""


class DiskError(TrainingError):
    """A file of a run or a merge that cannot be written: the disk is full, or refuses it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM while no training step is running (exit code 143).

    Like Ctrl-C, it passes every `except Exception`.
    """


class StoppedError(MistralLoraError):
    """A run that a signal stopped after an optimizer step, with a checkpoint.

    Args:
        found: The reason, with the step.
        signal: The signal's number.
        fields: The other fields of a `MistralLoraError`.

    Attributes:
        exit_code: 128 + the signal's number: 130 for SIGINT (Ctrl-C), 143 for SIGTERM.
    """

    def __init__(self, found: str, *, signal: int = EXIT_INTERRUPTED - 128, **fields: Any) -> None:
        self.exit_code: int = 128 + signal
        super().__init__(found, **fields)


_PATH_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""System errors on a path that the user can fix: the path is missing, of another kind, or not permitted."""


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error of any type that ends a command; 1 for a fault of this program."""
    if isinstance(error, MistralLoraError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return EXIT_OUT_OF_MEMORY
    return EXIT_BAD_INPUT if isinstance(error, OSError) and error.errno in _PATH_ERRORS else EXIT_FINDING


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """Return the signal that an error comes from; None if it has another cause.

    A signal that arrives while a library writes a file can end in an error of that library.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host ran out of memory."""
    # Types by name: torch is not imported for this. For a device it raises torch.OutOfMemoryError; for the host its
    # allocator raises a bare RuntimeError with this text (c10/core/impl/alloc_cpu.cpp).
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate memory" in str(error)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""System errors on a write, whatever is written: the disk is full, is read-only, or takes no file of this size."""


def _no_temporary_folder(error: OSError) -> bool:
    # Python's own search for a folder for temporary files has the error of a missing file
    return error.errno == errno.ENOENT and not error.filename and "temporary directory" in str(error.strerror)


def is_disk_fault(error: BaseException) -> bool:
    """Return whether a disk refuses every such file."""
    return isinstance(error, OSError) and (error.errno in _DISK_ERRORS or _no_temporary_folder(error))


def disk_fault(error: BaseException) -> str:
    """Return why a disk refuses every such file, with its name; empty for another cause, and for a write's own error.

    An open file does not know its name: of such an error, only its traceback says what was written.
    """
    if not isinstance(error, OSError) or not is_disk_fault(error):
        return ""
    if _no_temporary_folder(error):
        return f"{error.strerror}. Set TMPDIR to a folder where this process may write."
    file = error.filename2 or error.filename
    return f"{error.strerror}: {str(file)!r}" if file else ""


def is_raised_here(error: BaseException) -> bool:
    """Return whether an error was raised in this package, and not in what it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)


def counted(number: float, noun: str, plural: str = "s") -> str:
    """Return a number with its noun: `1 row`, `1,000 rows`; `0.333 epochs`, with at most three digits of a fraction."""
    text = f"{number:.3g}" if number < 100 else f"{number:,.0f}"
    return f"{text} {noun}{'' if text == '1' else plural}"


def and_more(shown: int, total: int) -> str:
    """Return the end of a list that is cut off, `, and 3 more`; empty if nothing is left out."""
    return f", and {total - shown} more" if total > shown else ""


def one_line(error: object, most: int = 300) -> str:
    """Return another library's message for use in one of ours: on one line, cut off, without control characters."""
    return printable(" ".join(str(error).split())[:most])


def short_json(value: object) -> str:
    """Return a value as JSON for a message: cut off if it is long, without control characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # it holds itself, or is nested too deeply
        text = f"a {type(value).__name__} that JSON cannot hold"
    return printable(text if len(text) <= 80 else f"{text[:77]}…")


@contextmanager
def loading(library: str, place: object, expected: str = "") -> Iterator[None]:
    """Turn any error of a library that loads a tokenizer into a `TokenizerError`; they raise many types.

    Args:
        library: Its name and version.
        place: The file or folder.
        expected: A file that it loads.
    """
    try:
        yield
    except BaseException as error:
        # pyo3 raises a panic of Rust code past every `except Exception`
        is_of_library = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, TokenizerError) or not is_of_library or is_disk_fault(error):
            raise
        found = f"{library} cannot load it: {one_line(error) or type(error).__name__}"
        step = "A newer one may know it: pip install --upgrade mistral-common" if "Unknown version" in found else ""
        raise TokenizerError(found, place=str(place), expected=expected, next_step=step) from error


def shortened(value: object) -> str:
    """Return a value of a JSON file for a message, cut off if it is long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r} and {counted(len(value) - 60, 'more character')}"
    return "null" if value is None else repr(value)[:80]


def in_brackets(given: object) -> str:
    """Return ` (VALUE)` for an argument that is plain data, cut off if it is long; empty for any other object."""
    if not isinstance(given, str | bytes | int | float | list | tuple | dict | set | None):
        return ""  # the text of a model has pages
    try:
        return f" ({reprlib.repr(given)[:80]})"
    except ValueError:  # Python does not write an integer of thousands of digits
        return ""


_BARE = re.compile(r"""'[^']*'|"[^"]*"|[-+]?[\d.,]+|None|True|False|null|true|false|\[[^\]]*\]|\{[^}]*\}""")


def named_value(found: str, field: str, title: str) -> str:
    """Return what was found as one line in which a bare value, such as `'usr'`, has the name of its field.

    Args:
        found: The value found, or words.
        field: The field of its place; may be empty.
        title: The title of the rule, for a value without a field.
    """
    line = " ".join(found.split())
    if not _BARE.fullmatch(line):
        return line
    return f"{field}: {line}" if re.search(r"[a-z_]", field) else f"{line}: {title}"
