"""The inputs of a new recipe: the base with its pin and its tokenizer, and the data with their format and faults."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.chunks.registry import types_in
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.row_files import scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, NoOracleError, PinError, RowError
from pytest_mistral_lora.formats.recognition import FORMATS
from pytest_mistral_lora.formats.report import Report, conversion_parts
from pytest_mistral_lora.formats.tool_calls import has_foreign_ids
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.starter.names import require_plain, yaml_text

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

ROWS = "rows.jsonl"
"""The file that a recipe reads if the user names none."""

_PLAIN = "rows (JSON Lines, `messages` with role/content)"
_SHOWN = 5
_MOST_SAMPLES = 5
_ENOUGH_SAMPLES = 3

Backend = Literal["mistral-common", "chat-template"]


@dataclass(frozen=True)
class ChosenBase:
    """The base of a recipe.

    Attributes:
        name: The repository's id, or the local folder as the recipe names it.
        title: The base and its pin, for people.
        lines: Its keys in the recipe, as lines of YAML.
        backend: The code that turns rows into ids.
        folder: The local folder with its tokenizer; None if this machine lacks it.
        local: Whether it is a local folder and not a repository of the Hub.
        missing: The reason why the pin or the tokenizer is missing; empty if neither is.
        pinned: Whether it has its pin.
    """

    name: str
    title: str
    lines: tuple[str, ...]
    backend: Backend = "mistral-common"
    folder: Path | None = None
    local: bool = False
    missing: str = ""
    pinned: bool = True


def choose_base(text: str, folder: Path) -> ChosenBase:
    """Return the base that a text names: a local checkpoint folder, or `OWNER/NAME[@BRANCH]` on the Hub.

    Args:
        text: The folder, relative to the working directory, or the repository.
        folder: The folder of the recipe.

    Raises:
        InputError: If it is neither, or a local folder lacks weights or a tokenizer that loads.
        PinError: If the Hub has no such repository, branch or tag.
    """
    path = Path(text)
    require_plain(text, Place.of("--base"))
    if path.is_dir():
        from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

        backend, digest, name = _backend(path), BaseFolder(path).weights_sha256, path_in_recipe(path, folder)
        lines = (f"  path: {yaml_text(name)}", f"  weights_sha256: {yaml_text(digest)}  # of model*.safetensors")
        title = f"{name}, weights with SHA-256 {digest[:12]}…"
        return ChosenBase(name, title, lines, backend, path, local=True)
    repo, _, branch = text.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/")) or path.exists():
        found = "is a file" if path.exists() else "is neither a folder nor the id of a Hub repository"
        raise InputError(found, place=f"--base {text}", expected="a checkpoint folder, or OWNER/NAME[@BRANCH]")
    return _of_hub(repo, branch or "main")


def base_of_recipe(recipe: Recipe) -> ChosenBase:
    """Return the base of an existing recipe."""
    base = recipe.base
    if base.path is not None:
        name, folder = str(base.name), base.path if base.path.is_dir() else None
        missing = "" if folder else f"there is no folder {base.path}"
        return ChosenBase(name, name, (), recipe.backend, folder, local=True, missing=missing)
    files, missing = _text_files(str(base.repo), str(base.revision))
    return ChosenBase(base.label, f"{base.repo} at {base.revision}", (), recipe.backend, files, missing=missing)


def _of_hub(repo: str, branch: str) -> ChosenBase:
    """Return a base of the Hub; if its commit cannot be determined, the recipe names the branch."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    from pytest_mistral_lora.checkpoint.pins import find_commit

    wrong = errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError
    try:
        found = find_commit(repo, branch, place=Place.of("--base"))
    except PinError as error:
        if isinstance(error.__cause__, wrong):
            raise
        page = f"{ENDPOINT}/{repo}/commits/{branch}"
        reason = f"{error.found}. Or write the commit from {page} into recipe.yaml, base.revision"
        to_do = "TO DO: its commit. Online, run: mistral-lora pin recipe.yaml"
        lines = (f"  repo: {yaml_text(repo)}", f"  revision: {yaml_text(branch)}  # {to_do}")
        return ChosenBase(repo, f"{repo}, not pinned", lines, missing=reason, pinned=False)
    files, missing = _text_files(repo, found.commit)
    when = "when it was last fetched" if found.source == "cache" else "when this file was written"
    comment = f"  # of your branch or tag, {when}" if found.commit != branch else ""
    lines = (f"  repo: {yaml_text(repo)}", f"  revision: {yaml_text(found.commit)}{comment}")
    title = f"{repo} at {found.commit}"
    backend: Backend = "mistral-common" if files is None else _backend(files)
    return ChosenBase(repo, title, lines, backend, files, missing=missing)


def _text_files(repo: str, commit: str) -> tuple[Path | None, str]:
    """Return the folder with configuration and tokenizer at a commit, or None and the reason."""
    from pytest_mistral_lora.checkpoint.pins import resolve

    try:
        return resolve(repo, commit, weights=False), ""
    except PinError as error:
        return None, str(error)


def _backend(folder: Path) -> Backend:
    """Return the backend that fits a checkpoint: its template, if no Mistral tokenizer applies.

    Raises:
        InputError: If the checkpoint has no tokenizer that loads.
    """
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    tokenizer = CheckpointTokenizer(folder)
    try:
        _ = tokenizer.oracle
    except NoOracleError as error:
        if tokenizer.has_template:
            return "chat-template"
        found = f"no Mistral tokenizer, and no chat template: {error.found}"
        raise InputError(found, place=str(folder), expected="tekken.json, tokenizer.model.vN or a template") from error
    return "mistral-common"


