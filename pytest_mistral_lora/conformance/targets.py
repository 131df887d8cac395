"""The targets of a run of the suite, with their names: tokenizers, recipes, rows, encoded rows and runners."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.chat.objective import ANSWERS
from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.errors import MistralLoraError, NoTemplateError, RunnerError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.objective import Declaration, Objective
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.chat.reading.row_source import RowSource
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.checkpoint.weights import TensorInfo
    from pytest_mistral_lora.conformance.finding import Finding
    from pytest_mistral_lora.training.recipe import Recipe

EMBEDDED = ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "spm-v7m1", "tekken-240718", "tekken-240911")
"""The embedded default: every tokenizer that mistral-common ships, by our name."""

EMBEDDED_TRAINING = "spm-v3"
"""The embedded tokenizer for training the tiny model: small, hence quick."""


@dataclass(frozen=True)
class Target:
    """A tokenizer file, a checkpoint folder, or a tokenizer that mistral-common ships.

    Attributes:
        name: Its part of the node ids.
        path: The file or folder; None for a shipped tokenizer.
        trains: Whether the end-to-end train runs with it.
        oracle_name: The declared oracle of a folder without a Mistral tokenizer file, or None.
        loaded: The tokenizer, if it is loaded already; else None.
        opened: The folder, if it is opened already; else None.
    """

    name: str
    path: Path | None = None
    trains: bool = False
    oracle_name: str | None = None
    loaded: CheckpointTokenizer | None = field(default=None, kw_only=True, repr=False, compare=False)
    opened: BaseFolder | None = field(default=None, kw_only=True, repr=False, compare=False)

    @classmethod
    def of_loaded(cls, tokenizer: CheckpointTokenizer, name: str = "") -> Target:
        """Return the target of a loaded tokenizer: loading 131,000 tokens again takes seconds.

        Args:
            tokenizer: The tokenizer.
            name: Its part of the node ids; empty for the name of its path.
        """
        path = tokenizer.path
        return cls(name or path.name, path, oracle_name=tokenizer.declared, loaded=tokenizer)

    @property
    def place(self) -> Place:
        """The place of the target as a whole."""
        return Place.of(self.path or self.name)

    @property
    def is_in_memory(self) -> bool:
        """Whether it is a tokenizer in memory: nothing lies at its path, and it has no files to judge."""
        return self.loaded is not None and self.loaded.is_object and not self.loaded.is_on_disk

    @property
    def is_folder(self) -> bool:
        """Whether the files of a folder are judged, too."""
        return self.path is not None and not self.is_in_memory and self.path.is_dir()

    @property
    def declaration(self) -> Declaration | None:
        """The declared objective of its rows; None if none is declared, or it has no rows."""
        return None

    @property
    def xfails_file(self) -> Path | None:
        """The file of known deviations that the target itself names, beside that of the run; None without one."""
        return None

    @property
    def served_by(self) -> str:
        """The server that is judged, with its version; empty for everything else."""
        return ""

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer, loaded on first use and kept for the session.

        Raises:
            TokenizerError: If there is no tokenizer.
        """
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        if self.loaded is not None:
            return self.loaded
        if self.checkpoint is not None:
            return self.checkpoint.tokenizer(self.oracle_name)
        return CheckpointTokenizer(shipped_tokenizer(self.name) if self.path is None else self.path, self.oracle_name)

    @cached_property
    def checkpoint(self) -> BaseFolder | None:
        """The folder, with its configuration and the headers of its weights; None for a file or a shipped tokenizer."""
        from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

        is_folder = False
        with suppress(OSError):  # a name that is too long
            is_folder = self.is_folder
        return self.opened or (BaseFolder(given_path(self.path)) if is_folder else None)

    def weights_header(self, file: Path) -> Mapping[str, TensorInfo]:
        """Return the header of a safetensors file of the folder.

        Raises:
            InputError: As for `read_header`.
        """
        from pytest_mistral_lora.checkpoint.weights import read_header

        return read_header(file) if self.checkpoint is None else self.checkpoint.header(file)

    @property
    def oracle(self) -> Oracle:
        """Mistral's own tokenization of this target."""
        return self.tokenizer.oracle

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives under which the laws of labels are checked."""
        return (ANSWERS,)

    def objective_at(self, place: Place) -> Objective:
        """Return the objective of the row at a place."""
        return ANSWERS

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths that the fix of a finding about this target names, with the keys of `finding.EXAMPLE_PATHS`."""
        if self.is_in_memory:  # those of the Mistral tokenizer that applies
            oracle = self.tokenizer.recognition.oracle
            return {} if oracle is None else checkpoint_paths(oracle.path)
        is_named = self.path is None or (self.path.is_file() and is_shipped(Path(self.name)))
        return checkpoint_paths(self.name if is_named else given_path(self.path))

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings about this target with the ways to mend them in the program that made it, if it is known."""
        return findings

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of this target; for a single tokenizer file, the one that mistral-common generates.

        Raises:
            NoTemplateError: If a folder has no template, or mistral-common generates none with its ids.
        """
        from pytest_mistral_lora.chat.templates import ChatTemplate

        if self.is_in_memory:
            return self.tokenizer.template
        if not self.has_template:
            if self._is_file:
                self.oracle.chat_template()  # says why there is none
            # a generated template would pass every check, but nobody would use it
            found, expected = "there is no chat template to check", "chat_template.jinja"
            raise NoTemplateError(found, place=str(self.tokenizer.path), expected=expected)
        return ChatTemplate(self.tokenizer.fast)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template to check; for a single file, the one that mistral-common generates."""
        from pytest_mistral_lora.chat.oracle import WRITES_TEMPLATES

        return (WRITES_TEMPLATES and self._is_file) or self.tokenizer.has_template

    @property
    def no_template(self) -> str:
        """Why there is no chat template to check; empty if there is one."""
        try:
            _ = self.template
        except NoTemplateError as error:
            return str(error)
        return ""

    @property
    def _is_file(self) -> bool:
        return self.path is None or (not self.is_in_memory and self.path.is_file())

    @cached_property
    def shipped_name(self) -> str | None:
        """Our name of the shipped tokenizer with the same bytes, or None; the packaged ids belong to it."""
        from pytest_mistral_lora.records.goldens import shipped_hashes

        return next((name for name, digest in shipped_hashes().items() if digest == self.oracle.sha256), None)


NO_FILES = "the files of a tokenizer in memory, or with `template`, are not judged: judge its folder by the path"
"""Why the checks of the files of a folder are not made."""


class RecipeTarget(Target):
    """A recipe: its pinned base, its rows, and the adapter of a finished run."""

    @classmethod
    def of_run(cls, recipe: Recipe, tokenizer: CheckpointTokenizer) -> RecipeTarget:
        """Return the target of a run, whose recipe is read, and whose tokenizer is loaded."""
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        target = cls(name_of(recipe.file), recipe.file)
        vars(target)["recipe"] = recipe
        if target.declared_oracle != tokenizer.declared:
            fast, files = tokenizer.loaded_fast, tokenizer.files
            tokenizer = CheckpointTokenizer(tokenizer.path, target.declared_oracle)
            tokenizer.use_files(files)
            if fast is not None:
                tokenizer.use_fast(fast)
        vars(target)["tokenizer"] = tokenizer
        return target

    @property
    def xfails_file(self) -> Path | None:
        """The file of known deviations of the recipe; None without one, or if the recipe cannot be read."""
        if self.content is not None and b"xfails" not in self.content:
            return None  # an unchanged recipe is not parsed for it
        with suppress(MistralLoraError):
            return self.recipe.xfails
        return None

    @property
    def is_folder(self) -> bool:
        """Whether the files of a folder are judged: those of its base."""
        return True

    @property
    def content(self) -> bytes | None:
        """The bytes of the file, if it has been read; else None."""
        content: bytes | None = vars(self).get("read")
        return content

    def use_content(self, content: bytes) -> None:
        """Use the bytes that the recognition of the path has read, so that the file is read once."""
        vars(self)["read"] = content

    @KeptProperty
    def recipe(self) -> Recipe:
        """The recipe, checked.

        Raises:
            RecipeError: If it cannot be read or a value is wrong.
        """
        from pytest_mistral_lora.training.recipe import load_recipe

        return load_recipe(given_path(self.path), self.content)

    @KeptProperty
    def base_folder(self) -> BaseFolder:
        """The base checkpoint on disk, its pin checked; a Hub repository may lack weights.

        Raises:
            PinError: If it is missing, or not the pinned one.
        """
        from pytest_mistral_lora.training.recipe import resolve_base

        return resolve_base(self.recipe.base, weights=False)

    @property
    def checkpoint(self) -> BaseFolder:
        """The base checkpoint."""
        return self.base_folder

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths of a local base; of a base at the Hub, the recipe, which names its tokenizer."""
        of_recipe = checkpoint_paths(given_path(self.path))
        with suppress(MistralLoraError):
            base = self.recipe.base
            if base.path is not None:
                return checkpoint_paths(base.path)
            of_recipe["own_template"] = checkpoint_paths(self.base_folder.path)["own_template"]
        return of_recipe

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer of the base checkpoint."""
        return self.loaded or self.base_folder.tokenizer(self.declared_oracle)

    @property
    def declared_oracle(self) -> str | None:
        """The declared oracle of the base; None to recognise it."""
        from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE

        named = self.recipe.base.oracle or self.oracle_name
        if named is None and self.recipe.backend == "chat-template":
            # a derivative with another layout, such as ChatML's: Mistral's layout would make every row a fault
            named = NO_ORACLE
        return named

    @property
    def files(self) -> list[DataFile]:
        """The files of rows, including held-out files and those of `evaluation.retention`.

        Raises:
            InputError: If the files cannot be determined.
        """
        return [*self.recipe.files(), *self.recipe.retention_files()]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives that the recipe declares for its rows."""
        return tuple(self.recipe.objectives)

    def objective_at(self, place: Place) -> Objective:
        """Return the objective of the file of a row.

        Raises:
            InputError: If the files cannot be determined.
        """
        files = (file.objective for file in self.files if Place.of(file.path).source == place.source)
        return next(files, ANSWERS)

    @property
    def backend(self) -> Literal["mistral-common", "chat-template"]:
        """The code that turns the rows into ids."""
        return self.recipe.backend


