"""Programs by name: those of `field`, and those that other packages name as entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, distributions, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pytest_mistral_lora.chat.rows import imported
from pytest_mistral_lora.errors import EntryPointError, InputError, one_line
from pytest_mistral_lora.escaping import printable

Kind = TypeVar("Kind")

SERVERS_GROUP, TRAINERS_GROUP = "pytest_mistral_lora.servers", "pytest_mistral_lora.trainers"
FACTS_GROUP, TEMPLATES_GROUP = "pytest_mistral_lora.facts", "pytest_mistral_lora.templates"
"""The groups of entry points."""

_FIELD = "pytest_mistral_lora.field"


def own_field() -> ModuleType | None:
    """Return the room of programs of this package, whose import reads no program; None without it."""
    try:
        return import_module(_FIELD)
    except ModuleNotFoundError as error:
        if error.name != _FIELD:
            raise
        return None


def own_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group that this package has itself, in their order; none without its `field`.

    They are no metadata of the installed package, so that a clone needs no new installation after an edit.
    """
    field = own_field()
    return tuple(EntryPoint(name, value, group) for name, value in field.PROGRAMS[group].items()) if field else ()


def foreign_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group that installed packages have, in the order of their names."""
    return tuple(sorted(_all_points(tuple(sys.path)).select(group=group), key=lambda point: point.name))


@lru_cache(maxsize=1)
def _all_points(path: tuple[str, ...]) -> Any:
    """Return the entry points of the packages on a path: a command asks for several groups, and each reads all files.

    Args:
        path: The path of the interpreter, which a program may change.
    """
    with suppress(Exception):
        return entry_points()
    # a file of any package that is damaged ends Python's own search
    points: list[EntryPoint] = []
    for distribution in distributions():
        try:
            points += distribution.entry_points
        except Exception as error:  # Python has no error of its own for such a file
            name = printable(str(distribution.metadata["Name"]), lines=False)
            sys.stderr.write(f"warning: the entry points of the package {name} cannot be read: {one_line(error)}\n")
    return EntryPoints(points)


def names_in(group: str) -> list[str]:
    """Return the names of a group: ours in their order, then those of other packages; nothing of them is imported."""
    points = (*own_points(group), *foreign_points(group))
    return list(dict.fromkeys(point.name for point in points))


def folder_of(point: EntryPoint) -> Path:
    """Return the folder that an entry point names as a module, such as `my_package.facts`; its code is not run.

    Raises:
        EntryPointError: If there is no such folder.
    """
    package, *inner = point.value.split(".")
    try:
        spec = find_spec(package)  # of the package itself, which is not imported
    except ValueError:
        spec = None
    for parent in (spec and spec.submodule_search_locations) or ():
        folder = Path(parent, *inner)
        if folder.is_dir():
            return folder
    raise EntryPointError(f"{point.name}: {point.value} is no folder", expected="a package with the files in it")


class Registry(Mapping[str, Kind]):
    """The objects of a kind by name, such as servers.

    A package adds one by an entry point of its `pyproject.toml`, whose name is that of the program:

        [project.entry-points."pytest_mistral_lora.servers"]
        mine = "my_package.servers:MINE"

    Names are read from the metadata of installed packages. An object is imported, and so its code run, if its name is
    used, and at no other time.

    Attributes:
        general: The objects that are of no single program, by name.
    """

    def __init__(self, group: str, title: str, kind: type[Kind], general: Mapping[str, Kind] | None = None) -> None:
        """Take the group of the entry points, the kind of object in words and as a class, and the general objects."""
        self.general = general or {}
        self._group, self._title, self._kind = group, title, kind

    @property
    def ours(self) -> tuple[str, ...]:
        """The names of this package, those of single programs first."""
        return (*(point.name for point in own_points(self._group)), *self.general)

    def __iter__(self) -> Iterator[str]:
        """Return the names: ours in their order, then those of other packages."""
        return iter(dict.fromkeys((*self.ours, *(point.name for point in foreign_points(self._group)))))

    def __len__(self) -> int:
        """Return the number of names."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a name; nothing is imported."""
        return name in list(self)

    def __getitem__(self, name: str) -> Kind:
        """Return the object of a name, which is imported.

        Raises:
            KeyError: If the name is unknown.
            InputError: If two packages have it.
            EntryPointError: If the import fails, or gives an object of another kind.
        """
        own = [point for point in own_points(self._group) if point.name == name]
        foreign = [point for point in foreign_points(self._group) if point.name == name]
        is_ours = bool(own) or name in self.general
        if len(foreign) + is_ours > 1:
            owners = [*(["this package"] if is_ours else []), *map(_owner, foreign)]
            raise InputError(
                f"{len(owners)} packages have a {self._title} {name!r}: {', '.join(owners)}",
                expected="one",
                next_step=f"Uninstall one of them: pip uninstall {owners[-1]}",
            )
        if name in self.general:
            return self.general[name]
        points = own or foreign
        if not points:
            raise KeyError(name)
        return self._imported(points[0])

    def of_this_package(self) -> Iterator[Kind]:
        """Yield each object of this package. No metadata is read: the judge asks for these in each part of a file."""
        yield from map(self._imported, own_points(self._group))
        yield from self.general.values()

    def _imported(self, point: EntryPoint) -> Kind:
        try:
            found = point.load()
        except (
            Exception,
            SystemExit,
        ) as error:  # of foreign code, which may raise any, and end the command as a success
            reason = f"{type(error).__name__}: {error}"
            raise EntryPointError(
                f"{point.name}: {point.value} of {_owner(point)} does not import: {reason}"
            ) from error
        if not isinstance(found, self._kind):
            raise EntryPointError(
                f"{point.name}: {point.value} of {_owner(point)} is a {type(found).__name__}",
                expected=f"an object of {self._kind.__module__}.{self._kind.__qualname__}",
            )
        return found


def loaded(place: str, kind: type[Kind]) -> Kind:
    """Return the object that a program names as `module:object`.

    Raises:
        InputError: If it is of another kind.
        ImportError: If the module is missing, or a library that it needs.
    """
    found = imported(place)
    if not isinstance(found, kind):
        raise InputError(f"{place} is a {type(found).__name__}", expected=f"an object of the class {kind.__name__}")
    return found


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "this package"
