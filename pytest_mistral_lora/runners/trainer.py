"""What this package knows of another trainer or harness: how to run its code, and how to say things in its words."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pytest_mistral_lora.errors import InputError, MistralLoraError, RunnerError, did_you_mean
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.programs.registry import TRAINERS_GROUP, Registry, loaded
from pytest_mistral_lora.runners.configuration import (
    Configuration,
    Keys,
    Reading,
    read_configuration,
    safe_configuration,
)
from pytest_mistral_lora.runners.going_on import GoingOn
from pytest_mistral_lora.runners.tasks import PreferenceTasks

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.objective import Declaration
    from pytest_mistral_lora.training.export.bridge import Bridge

TIME_LIMIT = 900.0
"""Default of the seconds that a trainer's code may take for all rows."""

HARNESS = Path(__file__).parent / "scripts"
"""The folder of `harness.py`, which a script can import: what scripts share, in Python's standard library."""

NOTHING = Path(os.devnull)
"""The configuration of a script that gets none from the user."""


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """What arguments say of a loss that raises or lowers the tokens of each answer of a batch alike.

    Attributes:
        name: The class that computes it.
        types: Its types, in words.
        has_signs: Whether it raises no rejected answer, and lowers no chosen one, with any weights of the model.
        has_tail: Whether the tokens of an answer beyond the length of the other one of its pair have another weight.
    """

    name: str
    types: str
    has_signs: bool
    has_tail: bool = False