@dataclass(frozen=True)
class JudgedTarget(Target):
    """Something that another target judges: rows, a runner, or a server.

    Attributes:
        judge: The target whose tokenizer it is compared with.
        objective: The declared objective of its rows; None if none is declared.
    """

    judge: Target = field(default_factory=lambda: Target(EMBEDDED_TRAINING))
    objective: Declaration | None = None

    @property
    def declaration(self) -> Declaration | None:
        """The declared objective of its rows."""
        return self.objective

    @property
    def checkpoint(self) -> BaseFolder | None:
        """The folder of the target that judges."""
        return self.judge.checkpoint

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths of the target that judges."""
        return self.judge.fix_paths

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer of the target that judges."""
        return self.judge.tokenizer


@dataclass(frozen=True)
class DatasetTarget(JudgedTarget):
    """Chat rows without a recipe.

    Attributes:
        judge: The target whose tokenizer encodes them; the tokenizer itself is not judged.
        source: The rows, if they are not the file or folder at `path`.
    """

    source: RowSource | None = None

    @property
    def place(self) -> Place:
        """The place of the rows as a whole."""
        return super().place if self.source is None else self.source.place

    @KeptProperty
    def files(self) -> list[DataFile]:
        """The files of rows; for another format or a folder, with their conversion.

        Raises:
            InputError: If the files cannot be determined.
        """
        from pytest_mistral_lora.formats.sources import held_file, row_files

        files = row_files(given_path(self.path)) if self.source is None else [held_file(self.source)]
        if self.objective is None or self.objective.objective is None:
            return files
        return [replace(file, objective=self.objective.objective) for file in files]

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings with the fixes in each known trainer: rows alone do not tell who trains on them."""
        from pytest_mistral_lora.conformance.finding import in_words

        return findings if isinstance(self.judge, RecipeTarget) else in_words(findings, None)

    @property
    def backend(self) -> Literal["mistral-common", "chat-template"]:
        """The code that turns the rows into ids: the recipe's, or the template if no Mistral tokenizer applies."""
        if isinstance(self.judge, RecipeTarget):
            return self.judge.recipe.backend
        return "chat-template" if self.tokenizer.declared == "none" else "mistral-common"

    @property
    def compares(self) -> bool:
        """Whether there may be two backends to compare: a file has no template, and an oracle may be declined."""
        if isinstance(self.judge, RecipeTarget):
            return True
        has_template = self.judge.is_folder or self.judge.is_in_memory
        return has_template and self.judge.oracle_name != "none"


