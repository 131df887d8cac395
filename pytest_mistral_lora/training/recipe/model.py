"""The recipe of a run, read from YAML: base, rows, adapter, optimisation, measurements and output; and its pin."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.reading import path_of
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.pins import find_commit, resolve
from pytest_mistral_lora.errors import PinError, RecipeError
from pytest_mistral_lora.formats.importers import trainer_answer
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.base_location import base_weights_command
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.schema import error_in_words
from pytest_mistral_lora.training.recipe.data import FILE, SOURCE, Data, DataSource
from pytest_mistral_lora.training.recipe.declared import Deployment, command_entries
from pytest_mistral_lora.training.recipe.reading import Field as FieldPath
from pytest_mistral_lora.training.recipe.reading import at_field, read_yaml, shown, with_base_value
from pytest_mistral_lora.training.recipe.sections import Base, Lora, RecipePath, Section, from_recipe, written_path
from pytest_mistral_lora.training.recipe.settings import Evaluation, JsonSchemaCheck, Training

_LONGEST_OUTPUT = 200


@dataclass(frozen=True)
class _RecipeText:
    """The file that a recipe was read from, and the line of each field; two recipes are equal wherever they stand."""

    place: Place = field(default=NOWHERE, compare=False)
    lines: Mapping[FieldPath, int] = field(default_factory=dict, compare=False)


class Recipe(Section):
    """One run of the trainer."""

    json_schema: ClassVar[dict[str, Any]]
    """The JSON Schema of a recipe, for editors."""

    _folder: Path = PrivateAttr(default_factory=Path)
    _text: _RecipeText = PrivateAttr(default_factory=lambda: _RecipeText())

    base: Base = Field(description="The base model.")
    backend: Literal["mistral-common", "chat-template"] = Field(
        default="mistral-common",
        description="Code that turns your rows into ids: Mistral's own tokenizer, or the chat template.",
    )
    data: Data = Field(description="The rows.")
    lora: Lora = Field(default_factory=Lora, description="The adapter.")
    training: Training = Field(description="The optimisation.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="Measurements on generated answers.")
    card: dict[str, Any] = Field(
        default_factory=dict,
        description="Metadata for the Hub in your model card `README.md`, such as license, language and datasets.",
    )
    deployment: Deployment | None = Field(
        default=None,
        description="The artifact that production serves, and its name; `mistral-lora note` records a change.",
    )
    xfails: RecipePath | None = Field(
        default=None,
        description="File of known deviations, as `--xfails` takes it: `check` and `train` accept the findings that it "
        "lists, each with a reason.",
    )
    output: RecipePath = Field(description="Folder for your adapter, relative to the recipe; it is created.")

    @model_validator(mode="after")
    def _no_shared_dropout(self) -> Self:
        # each token has its own dropout mask: a shared token would have one mask for all of its rows
        if self.training.share_prefix and self.lora.dropout:
            raise ValueError(
                f"training.share_prefix with lora.dropout {self.lora.dropout}: rows would share its mask; "
                "expected lora.dropout 0"
            )
        return self

    @model_validator(mode="after")
    def _gate_has_rows(self) -> Self:
        held_out = bool(self.data.eval or self.data.held_out)
        if self.evaluation.gate and not held_out and self.evaluation.retention is None:
            raise ValueError(
                "evaluation.gate without rows to judge; expected data.eval, data.held_out or evaluation.retention"
            )
        return self

    @field_validator("output")
    @classmethod
    def _beside_recipe(cls, value: Path, info: ValidationInfo) -> Path:
        # made absolute as text, so that `out/..` counts as the folder that it names
        folder, absolute = Path(os.path.abspath(from_recipe(Path(), info))), Path(os.path.abspath(value))  # noqa: PTH100
        if value.name in ("", "..") or folder.is_relative_to(absolute):
            raise ValueError(
                "the recipe's folder is this folder or in it; expected a folder of its own, such as lora-out"
            )
        # folders and files with longer names are made beside it
        if len(os.fsencode(value.name)) > _LONGEST_OUTPUT:
            raise ValueError(f"a name of more than {_LONGEST_OUTPUT} bytes")
        return value

    @property
    def folder(self) -> Path:
        """Folder of the recipe's file; its relative paths start here."""
        return self._folder

    @property
    def resume_step(self) -> str:
        """The sentence on how a stopped run goes on: the whole command, if one process runs a recipe's file."""
        if not self._text.place or os.environ.get("WORLD_SIZE", "1") != "1":
            return "Go on with --resume."
        return f"Go on: {shlex.join(['mistral-lora', 'train', self._text.place.source.name, '--resume'])}"

    @property
    def file(self) -> Path:
        """The file that it was read from; for a recipe in memory, the one that it would be read from."""
        place = self._text.place
        return Path(place.source.name) if place else self._folder / "recipe.yaml"

    def line_of(self, path: Sequence[str | int]) -> int | None:
        """Return the line of a field in the recipe's file, or of the nearest section around it; None without a file."""
        lines, steps = {tuple(map(str, key)): line for key, line in self._text.lines.items()}, tuple(map(str, path))
        return next((lines[steps[:end]] for end in range(len(steps), 0, -1) if steps[:end] in lines), None)

    @contextmanager
    def naming_lines(self) -> Iterator[None]:
        """Raise an error about a field of this recipe with the recipe's file and line; any other error as it is."""
        try:
            yield
        except RecipeError as error:
            path, text = error.place.part, self._text.place
            if error.place.source.name or not path or path[0] not in type(self).model_fields or not text:
                raise
            place = replace(text, line=self.line_of(path)).within(*path)
            raise type(error)(error.found, place=place, expected=error.expected, next_step=error.next_step) from error

    def files(self) -> list[DataFile]:
        """Return the data files, each with its objective, those to train on first; see `Data.files`.

        Raises:
            RecipeError: If an entry cannot be opened.
        """
        return self.data.files(self.training.objective)

    def train_files(self) -> list[DataFile]:
        """Return the files of `files` that are not held out as a whole.

        Raises:
            RecipeError: As `files`.
        """
        return self.data.train_files(self.training.objective)

    @property
    def train_paths(self) -> tuple[Path, ...]:
        """The paths of `train_files`; empty if an entry cannot be opened, which a check of the rows reports."""
        with suppress(RecipeError):
            return tuple(file.path for file in self.train_files())
        return ()

    @property
    def objectives(self) -> dict[Objective, Place]:
        """The objectives of the rows of `data`, each with the first key that declares it."""
        found: dict[Objective, Place] = {}
        for place, objective in self.data.objectives(self.training.objective):
            found.setdefault(objective, place)
        return found

    @property
    def retention_objectives(self) -> dict[Objective, Place]:
        """The objectives of the rows of `evaluation.retention`, each with the first key that declares it."""
        retention, found = self.evaluation.retention, dict[Objective, Place]()
        for place, objective in retention.objectives(self.training.objective) if retention is not None else ():
            found.setdefault(objective, place)
        return found

    def retention_files(self) -> list[DataFile]:
        """Return the files of `evaluation.retention`, each with its objective; empty without them.

        Raises:
            RecipeError: If an entry cannot be opened.
        """
        retention = self.evaluation.retention
        return [] if retention is None else retention.files(self.training.objective)

    @property
    def data_paths(self) -> tuple[Path, ...]:
        """The named paths of all rows: those of `data`, then those of `evaluation.retention`."""
        retention = self.evaluation.retention
        return (*self.data.paths, *(retention.paths if retention is not None else ()))

    def name_of(self, path: Path) -> str:
        """Return a file's name in the manifest: its path below the recipe's folder, or else its last part."""
        # a manifest is published: the path of a file elsewhere would publish names of folders of this machine
        below = path.is_relative_to(self._folder) and ".." not in path.relative_to(self._folder).parts
        return (path.relative_to(self._folder) if below else Path(path.name)).as_posix()

    def path_as_written(self, path: Path) -> str:
        """Return a path of this recipe relative to the recipe's folder if it is below the folder, else unchanged."""
        return written_path(path.relative_to(self._folder) if path.is_relative_to(self._folder) else path)

    def _entries_as_written(self, entries: Sequence[Path | DataSource]) -> list[str | dict[str, Any]]:
        return [
            self.path_as_written(entry)
            if isinstance(entry, Path)
            else entry.model_dump(mode="json", exclude_defaults=True) | {"path": self.path_as_written(entry.path)}
            for entry in entries
        ]

    def as_written(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data, from which `parse_recipe` makes it again beside the same files.

        What may be declared again after the run is left out: see `declared`.
        """
        left_out: Any = {"deployment": True, "evaluation": {"commands"}}
        data = self.model_dump(mode="json", exclude_none=True, exclude=left_out)
        data["output"] = self.path_as_written(self.output)
        for name in ("train", "eval"):
            data["data"][name] = self._entries_as_written(getattr(self.data, name))
        if self.evaluation.retention is not None:
            data["evaluation"]["retention"]["rows"] = self._entries_as_written(self.evaluation.retention.rows)
        for written, check in zip(data["evaluation"]["checks"], self.evaluation.checks, strict=True):
            if isinstance(check, JsonSchemaCheck):
                written["json_schema"] = self.path_as_written(check.json_schema)
        if self.xfails:
            data["xfails"] = self.path_as_written(self.xfails)
        if self.lora.start:
            data["lora"]["start"] = self.path_as_written(self.lora.start)
        if self.base.path:
            data["base"]["path"] = self.path_as_written(self.base.path)
        if self.base.oracle:
            data["base"]["oracle"] = self.path_as_written(Path(self.base.oracle))
        return data

    def declared(self) -> dict[str, Any]:
        """Return the parts of a manifest that a recipe declares, and no step of the run decides.

        They are `deployment`, if the recipe has it, and the user's entries of `evaluation`.
        """
        deployment = {} if self.deployment is None else {"deployment": self.deployment.to_json()}
        return {**deployment, "evaluation": command_entries(self.evaluation.commands)}


Recipe.json_schema = Recipe.model_json_schema()


def load_recipe(path: str | Path, content: bytes | None = None) -> Recipe:
    """Read a recipe from a YAML file; its relative paths are relative to the file.

    Args:
        path: The file.
        content: Its bytes, if they have been read; None to read it.

    Raises:
        RecipeError: If the file cannot be read, is not YAML, names a key twice, or a value is wrong; all are named.
    """
    path = path_of(path, "a recipe")
    data, lines = read_yaml(path, content)
    return parse_recipe(data, folder=path.parent, place=Place.of(path), lines=lines)


_UNNAMED = Place.of("recipe")


def parse_recipe(
    data: Any, *, folder: Path | None = None, place: Place = _UNNAMED, lines: Mapping[FieldPath, int] | None = None
) -> Recipe:
    """Check plain data and return it as a recipe.

    Args:
        data: The content of a YAML file.
        folder: Folder of relative paths; None for the working directory.
        place: Source of the data, for messages.
        lines: Line of each field in the source, as far as they are known.

    Raises:
        RecipeError: If a value is wrong; all are named.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"is {kind_of(data)}", place=place, expected="a mapping with base, data, training, output")
    if data.keys().isdisjoint(("base", "data", "training")) and (answer := trainer_answer(Path(str(place)), data)):
        title, step = answer
        # no key would be a recipe's: report one sentence instead of a fault for each
        expected = "a recipe, with base, data, training and output"
        raise RecipeError(f"this is {title}", place=place, expected=expected, next_step=step)
    try:
        recipe = Recipe.model_validate(data, context={"folder": folder or Path(), "place": place})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # pydantic counts the good entries of a list, and reports a list without good entries once more
        within = {error["loc"][:end] for error in errors for end in range(1, len(error["loc"]))}
        faults = [
            _fault(error, place, lines or {})
            for error in errors
            if error["type"] != "too_short" or error["loc"] not in within
        ]
        if len(faults) == 1:
            where, found = faults[0]
            raise RecipeError(found, place=where) from error
        text = "\n".join([f"{len(faults)} bad values", *(f"  {where}: {found}" for where, found in faults)])
        raise RecipeError(text, place=place) from error
    recipe._folder = folder or Path()
    if lines is not None:
        recipe._text = _RecipeText(place, lines)
    return recipe


