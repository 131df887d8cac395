"""Programs by name: those of this package, and those that other packages name as entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from pytest_mistral_lora.errors import EntryPointError, InputError

Kind = TypeVar("Kind")

SERVERS_GROUP, TRAINERS_GROUP = "pytest_mistral_lora.servers", "pytest_mistral_lora.trainers"
"""The groups of entry points."""


def foreign_names(group: str) -> list[str]:
    """Return the names that installed packages give to entry points of a group, in order; nothing is imported."""
    return sorted({point.name for point in entry_points(group=group)})


class Registry(Mapping[str, Kind]):
    """The objects of a kind by name, such as servers.

    A package adds one by an entry point of its `pyproject.toml`, whose name is that of the program:

        [project.entry-points."pytest_mistral_lora.servers"]
        mistralrs = "my_package.servers:MISTRALRS"

    Names are read from the metadata of installed packages. An object of another package is imported, and so its code
    run, if its name is used, and at no other time.

    Attributes:
        ours: The objects of this package, by name.
    """

    def __init__(self, group: str, title: str, kind: type[Kind], ours: Mapping[str, Kind]) -> None:
        """Take the group of the entry points, the kind of object in words and as a class, and the package's own."""
        self.ours = ours
        self._group, self._title, self._kind = group, title, kind

    def __iter__(self) -> Iterator[str]:
        """Return the names: ours in their order, then those of other packages."""
        return iter([*self.ours, *(name for name in foreign_names(self._group) if name not in self.ours)])

    def __len__(self) -> int:
        """Return the number of names."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a name; nothing is imported."""
        return name in self.ours or any(point.name == name for point in self._points())

    def __getitem__(self, name: str) -> Kind:
        """Return the object of a name; that of another package is imported.

        Raises:
            KeyError: If the name is unknown.
            InputError: If two packages have it.
            EntryPointError: If the import fails, or gives an object of another kind.
        """
        points = [point for point in self._points() if point.name == name]
        if len(points) + (name in self.ours) > 1:
            owners = [*(["this package"] if name in self.ours else []), *map(_owner, points)]
            raise InputError(
                f"{len(owners)} packages have a {self._title} {name!r}: {', '.join(owners)}",
                expected="one",
                next_step=f"Uninstall one of them: pip uninstall {owners[-1]}",
            )
        if name in self.ours:
            return self.ours[name]
        if not points:
            raise KeyError(name)
        return self._imported(points[0])

    def _imported(self, point: EntryPoint) -> Kind:
        try:
            found = point.load()
        except Exception as error:  # of foreign code, which may raise any
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

    def _points(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self._group))


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown package"
