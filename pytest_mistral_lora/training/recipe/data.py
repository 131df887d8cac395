"""The section of a recipe that names rows: JSONL files, and data in other formats, converted while they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    model_validator,
)

from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.formats.layouts import KNOWN_ROLES, MESSAGE_FIELDS, RECORD_FIELDS, Layout
from pytest_mistral_lora.formats.recognition import FORMATS
from pytest_mistral_lora.formats.report import LOSSES
from pytest_mistral_lora.formats.sources import open_rows, row_files
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.training.recipe.reading import below
from pytest_mistral_lora.training.recipe.sections import (
    Number,
    ObjectiveWords,
    RecipePath,
    Section,
    SectionWithObjective,
)


def _one_of(names: Any) -> Any:
    """Return the validator and the schema of a name from a closed set."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return value

    return AfterValidator(check), Field(json_schema_extra={"enum": [*names]})


_Format = Annotated[str, *_one_of(FORMATS)]
_Loss = Annotated[str, *_one_of(LOSSES)]
_RecordField = Annotated[str, *_one_of(RECORD_FIELDS)]
_MessageField = Annotated[str, *_one_of(MESSAGE_FIELDS)]
_Role = Annotated[str, *_one_of(dict.fromkeys(KNOWN_ROLES.values()))]


class SourceLayout(Section):
    """The places of a row's fields in records with custom keys."""

    keys: dict[_RecordField, str] = Field(
        default_factory=dict, description=f"Keys of a record, by field: {', '.join(RECORD_FIELDS)}."
    )
    message_keys: dict[_MessageField, str] = Field(
        default_factory=dict, description=f"Keys of a message, by field: {', '.join(MESSAGE_FIELDS)}."
    )
    roles: dict[str, _Role] = Field(default_factory=dict, description="Our names of roles, by their names in the data.")
    trained: tuple[_Role, ...] | None = Field(
        default=None, description="Our names of the roles that are trained on; default: the assistant."
    )
    drop_system: StrictBool = Field(default=False, description="Whether system messages are left out.")
    joined: StrictBool = Field(
        default=False, description="Whether chunks of text are one text, without a blank line between them."
    )
    templates: tuple[str, str] | None = Field(
        default=None, description="The user's message with an input and without one, such as `{instruction} {input}`."
    )
    system: str = Field(default="", description="The system prompt of records that have none.")


class DataSource(SectionWithObjective):
    """Rows with an objective; data in any format that `mistral-lora import` reads, converted while it is read."""

    path: RecipePath = Field(description="A data file, a folder, or the configuration of a trainer that declares it.")
    objective: ObjectiveWords | None = Field(
        default=None, description="Tokens of its rows that have a loss; default: `training.objective`."
    )
    format: _Format | None = Field(default=None, description="Format of the records; default: by their keys.")
    dataset: tuple[str, ...] = Field(default=(), description="Data sets of a dataset_info.json; default: the only one.")
    lossy: tuple[_Loss, ...] = Field(
        default=(),
        description="Losses that are allowed, as for `mistral-lora import --lossy`; any other is an error.",
    )
    layout: SourceLayout | None = Field(
        default=None, description="Keys of the records, if they are not those of the format."
    )

    @model_validator(mode="after")
    def _layout_of_a_format(self) -> Self:
        if self.layout is not None and self.format is None:
            raise ValueError("a layout without its format; expected format beside layout")
        return self

    def files(self, *, is_held_out: bool) -> list[DataFile]:
        """Return the data files, without their objective.

        Raises:
            InputError: If there are no data files, or a declaration cannot be followed.
        """
        if not self.model_fields_set - {"path", "objective"} and self.objective is not None:
            # rows need no conversion to have an objective
            return [replace(file, is_held_out=is_held_out) for file in row_files(self.path)]
        layout = Layout()
        if self.format is not None:
            declared = {} if self.layout is None else self.layout.model_dump(exclude_defaults=True)
            layout = Layout.from_json(self.format, declared)
        return open_rows(self.path, layout=layout, names=self.dataset, lossy=self.lossy, is_held_out=is_held_out)