def _fault(error: Any, recipe: Place, lines: Mapping[FieldPath, int]) -> tuple[Place, str]:
    """Return the place and the fault of one of pydantic's errors."""
    # pydantic names the kind of an entry, which is not a key of the recipe
    field: FieldPath = tuple(step for step in error["loc"] if step not in (FILE, SOURCE))
    known = next((lines[field[:end]] for end in range(len(field), -1, -1) if field[:end] in lines), None)
    message = error_in_words(error, Recipe)
    # the value of these is the whole section around the field: too much to show
    whole_section = error["type"] in ("missing", "value_error") and isinstance(error["input"], dict)
    value = shown(error["input"])
    found = message if whole_section or message.startswith(value) else f"{value}: {message}"
    return at_field(recipe if known is None else replace(recipe, line=known), field), found


@dataclass(frozen=True)
class PinnedBase:
    """The pin that was written into a recipe.

    Attributes:
        key: `base.revision`, or `base.weights_sha256` of a local base.
        before: The value before; empty if the key was missing.
        value: The value now.
        source: The source of the value: `hub`, `cache`, `given` (see `FoundCommit`), or `weights` of a local base.
        name: The branch or tag; empty for a local base.
    """

    key: str
    before: str
    value: str
    source: Literal["hub", "cache", "given", "weights"]
    name: str = ""