@dataclass(frozen=True)
class Trainer:
    """Another trainer or a harness: a class for each that this package, or one with an entry point, knows.

    A class of its own is needed where values of its configuration name code: `require_no_code`.

    Attributes:
        name: Its name on the command line; for a user's script, the file's name.
        title: Its name in texts.
        module: Its module; empty for a user's script.
        distribution: The distribution of that module.
        script: The script that takes what it feeds a model out of it, in its own environment.
        config: The default configuration: the trainer's own defaults.
        command: The command line whose code the script runs.
        lock: The versions of its environment, one a line.
        least_python: The oldest Python that these versions support.
        is_evaluation: Whether it trains nothing: it feeds a model the prompts of its own tasks, and takes no rows.
        tasks: Its commands that take preference pairs, and those that take rated answers.
        words: The file with the fixes of rules in its own configuration; None for the rules' own.
        keys: The file with the keys of a configuration that the script gets; None for none.
        importer: Where the way from its configurations to their rows is, as `formats.importers.Importer`,
            `module:object`; empty if none is known.
        exporter: Where what writes a recipe's run for it is, `module:object`; empty if nothing does.
        variables: Variables that its runner gets, such as one that keeps it from reporting.
        label_losses: Its classes whose loss is that of labels, by name: each other one of its classes that computes a
            loss has one of its own. None if its classes compute none beside those of the library that they are made of.
        going_on: The keys of a configuration that goes on from an adapter; None if there is no such key.
        is_library: Whether users call it from scripts of their own, so that its functions hold nothing of a run.
        observers: The rules on rows that are about it, such as about a default: the names `module:OBJECT` of what sees
            each judged record (a `RowObserver` of `conformance.row_pass`). Their texts are in `field/rules`.
    """

    name: str
    title: str
    module: str
    distribution: str
    script: Path
    config: Path
    command: str
    lock: Path
    least_python: tuple[int, int] = (3, 11)
    is_evaluation: bool = False
    tasks: PreferenceTasks = field(default_factory=PreferenceTasks)
    words: Path | None = None
    keys: Path | None = None
    importer: str = ""
    exporter: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    label_losses: frozenset[str] | None = None
    going_on: GoingOn | None = None
    is_library: bool = False
    observers: tuple[str, ...] = ()

    @classmethod
    def packaged(cls, folder: Path, name: str, title: str, module: str, command: str, **more: Any) -> Self:
        """Return the trainer of a folder: `fixes.toml`, and in `runner` the script, its keys, configurations and lock.

        Args:
            folder: The folder.
            name: Its name on the command line, and that of its distribution and its default configuration.
            title: Its name in texts.
            module: Its module.
            command: The command line whose code the script runs.
            **more: Further attributes.
        """
        runner = folder / "runner"
        return cls(
            name,
            title,
            module,
            name,
            runner / f"{name.replace('-', '_')}_rows.py",
            runner / "configs" / f"{name}.yaml",
            command,
            runner / "lock.txt",
            words=folder / "fixes.toml",
            keys=runner / "keys.toml",
            **more,
        )

    def default_config(self, task: str) -> Path:
        """Return the configuration of a run for which the user gives none.

        Args:
            task: One of `tasks`; empty for chat rows.
        """
        name = self.tasks.configs.get(task)
        return self.config.parent / "preferences" / f"{name}.yaml" if name else self.config

    def fixes(self, section: str = "rows") -> Mapping[str, str]:
        """Return the fix of each rule in the trainer's own configuration; empty for a user's script.

        Args:
            section: What the findings are about: `rows` or `preferences` of its runner, or the form of a guarded run.
        """
        return fixes_in(self.words).get(section, {}) if self.words else {}

    def known_fixes(self, task: str) -> Mapping[str, str] | None:
        """Return the fix of each rule for the rows that its runner makes; None for a user's script, of any trainer.

        Args:
            task: One of `tasks`; empty for chat rows.
        """
        return self.fixes("preferences" if task else "rows") if self.module else None

    def safe_configuration(self, file: Path, *, own_data: bool = False) -> Configuration:
        """Return what the script gets of a user's configuration: no key that names code, a network or an upload.

        Args:
            file: The configuration.
            own_data: Whether the trainer keeps the data that the configuration names.

        Raises:
            RunnerError: If the file is not plain YAML within bounds, or names code that ids and labels can depend on.
        """
        return safe_configuration(file, Keys.read(self.keys), self.require_no_code, own_data=own_data)

    @property
    def version(self) -> str:
        """The version that is run: the one beside this package, or else that of its own environment; may be empty."""
        with suppress(PackageNotFoundError):
            return version(self.distribution) if self.distribution else ""
        pins = (line.partition("==") for line in self.lock.read_text(encoding="utf-8").splitlines())
        return next((pin for name, _, pin in pins if name.replace("_", "-") == self.distribution), "")

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return the objective that settings of chat rows declare: by a key whose value is not the trainer's default.

        Args:
            settings: The keys and values of a configuration as the user wrote it, or the arguments of a run, which hold
                the defaults, too. A value can be of any type.

        Returns:
            The declaration, without an objective if no word expresses the setting; None if nothing is declared.
        """
        return None

    def answer_loss(self, name: str, settings: Mapping[str, Any]) -> AnswerLoss | None:
        """Return what the arguments of a run say of the loss of one of its classes; None if it compares no answers.

        Args:
            name: The class.
            settings: The arguments. A value can be of any type.
        """
        return None

    def with_own_data(self, declared: Declaration | None, settings: Mapping[str, Any]) -> Declaration | None:
        """Return a declaration, without an objective if the data that settings name contradict its words.

        Args:
            declared: What the settings declare; None for nothing.
            settings: As for `declares`.
        """
        return declared

    def declared_by(self, file: Path | None, *, own_data: bool = False) -> Declaration | None:
        """Return the objective that a configuration of chat rows declares; None if it declares nothing.

        A configuration that cannot be read declares nothing: the run reports its error.

        Args:
            file: The configuration; None for the trainer's defaults.
            own_data: Whether the trainer keeps the data that the configuration names.
        """
        if file is None or self.is_evaluation or self.tasks.configured(file) in (*self.tasks.pairs, *self.tasks.rated):
            return None
        with suppress(RunnerError):
            settings = read_configuration(file)[0]
            declared = self.declares(settings)
            return self.with_own_data(declared, settings) if own_data else declared
        return None

    def require_no_code(self, reading: Reading) -> None:
        """Refuse the values of kept keys that name code or a network in the trainer's own way.

        Args:
            reading: The keys and values that the script gets, which may be changed here.

        Raises:
            RunnerError: With the key and its line.
        """

    def load_exporter(self) -> Bridge:
        """Return what writes a recipe's run for it.

        Raises:
            InputError: If nothing does.
        """
        from pytest_mistral_lora.training.export.bridge import Bridge

        if not self.exporter:
            raise InputError(f"no export of a run is known for {self.title}")
        return loaded(self.exporter, Bridge)


TRAINERS = Registry(TRAINERS_GROUP, "trainer", Trainer)
"""The trainers and harnesses, by name."""


def trainer_of(packages: Collection[str]) -> Trainer | None:
    """Return the trainer whose module is among some; of another package only if it has the module's name.

    Args:
        packages: The top packages that the classes of a run are from.

    Raises:
        EntryPointError: If the trainer is of another package, and does not load.
    """
    for trainer in TRAINERS.of_this_package():
        if trainer.module in packages:
            return trainer
    foreign = {name for name in TRAINERS if name not in TRAINERS.ours}
    return next((TRAINERS[name] for name in sorted(foreign & {*packages})), None)


def owner_of_loss(cls: type) -> Trainer | None:
    """Return the known trainer that a class which computes a loss is of; None if its loss is that of labels.

    A trainer of another package that does not load says nothing.
    """
    with suppress(MistralLoraError):
        trainer = trainer_of({cls.__module__.partition(".")[0]})
        if trainer is not None and trainer.label_losses is not None and cls.__name__ not in trainer.label_losses:
            return trainer
    return None


def find_runner(name: str) -> Trainer:
    """Return a trainer by its name, or by the path of a user's script (`*.py`).

    Raises:
        RunnerError: If there is no such trainer.
        InputError: If two packages have a trainer of this name.
        EntryPointError: If it is of another package, and does not load.
    """
    if name in TRAINERS:
        return TRAINERS[name]
    script = Path(name)
    if script.suffix == ".py" and script.is_file():
        return Trainer(script.stem, script.name, "", "", script, NOTHING, str(script), NOTHING)
    one_of = f"one of {', '.join(TRAINERS)}, or " if TRAINERS else ""
    raise RunnerError(
        f"{name!r} is not a runner{did_you_mean(name, TRAINERS)}",
        expected=f"{one_of}the path of a script (*.py) that maps rows to encoded rows",
    )
