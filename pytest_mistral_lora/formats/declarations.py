"""The data files of a path: a file, a folder, or the configuration of a trainer that declares them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.reading import read_bounded, read_json
from pytest_mistral_lora.chat.reading.plain_yaml import PlainLoader
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.formats.importers import importers, is_yaml, may_declare


def declared_sources(path: Path, names: Collection[str] = ()) -> tuple[list[Source], list[str]]:
    """Return the sources of a path, and remarks on the settings of a configuration that are ignored.

    Args:
        path: A data file, a folder, or a file in which a trainer of `importers` declares rows.
        names: Data sets to take, for a trainer whose data sets have names; empty for all that it trains on.

    Raises:
        InputError: If a file is missing, or a declaration is not supported.
    """
    config = _configuration(path)
    if config is not None:
        for importer in importers().values():
            if importer.declares_rows(path, config) and (importer.names_in or not names):
                return importer.sources(path, config, names)
    if names:
        expected = " or ".join(filter(None, (importer.names_in for importer in importers().values())))
        raise InputError(f"declares no data set {', '.join(names)}", place=str(path), expected=expected)
    if config is not None and is_yaml(path):
        raise _nothing_declared(path, config)
    return [Source(file) for file in source_files(path)], []


def _configuration(path: Path) -> Mapping[Any, Any] | None:
    """Return the content of a file that may declare rows; None for data.

    Raises:
        InputError: If it is not YAML, or no mapping.
    """
    if not is_yaml(path):
        data = read_json(path) if may_declare(path) and path.is_file() else None
        return data if isinstance(data, Mapping) else None
    try:
        config = yaml.load(read_bounded(path).decode(), Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}", place=str(path)) from error
    if not isinstance(config, Mapping):
        raise InputError(f"is {kind_of(config)}", place=str(path), expected="a configuration of a trainer")
    return config


def _nothing_declared(path: Path, config: Mapping[Any, Any]) -> InputError:
    if "base" in config and "data" in config:
        return InputError("this is a recipe of mistral-lora", place=str(path), next_step="Name its data.train instead.")
    keys = ", ".join(map(str, list(config)[:8]))
    ways = [f"`{importer.rows_key}` of {importer.title}" for importer in importers().values()]
    ways = [*ways[:-1], f"or {ways[-1]}"] if len(ways) > 1 else ways
    expected = ", ".join(ways) or "a file or a folder of data"
    return InputError(f"no data is declared (keys {keys})", place=str(path), expected=expected)
