from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from pytest_mistral_lora import errors
from pytest_mistral_lora.errors import (
    EXIT_BAD_INPUT,
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    InputError,
    MemoryShortageError,
    MistralLoraError,
    OracleRejection,
    RowError,
    RowsError,
    StoppedError,
    counted,
)
from pytest_mistral_lora.places import Place


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "'bot'"),
        ({"place": Place.of("a.jsonl", 3).within("messages", 1, "role")}, "a.jsonl:3, messages[1].role: 'bot'"),
        ({"expected": "user"}, "'bot'; expected user"),
        ({"next_step": "Rename it."}, "'bot'. Rename it."),
        (
            {"place": Place.of("a.jsonl", 3), "expected": "user", "next_step": "Rename it."},
            "a.jsonl:3: 'bot'; expected user. Rename it.",
        ),
    ],
)
def test_an_error_says_where_what_and_what_to_do(fields: dict[str, Any], said: str) -> None:
    error = MistralLoraError("'bot'", **fields)
    assert str(error) == said
    assert error.found == "'bot'"
    assert {name: getattr(error, name) for name in fields} == fields


def test_a_value_that_a_terminal_would_obey_is_spelled_out() -> None:
    error = RowError("'\x1b[2J'\\nand", place=Place.of("a\ud800", 3), expected="\u202e", next_step="\x00")
    assert (error.found, str(error.place), error.expected, error.next_step) == (
        "'\\x1b[2J'\\nand",
        "a\\ud800:3",
        "\\u202e",
        "\\x00",
    )
    assert str(error) == "a\\ud800:3: '\\x1b[2J'\\nand; expected \\u202e. \\x00"


def test_a_full_stop_before_the_next_step_is_not_doubled() -> None:
    assert str(MistralLoraError("No.", next_step="Go on.")) == "No. Go on."


def every_error() -> list[type[MistralLoraError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MistralLoraError)]
    return [kind for kind in kinds if kind is not RowsError]


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_one_base_and_an_exit_code(kind: type[MistralLoraError]) -> None:
    error = kind("found")
    assert isinstance(error, MistralLoraError)
    own = {MemoryShortageError: EXIT_OUT_OF_MEMORY, StoppedError: EXIT_INTERRUPTED}
    assert error.exit_code == own.get(kind, EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FINDING)
    assert kind.__doc__


def bad_rows(count: int) -> RowsError:
    return RowsError([RowError("bad", place=f"a:{line}") for line in range(1, count + 1)], place="a")


@pytest.mark.parametrize(
    "error",
    [
        *(kind("found", place="p", expected="e", next_step="n") for kind in every_error()),
        bad_rows(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_processes_whole(error: MistralLoraError) -> None:
    other: Any = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert (other.found, str(other.place), other.expected, other.next_step) == (
        error.found,
        str(error.place),
        error.expected,
        error.next_step,
    )
    if isinstance(error, RowsError):
        assert [str(one) for one in other.errors] == [str(one) for one in error.errors]


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (1, "a: 1 bad row", "  a:1: bad"),
        (2, "a: 2 bad rows", "  a:2: bad"),
        (20, "a: 20 bad rows", "  a:20: bad"),
        (21, "a: 21 bad rows", "  … and 1 more"),
        (500, "a: 500 bad rows", "  … and 480 more"),
    ],
)
def test_at_most_20_rows_are_shown_and_all_are_kept(count: int, first: str, last: str) -> None:
    error = bad_rows(count)
    lines = str(error).splitlines()
    assert (lines[0], lines[-1]) == (first, last)
    assert len(lines) == 1 + min(count, 20) + (count > 20)
    assert len(error.errors) == count


def test_a_refusal_is_a_row_error_and_a_row_error_is_bad_input() -> None:
    assert issubclass(OracleRejection, RowError)
    assert issubclass(RowError, InputError)


def test_importing_the_errors_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import pytest_mistral_lora.errors; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(added) <= {"pytest_mistral_lora", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((1, "1 row"), (0, "0 rows"), (1234567, "1,234,567 rows")),
        *((1.0, "1 row"), (0.9996, "1 row"), (1 / 3, "0.333 rows"), (99.96, "100 rows"), (1234.5, "1,234 rows")),
    ],
)
def test_a_number_has_its_noun(number: float, text: str) -> None:
    assert counted(number, "row") == text