@dataclass(frozen=True)
class EncodedTarget(JudgedTarget):
    """Rows that a trainer encoded.

    Attributes:
        judge: The target whose tokenizer they are compared with.
        dataset: The chat JSONL files that they were made of, in order; may be empty.
        source: The rows, if they are not the file or folder at `path`.
        fixes: The fix of each rule in the words of the trainer that made the rows; None if it is not known.
    """

    dataset: tuple[Path, ...] = ()
    source: RowSource | None = None
    fixes: Mapping[str, str] | None = field(default=None, compare=False)

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings with the fixes of the trainer that made the rows, or with those of each known one."""
        from pytest_mistral_lora.conformance.finding import in_words

        return in_words(findings, self.fixes)

    @property
    def rows(self) -> RowSource:
        """The encoded rows."""
        from pytest_mistral_lora.formats.row_sources import FileRows

        return FileRows(given_path(self.path)) if self.source is None else self.source


@dataclass(frozen=True)
class RunnerTarget(JudgedTarget):
    """Rows of a recipe or a dataset, or the packaged ones, as another trainer encodes them; or an evaluation's prompts.

    `path` is the configuration of the trainer or harness.

    Attributes:
        runner: The runner's name, or the path of a script.
        judge: The target whose tokenizer and rows it gets.
        allow_code: Whether the configuration is used unchanged, with the code, networks and uploads that it names.
    """

    runner: str = ""
    allow_code: bool = False

    @property
    def declaration(self) -> Declaration | None:
        """The declared objective of its rows: the user's, that of the trainer's configuration, or the recipe's.

        Raises:
            InputError: If two declare one, and they differ.
            RunnerError: If there is no such runner.
        """
        from pytest_mistral_lora.chat.objective import Declaration
        from pytest_mistral_lora.runners import find_runner

        of_config = find_runner(self.runner).declared_by(self.path)
        return Declaration.agreed(self.objective, of_config, self._of_recipe)

    @property
    def _of_recipe(self) -> Declaration | None:
        """The objective that a recipe declares for all its rows; one trainer has no setting for each of several."""
        from pytest_mistral_lora.chat.objective import Declaration

        if isinstance(self.judge, RecipeTarget):
            with suppress(MistralLoraError):  # a check reports it
                [(objective, place), *others] = self.judge.recipe.objectives.items()
                return None if others or objective.is_default else Declaration(objective, str(place))
        return None

    @property
    def has_own_rows(self) -> bool:
        """Whether the rows are a user's or an evaluation's, and not the packaged ones, which have names."""
        from pytest_mistral_lora.runners import find_runner

        return isinstance(self.judge, RecipeTarget | DatasetTarget) or find_runner(self.runner).is_evaluation

    def row_files(self) -> Sequence[DataFile]:
        """Return the files of the recipe's training rows or of the dataset; none for a tokenizer.

        Raises:
            InputError: If the recipe cannot be read, or the files cannot be determined.
        """
        if isinstance(self.judge, RecipeTarget):
            return self.judge.recipe.train_files()
        return self.judge.files if isinstance(self.judge, DatasetTarget) else ()


def checkpoint_paths(path: Path | str) -> dict[str, str]:
    """Return the paths that a fix names for a tokenizer, by the keys of `finding.EXAMPLE_PATHS`.

    Args:
        path: A checkpoint folder, a tokenizer file, a recipe, or the name of a shipped tokenizer.
    """
    from pytest_mistral_lora.checkpoint.hub_cache import snapshot_of
    from pytest_mistral_lora.checkpoint.tokenizer_folder import TEMPLATE

    folder = Path(path)
    paths = {"checkpoint": str(path), "template": TEMPLATE, "own_template": TEMPLATE}
    if folder.is_dir():
        paths["own_template"] = str(folder / TEMPLATE)
        # a snapshot in the Hub's cache is not changed: the template goes into the current folder
        if snapshot_of(folder) is None:
            paths |= {"folder": str(folder), "template": str(folder / TEMPLATE)}
    return paths


def given_path(path: Path | None) -> Path:
    """Return the path of a target with a path.

    Raises:
        ValueError: If it has no path: only embedded targets may lack one.
    """
    if path is None:
        raise ValueError("only the embedded targets have no path")
    return path


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """A runner as the user names it: `NAME`, or `NAME=CONFIG` with the runner's own configuration file.

    Attributes:
        runner: Its name, or the path of a script.
        config: The configuration, or None for the stock configuration.
    """

    runner: str
    config: Path | None = None

    @classmethod
    def parse(cls, text: str, folder: Path) -> RunnerChoice:
        """Return the choice that a text names; its paths are relative to a folder.

        Raises:
            RunnerError: If the runner or the file does not exist.
        """
        from pytest_mistral_lora.runners import TRAINERS, find_runner

        name, _, config = text.partition("=")
        runner = find_runner(name if name in TRAINERS else str(folder / name))
        path = folder / config if config else None
        if path is not None and not path.is_file():
            raise RunnerError("no such file", place=str(path), expected=f"a configuration of {runner.title}")
        return cls(name if name in TRAINERS else str(folder / name), path)


def name_of(path: Path) -> str:
    """Return the name of a path as a part of node ids."""
    # a file of the Hub's cache is a link to a file named by its hash
    name = path.resolve().name if path.is_dir() else path.name
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "target"


def free_name(name: str, taken: Collection[str]) -> str:
    """Return an unused name: the name itself, or with the first free number from 2 on."""
    return next(free for free in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if free not in taken)


def embedded_targets() -> list[Target]:
    """Return the targets of a run without named targets."""
    return [Target(name, trains=name == EMBEDDED_TRAINING) for name in EMBEDDED]


def is_shipped(path: Path) -> bool:
    """Whether a path is our name of a tokenizer that mistral-common ships; a file of that name goes first."""
    return str(path) in EMBEDDED and not path.exists()