@dataclass(frozen=True)
class SeenRows:
    """A path with data, after one pass over it.

    Attributes:
        name: The path as the recipe names it.
        title: Its format, for people.
        format: The format to declare in the recipe; empty for chat rows, or for data that declares its format.
        converted: Whether its rows are converted while they are read.
        count: Number of good rows.
        bad: Number of rows or records that cannot be used.
        errors: The first of their errors.
        samples: A few rows: the first of each shape, and more if there are few shapes.
        foreign_ids: Number of good rows with a tool-call id that Mistral's tokenizers refuse.
        conversion: What was converted to read the rows, with the command that writes them; empty if nothing was.
    """

    name: str
    title: str
    format: str
    converted: bool
    count: int
    bad: int
    errors: tuple[RowError, ...]
    samples: tuple[Row, ...]
    foreign_ids: int = 0
    conversion: str = ""

    @property
    def entry(self) -> str | Mapping[str, str]:
        """Its entry under `data.train`."""
        if not self.converted:
            return self.name
        return {"path": self.name, "format": self.format} if self.format else {"path": self.name}


def path_in_recipe(path: Path, folder: Path) -> str:
    """Return a path as a recipe in a folder names it."""
    from pytest_mistral_lora.training.recipe.sections import written_path

    if not path.is_absolute() or path.is_relative_to(folder.resolve()):
        path = Path(os.path.relpath(path.absolute(), folder.resolve()))
    return written_path(path)


def look_at(path: Path, folder: Path) -> SeenRows:
    """Read all rows of a path once.

    Args:
        path: A data file, a folder, or a configuration that declares data.
        folder: The folder of the recipe.

    Raises:
        InputError: If the path is missing or not data, if its format is unknown, or if it has no usable row.
    """
    from pytest_mistral_lora.conformance.path_kinds import recognised
    from pytest_mistral_lora.formats.importers import may_declare
    from pytest_mistral_lora.formats.sources import open_rows, row_files

    require_plain(str(path), Place.of("ROWS"))
    declares = may_declare(path)
    title = "data that it declares"
    if not declares or not path.exists():
        found = recognised(path)
        if found.kind != "rows":
            raise InputError(f"this is {found.title}", place=str(path), expected="rows: chat JSONL, or another format")
        title = found.title
    name = path_in_recipe(path, folder)
    seen = seen_rows(name, title, row_files(path), declares=declares)
    if not seen.converted and (seen.bad or seen.foreign_ids):
        # the import gives rows of another service our fields and ids
        with suppress(InputError):
            imported = seen_rows(name, f"{title}, converted", open_rows(path))
            seen = imported if imported.bad < seen.bad + seen.foreign_ids else seen
    if not seen.count:
        reasons = "".join(f"\n  {error}" for error in seen.errors)
        raise InputError(f"no record is a row that can be used{reasons}", place=str(path))
    return seen


def seen_rows(name: str, title: str, files: Iterable[DataFile], *, declares: bool = False) -> SeenRows:
    """Read all rows of data files once.

    Raises:
        InputError: If a file cannot be read.
    """
    count, bad, foreign, format_name, converted = 0, 0, 0, "", False
    errors: list[RowError] = []
    samples: dict[tuple[Any, ...], Row] = {}
    firsts: list[Row] = []
    reports: list[Report] = []
    changes, first = Counter[str](), NOWHERE
    for file in files:
        for row in scan_rows(file):
            if isinstance(row, RowError):
                bad += 1
                errors += [row] if bad <= _SHOWN else []
            else:
                count += 1
                foreign += has_foreign_ids(row.messages)
                samples.setdefault(_shape(row), row)
                firsts += [row] if count <= _ENOUGH_SAMPLES else []
                changes.update(row.converted)
                first = first or (row.place if row.converted else NOWHERE)
        source: Any = file.source
        if source is not None:
            converted = True
            reports.append(source.report)
            layout = next(iter(source.report.layouts), None)
            # a format with the user's own keys is recognised again by its records
            is_plain = layout is not None and layout.format in FORMATS and not layout.keys
            format_name = str(source.report.layouts[0].format) if is_plain and not declares else ""
    # rows of one shape still differ in their words: a few are better than one
    kept = {row.canonical(): row for row in (*samples.values(), *firsts)}
    chosen = tuple(kept.values())[: max(len(samples), _ENOUGH_SAMPLES)][:_MOST_SAMPLES]
    conversion = "; ".join(conversion_parts(reports, changes, first))
    return SeenRows(name, title, format_name, converted, count, bad, tuple(errors), chosen, foreign, conversion)


def _shape(row: Row) -> tuple[Any, ...]:
    """Return the traits of a row that decide how it is rendered: roles, tools, types of chunks, and scripts."""
    roles = {message["role"] for message in row.messages}
    types = types_in(message.get("content") for message in row.messages)
    text = "".join(str(message.get("content")) for message in row.messages)
    keys = {key for message in row.messages for key in message} - {"role", "content"}
    sets = (frozenset(roles), frozenset(keys), frozenset(types))
    return len(row.messages) > 2, *sets, bool(row.tools), text.isascii(), "\n" in text


def example_text() -> str:
    """Return the file of rows for a repository without data."""
    return (Path(__file__).parent / "texts" / "example_rows.jsonl").read_text(encoding="utf-8")


def example_rows() -> SeenRows:
    """Return the rows of `example_text`, as `look_at` returns those of a file."""
    rows = tuple(parse_row(json.loads(line)) for line in example_text().splitlines())
    return SeenRows(ROWS, _PLAIN, "", converted=False, count=len(rows), bad=0, errors=(), samples=rows[:_MOST_SAMPLES])
