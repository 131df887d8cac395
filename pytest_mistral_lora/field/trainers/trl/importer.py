"""The configurations of TRL as sources of rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.trainers.trl.entry import TrlEntry
from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.formats.importers import (
    Importer,
    declared_files,
    declared_path,
    declared_split,
    remarks_on,
    require_form,
    require_no_keys,
)
from pytest_mistral_lora.places import Place

_REFUSED = ("columns", "data_dir")
_UNKNOWN = frozenset({"dataset", "stage", "finetuning_type", "template", "dataset_dir", "cutoff_len", "tokenized_path"})
"""Keys that TRL's parser refuses, of LLaMA-Factory, whose other keys are those of transformers, too."""


class TrlImporter(Importer):
    """A YAML file that names one data set in `dataset_name`, or a mixture of some in `datasets`.

    The formats of TRL are recognised by their keys: no entry declares one.
    """

    title, model_key, rows_key = "TRL", "model_name_or_path", "dataset_name"
    own_keys = frozenset({"dataset_name", "datasets", "use_peft", "lora_r", "learning_rate", "bf16", "max_steps"})

    def recognises(self, config: Mapping[Any, Any]) -> bool:
        """Return whether a mapping has keys of TRL, and none that it refuses."""
        return super().recognises(config) and not _UNKNOWN & config.keys()

    def declares_rows(self, path: Path, config: Mapping[Any, Any]) -> bool:
        """Return whether a configuration names a data set or a mixture of some."""
        if isinstance(entries := config.get("datasets"), list):
            has_type = any("type" in entry for entry in entries if isinstance(entry, Mapping))
            return self.model_key in config and not has_type
        return isinstance(config.get("dataset_name"), str)

    def sources(self, path: Path, config: Mapping[Any, Any], names: Collection[str]) -> tuple[list[Source], list[str]]:
        """Return the files of the data set, or of all in a mixture."""
        remarks = remarks_on(path, config, ("test_datasets", "dataset_test_split"), "is not imported")
        entries = config.get("datasets")
        if isinstance(entries, list):
            return _mixture(path, entries), remarks
        folder = declared_path(path, config["dataset_name"])
        split = declared_split(config, "dataset_train_split", path)
        return [Source(file) for file in source_files(folder, split)], remarks


TRL = TrlImporter()


def _mixture(path: Path, entries: list[Any]) -> list[Source]:
    sources: list[Source] = []
    for index, entry in enumerate(entries):
        place = Place.of(path).within("datasets", index)
        require_form(TrlEntry, entry, place)
        require_no_keys(entry, _REFUSED, place)
        sources += [Source(file) for file in declared_files(path, entry, place)]
    if not sources:
        raise InputError("datasets: is empty", place=str(path), expected="an entry with a `path`")
    return sources