def pin_recipe(path: Path, branch: str | None = None) -> PinnedBase:
    """Write the commit of a recipe's base into the recipe, or the hash of a local base's weights.

    Args:
        path: The recipe.
        branch: The branch or tag to pin; None for the recipe's own, or `main`; a recipe that has a pin is then not
            changed.

    Raises:
        RecipeError: If the recipe cannot be read, or has a fault other than its pin.
        PinError: If the commit cannot be determined, or a local base has no weights.
    """
    data, _ = read_yaml(path)
    base = data.get("base") if isinstance(data, dict) else None
    if not isinstance(base, dict) or not (base.get("repo") or base.get("path")):
        expected = "a recipe with base: {repo: owner/name} or base: {path: FOLDER}"
        raise RecipeError("there is no base to pin", place=Place.of(path) / "base", expected=expected)
    if base.get("repo"):
        pinned = _of_repository(str(base["repo"]), base.get("revision"), branch, path)
        after = "repo"
    else:
        # with any hash: the recipe says which folder its path means
        sound = parse_recipe(
            {**data, "base": {**base, "weights_sha256": "0" * 64}}, folder=path.parent, place=Place.of(path)
        )
        found = BaseFolder(sound.base.path or path.parent).weights_sha256
        pinned = PinnedBase("base.weights_sha256", str(base.get("weights_sha256") or ""), found, "weights")
        after = "path"
    key = pinned.key.rpartition(".")[2]
    # with its pin, the recipe must be valid: nothing is written into a file with another fault
    parse_recipe({**data, "base": {**base, key: pinned.value}}, folder=path.parent, place=Place.of(path))
    if pinned.value != pinned.before:
        write_text(path, with_base_value(path.read_text(encoding="utf-8-sig"), key, pinned.value, after))
    return pinned


