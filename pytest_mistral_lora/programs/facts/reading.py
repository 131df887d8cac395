"""The one reader of facts: a TOML file for each program. `doctor`, findings, pages and exports ask it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pytest_mistral_lora.chat.reading import read_toml
from pytest_mistral_lora.errors import InputError, did_you_mean, short_json
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.facts.entries import Fact, Program, Works
from pytest_mistral_lora.programs.registry import FACTS_GROUP, folder_of, foreign_points, own_points
from pytest_mistral_lora.records.schema import error_in_words

REPRODUCTIONS = "reproductions"
"""The folder of scripts beside the files of facts."""


def folders() -> list[Path]:
    """Return the folders of facts: that of `field`, and those that other packages name as entry points.

    A package names a folder as a module, such as `my_package.facts`. Its files are read, and its code is not run.

    Raises:
        EntryPointError: If there is no such folder.
    """
    return [folder_of(point) for point in (*own_points(FACTS_GROUP), *foreign_points(FACTS_GROUP))]


@cache
def programs() -> Mapping[str, Program]:
    """Return the programs of all facts, by name.

    Raises:
        InputError: If a file is not one of facts, or two name a program or an id.
        EntryPointError: If a package names a folder that is not there.
    """
    return read_folders(folders())


def facts() -> Iterator[Fact]:
    """Yield every known fault, errors first."""
    found = [fault for program in programs().values() for fault in program.faults]
    yield from sorted(found, key=lambda fault: fault.severity == "note")


@cache
def _by_id() -> Mapping[str, Fact]:
    return {fault.id: fault for fault in facts()}


def fact(id_: str) -> Fact:
    """Return a known fault by its id.

    Raises:
        KeyError: If there is none.
    """
    return _by_id()[id_]


def find_fact(id_: str) -> Fact | None:
    """Return a known fault by its id; None if there is none, as without the package's own facts."""
    return _by_id().get(id_)


@cache
def works(id_: str) -> Works:
    """Return versions that work, by their id.

    Raises:
        KeyError: If there are none.
    """
    found = {pair.id: pair for program in programs().values() for pair in program.works}
    return found[id_]


def remark_of_program(title: str, version: str) -> str:
    """Return the remark on a program that is newer than the facts about it; empty if it is not.

    Args:
        title: The name of the program, as people write it.
        version: Its version; may be empty.
    """
    program = next((program for program in programs().values() if program.title == title), None)
    return "" if program is None else program.remark_on(version)


def read_folders(folders: Iterable[Path]) -> Mapping[str, Program]:
    """Return the programs of folders of facts, by name.

    Raises:
        InputError: If a file is not one of facts, or two name a program or an id.
    """
    found: dict[str, Program] = {}
    seen: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.toml"))):
        program = read_facts(path)
        for name in (program.program, *(entry.id for entry in program.entries)):
            if name in seen:
                raise InputError(
                    f"{name!r} is already in {seen[name]}", place=str(path), expected="a name that no other file has"
                )
            seen[name] = path
        found[program.program] = program
    return found


def read_facts(path: Path) -> Program:
    """Return the facts of a file.

    Raises:
        InputError: If it cannot be read or is not TOML, or a value is wrong; with file, fact and field.
    """
    data = read_toml(path)
    try:
        program = Program.model_validate(data)
    except ValidationError as error:
        faults = [_in_words(item, data, path) for item in error.errors(include_url=False)]
        if len(faults) == 1:
            place, found = faults[0]
            raise InputError(found, place=place) from error
        lines = [f"{len(faults)} bad values", *(f"  {place}: {found}" for place, found in faults)]
        raise InputError("\n".join(lines), place=str(path)) from error
    _require_scripts(program, path)
    _require_unique(program, path)
    return program


def _require_scripts(program: Program, path: Path) -> None:
    folder = path.parent / REPRODUCTIONS
    for fault in program.faults:
        script = fault.reproduction.script
        if script and not (folder / script).is_file():
            names = [file.name for file in folder.glob("*.py")]
            place = Place.of(path).within("fault", fault.id, "reproduction", "script")
            raise InputError(f"there is no {folder / script}{did_you_mean(script, names)}", place=place)


def _require_unique(program: Program, path: Path) -> None:
    ids: set[str] = set()
    for entry in program.entries:
        if entry.id in ids:
            raise InputError(f"{entry.id!r} is there twice", place=str(path), expected="an id for each fact")
        ids.add(entry.id)


def _in_words(error: Mapping[str, Any], data: Mapping[str, Any], path: Path) -> tuple[Place, str]:
    """Return the place of one of pydantic's errors, with the id of the fact in place of its number, and its words."""
    steps: list[str | int] = list(error["loc"])
    if len(steps) > 1 and isinstance(steps[1], int):
        with suppress(KeyError, TypeError):
            steps[1] = str(data[str(steps[0])][steps[1]]["id"])
    words = error_in_words(error, Program)
    value = error["input"]
    is_shown = error["type"] != "missing" and isinstance(value, str | int | float | bool)
    return Place.of(path).within(*steps), f"{short_json(value)}: {words}" if is_shown else words
