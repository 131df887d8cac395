"""What a mutant is, and the workbench that it is made on.

Every subject has a module `bench_<subject>.py` beside this one, with a `BENCH` that makes a sound artifact and judges
it as the suite does. There, or in modules `mutants_<subject>_<part>.py`, are its mutants: functions that break the
artifact, each with the rules that must then fire. Any other rule of the bench must not. `examples_<subject>.py` has an
`Example` of each rule: the one that its page shows.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from pytest_mistral_lora.conformance.finding import RULES, Finding

Artifact = dict[str, Any]
"""What a change may touch, by name."""


class Bench(Protocol):
    """Makes and judges the artifacts of one subject.

    A bench of rows has a method `table` as well: the tokens around the first difference that a change makes.
    """

    subject: str

    def make(self, folder: Path) -> Artifact:
        """Make a sound artifact, in files below an empty folder where it needs files."""
        ...

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on it, as the suite does."""
        ...


@dataclass(frozen=True)
class Mutant:
    """One way to break an artifact.

    Attributes:
        change: Breaks it in place; its name is the mutant's name, its docstring says what is broken.
        fires: Exactly the rules that fire, as `fired` returns them.
        incidents: Ids of the incidents that it stands for.
        says: Words that one of the findings must have.
        slow: Whether the sweeps alone judge it: each of its rules fires on a quicker mutant, too.
    """

    change: Callable[[Artifact], None]
    fires: frozenset[str]
    incidents: tuple[str, ...] = ()
    says: str = ""
    slow: bool = False

    @property
    def name(self) -> str:
        """The mutant's name, for people."""
        return self.change.__name__.strip("_").replace("_", "-")

    @property
    def rules(self) -> frozenset[str]:
        """The ids of the rules that fire."""
        return frozenset(name.partition(".")[0] for name in self.fires)


def fired(findings: Iterable[Finding]) -> set[str]:
    """Return the rules of findings: of a rule that says one thing of several, the names within it."""
    return {finding.name if RULES.has_name(finding.name) else finding.rule for finding in findings}


def mutant(
    fires: str, *incidents: str, says: str = "", slow: bool = False
) -> Callable[[Callable[[Artifact], None]], Mutant]:
    """Make a mutant of a function.

    Args:
        fires: The rules that fire, with spaces between them.
        incidents: Ids of the incidents that it stands for.
        says: Words that one of the findings must have.
        slow: Whether the sweeps alone judge it.
    """
    return lambda change: Mutant(change, frozenset(fires.split()), incidents, says, slow)


def benches() -> dict[str, ModuleType]:
    """Return the bench modules by subject."""
    modules = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("bench_*.py"))]
    return {module.BENCH.subject: module for module in modules}


def mutants(module: ModuleType) -> list[Mutant]:
    """Return the mutants of a bench module and of its parts, in the order in which they are written."""
    parts = sorted(Path(__file__).parent.glob(f"mutants_{module.BENCH.subject}_*.py"))
    modules = [module, *(importlib.import_module(path.stem) for path in parts)]
    # a part may use a mutant of another one
    found = {id(value): value for one in modules for value in vars(one).values() if isinstance(value, Mutant)}
    return list(found.values())


class Example(ABC):
    """The example of the rule whose id is the class's name: the pages of the rules show the findings of `broken`.

    Attributes:
        mutant: The mutant that has the fault of the example; without one, the example writes `broken` itself.
        also: The other rules that fire, with spaces between them; for one with a mutant, those of the mutant.
    """

    mutant: Mutant | None = None
    also = ""

    @property
    def fires(self) -> frozenset[str]:
        """Exactly the rules that fire."""
        return self.mutant.fires if self.mutant else frozenset((type(self).__name__, *self.also.split()))

    def start(self, artifact: Artifact) -> None:  # noqa: B027 - most examples break the artifact as the bench makes it
        """Make the artifact simpler, before the mutant breaks it: a short row, for example."""

    def broken(self, artifact: Artifact) -> None:
        """Break the rule, in place."""
        assert self.mutant is not None, "an example has a mutant, or writes what breaks its rule"
        self.start(artifact)
        self.mutant.change(artifact)

    @abstractmethod
    def sound(self, artifact: Artifact) -> None:
        """Make the same change without the fault: no rule fires."""


def examples(subject: str) -> dict[str, Example]:
    """Return the examples of a subject by the ids of their rules."""
    classes = vars(importlib.import_module(f"examples_{subject}")).values()
    found = (value for value in classes if isinstance(value, type) and issubclass(value, Example))
    return {value.__name__: value() for value in found if value.__name__.startswith("ML")}
