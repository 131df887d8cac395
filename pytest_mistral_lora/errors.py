"""The errors of this project: each says where, what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_OK = 0
EXIT_FINDING = 1
EXIT_BAD_INPUT = 2
EXIT_OUT_OF_MEMORY = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class MistralLoraError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        found: What is wrong, with the offending value.
        place: Where it is: ``data/train.jsonl:17, messages[2].role``. Empty where there is no place.
        expected: What would have been right. Empty where ``found`` says it.
        next_step: What the reader can do now.
    """

    exit_code = EXIT_FINDING

    def __init__(self, found: str, *, place: str = "", expected: str = "", next_step: str = "") -> None:
        self.found = found
        self.place = place
        self.expected = expected
        self.next_step = next_step
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.place}: {self.found}" if self.place else self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.next_step:
            text = f"{text.rstrip('.')}. {self.next_step}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword fields when the error crosses a process boundary."""
        return _rebuild, (type(self), self.__dict__.copy(), str(self))


def _rebuild(cls: type[MistralLoraError], state: dict[str, object], text: str) -> MistralLoraError:
    error = cls.__new__(cls, text)
    error.__dict__.update(state)
    error.args = (text,)
    return error


class InputError(MistralLoraError):
    """Bad usage or bad input: a file, a setting or a value that cannot be used (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class RowError(InputError):
    """One chat row that cannot be used."""


class OracleRejection(RowError):
    """A row of the right shape that Mistral's own validation refuses."""


class RowsError(InputError):
    """Every bad row of one file.

    Attributes:
        errors: One `RowError` for each bad row, in file order.
    """

    shown = 20

    def __init__(self, errors: Sequence[RowError], *, place: str) -> None:
        self.errors = tuple(errors)
        lines = [f"{len(errors)} bad row{'s' if len(errors) != 1 else ''}"]
        lines += [f"  {error}" for error in errors[: self.shown]]
        if len(errors) > self.shown:
            lines.append(f"  … and {len(errors) - self.shown} more")
        super().__init__("\n".join(lines), place=place)


class TokenizerError(InputError):
    """A tokenizer file or folder that cannot be loaded, or is not what it claims to be."""


class NoOracleError(TokenizerError):
    """A checkpoint without a Mistral tokenizer file: what needs Mistral's own tokenization cannot be checked."""


class LibraryError(InputError):
    """A library of a version that does not have what this package uses of it."""


class NoTemplateError(TokenizerError):
    """A checkpoint without a chat template: what compares with it cannot be checked."""


class PinError(InputError):
    """A base model whose exact revision is not given, not present or not allowed."""


class RunnerError(InputError):
    """Another trainer whose rows cannot be had: it is not there, it hangs, or it refuses its configuration."""


class RecipeError(InputError):
    """A recipe that cannot be run as written."""


class TrainingError(MistralLoraError):
    """A training run that must not go on: nothing to train, a layer that does not move."""


class MemoryShortageError(MistralLoraError):
    """A step that does not fit into the memory there is (exit code 3)."""

    exit_code = EXIT_OUT_OF_MEMORY


class NonFiniteError(TrainingError):
    """A loss or a gradient that is NaN, infinite, or larger than the recipe allows.

    Attributes:
        rows: Places in the training rows of those whose own loss is not finite, or of all rows of the step; may be
            empty where the error is raised.
        places: Where the same rows came from: `file:line`.
    """

    def __init__(self, found: str, *, rows: Sequence[int] = (), places: Sequence[str] = (), **fields: str) -> None:
        self.rows, self.places = tuple(rows), tuple(places)
        super().__init__(found, **fields)


class MergeError(MistralLoraError):
    """A merged model that is not what base and adapter are together: it is not left on the disk."""


class DiskError(TrainingError):
    """A file of a run or a merge that cannot be written: the disk is full, or refuses it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM where there is no step to finish (exit code 143). Like Ctrl-C, it passes every `except Exception`."""


class StoppedError(MistralLoraError):
    """A run that a signal stopped after an optimizer step, with a checkpoint (exit code 128 + the signal's number).

    Attributes:
        exit_code: 130 for SIGINT (Ctrl-C), 143 for SIGTERM.
    """

    def __init__(self, found: str, *, signal: int = EXIT_INTERRUPTED - 128, **fields: str) -> None:
        self.exit_code = 128 + signal
        super().__init__(found, **fields)