def _of_repository(repo: str, before: Any, branch: str | None, path: Path) -> PinnedBase:
    """Return the pin of a Hub base: a commit in the recipe stays, unless a branch is named."""
    written = "" if before is None else str(before)
    is_pinned = len(written) == 40 and not set(written) - set("0123456789abcdef")
    if is_pinned and branch is None:
        return PinnedBase("base.revision", written, written, "given", written)
    name = branch or written or "main"
    pin_arguments = shlex.quote(str(path)) + (f" --branch {shlex.quote(branch)}" if branch else "")
    found = find_commit(repo, name, place=Place.of(path).within("base", "revision"), pinned=pin_arguments)
    return PinnedBase("base.revision", written, found.commit, found.source, name)


def resolve_base(base: Base, *, weights: bool = True) -> BaseFolder:
    """Return the base checkpoint, its pin checked.

    Args:
        base: The recipe's section.
        weights: Whether the weights of a Hub base are needed; those of a local base always are.

    Raises:
        PinError: If the base is missing, or its weights are not the pinned ones.
    """
    if base.path is None:
        return BaseFolder(resolve(str(base.repo), str(base.revision), weights=weights))
    folder = BaseFolder(base.path)
    found = folder.weights_sha256
    if found != base.weights_sha256:
        raise PinError(
            f"the weights of {base.path} have SHA-256 {found}",
            place=NOWHERE.within("base", "weights_sha256"),
            expected=str(base.weights_sha256),
            next_step=f"Pin these weights or restore those; the hash is printed by: {base_weights_command(base.path)}",
        )
    return folder