FILE, SOURCE = "a file", "a source"
"""The two kinds of entries under `data.train` and `data.eval`."""


def _kind(value: Any) -> str:
    return SOURCE if isinstance(value, dict | DataSource) else FILE


Entry = Annotated[Annotated[RecipePath, Tag(FILE)] | Annotated[DataSource, Tag(SOURCE)], Discriminator(_kind)]


class Data(Section):
    """Your rows, and the part of them to hold out."""

    train: tuple[Entry, ...] = Field(
        description="Your chat JSONL files, in order; data in another format as `{path: sharegpt.json}`, rows with an "
        "objective of their own as `{path: tools.jsonl, objective: last-answer}`.",
        min_length=1,
    )
    eval: tuple[Entry, ...] = Field(default=(), description="Files that are never trained on, named like train.")
    held_out: Number = Field(
        default=0.0,
        description="Fraction of the training rows to hold out, from 0 to below 1; each row's own hash decides, so a "
        "row never changes sides when others come or go.",
        ge=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.held_out:
            raise ValueError("expected either eval files or a held_out fraction, not both")
        return self

    @property
    def paths(self) -> tuple[Path, ...]:
        """The named paths, those to train on first."""
        return tuple(entry if isinstance(entry, Path) else entry.path for entry in (*self.train, *self.eval))

    def objectives(self, objective: Objective) -> Iterator[tuple[Place, Objective]]:
        """Yield the objective of each entry, and the key that declares it.

        Args:
            objective: The objective of entries without one.
        """
        for key, entries in (("train", self.train), ("eval", self.eval)):
            yield from objectives_of(NOWHERE.within("data", key), entries, objective)

    def files(self, objective: Objective) -> list[DataFile]:
        """Return the data files in order, those to train on first; a folder stands for its files.

        Args:
            objective: The objective of entries without one.

        Raises:
            RecipeError: If an entry cannot be opened. An unreadable file is reported when it is read.
        """
        held_out = opened(NOWHERE.within("data", "eval"), self.eval, objective, is_held_out=True)
        return [*self.train_files(objective), *held_out]

    def train_files(self, objective: Objective) -> list[DataFile]:
        """Return the files of `files` that are not held out as a whole.

        Raises:
            RecipeError: As `files`.
        """
        return list(opened(NOWHERE.within("data", "train"), self.train, objective, is_held_out=False))


def objectives_of(
    key: Place, entries: Sequence[Path | DataSource], objective: Objective
) -> Iterator[tuple[Place, Objective]]:
    """Yield the objective of each entry of a list of data, and the key that declares it.

    Args:
        key: The key of the list.
        entries: The list.
        objective: The objective of entries without one.
    """
    for index, entry in enumerate(entries):
        if isinstance(entry, Path) or entry.objective is None:
            yield NOWHERE.within("training", "objective"), objective
        else:
            yield key.within(str(index), "objective"), entry.objective


def opened(
    key: Place, entries: Sequence[Path | DataSource], objective: Objective, *, is_held_out: bool
) -> Iterator[DataFile]:
    """Yield the files of a list of data; a folder stands for its files.

    Args:
        key: The key of the list.
        entries: The list.
        objective: The objective of entries without one.
        is_held_out: Whether the files are held out as a whole.

    Raises:
        RecipeError: If an entry cannot be opened.
    """
    for index, entry in enumerate(entries):
        try:
            if isinstance(entry, Path):
                yield DataFile(entry, is_held_out, objective=objective)
            else:
                for file in entry.files(is_held_out=is_held_out):
                    yield replace(file, objective=entry.objective or objective)
        except InputError as error:
            place = below(key.within(str(index)), error.place)
            raise RecipeError(error.found, place=place, expected=error.expected, next_step=error.next_step) from error
