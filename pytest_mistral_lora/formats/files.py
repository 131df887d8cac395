"""Find the data files of a path: the file itself, or the files of a folder, a saved dataset, or its splits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.remedies import DATA_SUFFIXES
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import inside

_STATE = "state.json"
"""The file that lists the data files in a folder of `Dataset.save_to_disk`."""
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<of>\d{5})\..+")


def source_files(path: Path, split: str = "") -> list[Path]:
    """Return the data files of a path: the file itself, or the files of a folder in order.

    Args:
        path: The file or folder.
        split: The split to take from a folder with several, by the names of its files; empty for no choice.

    Raises:
        InputError: If a folder has no data files, several splits or kinds of files, or not the named split.
    """
    if not path.exists():
        # `owner/name` may be a data set of the Hub
        is_name = len(path.parts) == 2 and not path.is_absolute() and not path.suffix
        step = f"From the Hub: hf download --repo-type dataset {path} --local-dir data" if is_name else ""
        raise InputError("no such file or folder", place=str(path), next_step=step)
    if not path.is_dir():
        if split not in ("", "train"):
            raise InputError(f"split {split}: a file alone has none", place=str(path), expected="the split's own file")
        return [path]
    if (path / _STATE).is_file():
        return _saved_files(path)
    kind, found = ("splits", splits) if (splits := saved_splits(path)) else ("data files", _loose_files(path))
    if split:
        named = [file for file in found if re.match(rf"{re.escape(split)}([-_.]|$)", file.name)]
        if not named and split != "train":  # files without the name of a split are the split `train`
            expected = ", ".join(file.name for file in found[:8])
            raise InputError(f"no file of the split {split!r}", place=str(path), expected=expected)
        found = named or found
    if not found:
        raise InputError("has no data files", place=str(path), expected=", ".join(DATA_SUFFIXES))
    if _are_shards(found):
        return found
    if len(found) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in found[:8])
        raise InputError(
            f"has {len(found)} {kind}: {names}", place=str(path), next_step="Name those to import, in their order."
        )
    return source_files(found[0])


def every_file(path: Path) -> list[Path]:
    """Return all data files of a path, in order: the file itself, or the files of a folder, of every split and kind.

    Raises:
        InputError: If a folder of `save_to_disk` is damaged.
    """
    if not path.is_dir():
        return [path]
    if (path / _STATE).is_file():
        return _saved_files(path)
    splits = saved_splits(path)
    return [file for split in splits for file in _saved_files(split)] if splits else _loose_files(path)


def saved_splits(path: Path) -> list[Path]:
    """Return the folders of the splits in a folder of `DatasetDict.save_to_disk`; empty for another folder.

    Raises:
        InputError: If the folder is damaged.
    """
    file = path / "dataset_dict.json"
    if not file.is_file():
        return []
    names = [Path(str(split)).name for split in _listed(file, "splits")]
    if "" in names:
        raise InputError("a split without a name", place=str(file), expected="the name of a folder beside it")
    return [path / name for name in names]


def _saved_files(path: Path) -> list[Path]:
    """Return the data files of a folder of `Dataset.save_to_disk`."""
    listed = _listed(path / _STATE, "_data_files")
    # `inside` refuses a name that leaves the folder
    return [inside(path, str(entry.get("filename") if isinstance(entry, Mapping) else entry)) for entry in listed]


def _loose_files(path: Path) -> list[Path]:
    """Return the data files below a folder."""
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(DATA_SUFFIXES))
    # hidden files are caches of the Hub's client and of file managers
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [file for file in found if file.name not in ("dataset_info.json", "dataset_infos.json", _STATE)]


def _are_shards(found: Sequence[Path]) -> bool:
    """Return whether sorted files are the shards of one table, `train-00000-of-00002.parquet`, and complete."""
    matches = [_SHARD.fullmatch(path.name) for path in found]
    names = {(path.parent, match and match["name"]) for path, match in zip(found, matches, strict=True)}
    numbers = [(int(match["number"]), int(match["of"])) for match in matches if match]
    return len(names) == 1 and numbers == [(number, len(found)) for number in range(len(found))]


def _listed(path: Path, key: str) -> list[Any]:
    data = read_json(path)
    listed = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(listed, list):
        raise InputError(f"no list under {key!r}", place=str(path), expected="a folder of save_to_disk")
    return listed
