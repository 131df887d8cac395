"""Nothing that is changed after a run passes: every value of the manifest, every file, each in turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_rows

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.manifest import MANIFEST, load, sealed
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.records.verify.adapter import adapter_facts
from pytest_mistral_lora.records.verify.folder import folder_facts
from pytest_mistral_lora.training.run import RunResult

Path_ = tuple[str | int, ...]


@pytest.fixture
def folder(run: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.output, tmp_path / "copy"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of each value that has no parts, empty objects and lists among them."""
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if not parts:
        yield path
    for key, part in parts:
        yield from leaves(part, (*path, key))


def changed(value: Any) -> Any:
    """Return another value of the same kind, so that the schema finds as little as possible."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        is_hash = len(value) in (40, 64) and set(value) <= set("0123456789abcdef")
        return value[:-1] + ("0" if value[-1] != "0" else "1") if is_hash else f"{value}x"
    if isinstance(value, dict):
        return {"x-changed": 1}
    return ["x"] if isinstance(value, list) else 1


def with_value(data: Mapping[str, Any], path: Path_) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(data))
    place: Any = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = changed(place[path[-1]])
    return copy


def name_of(path: Path_) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def verdicts(folder: Path, base: Path | None = None, dataset: Path | None = None) -> set[str]:
    """Return the states of all facts; `refused` for a manifest that is none."""
    try:
        return {fact.state for fact in verify(folder, base=base, dataset=dataset)}
    except InputError:
        return {"refused"}


def is_found(folder: Path) -> bool:
    """Say whether the folder alone shows a change; it stops at the first fact that does."""
    try:
        data = load(folder).data
    except InputError:
        return True
    return any(fact.state == "mismatch" for fact in chain(folder_facts(folder, data), adapter_facts(folder, data)))


def test_no_value_can_be_changed(run: RunResult, folder: Path) -> None:
    for path in leaves(run.manifest):
        write_json(folder / MANIFEST, with_value(run.manifest, path))
        assert is_found(folder), name_of(path)


def test_no_value_can_be_removed(run: RunResult, folder: Path) -> None:
    for path in [(key,) for key in run.manifest]:
        write_json(folder / MANIFEST, {key: value for key, value in run.manifest.items() if (key,) != path})
        assert is_found(folder), name_of(path)


def test_no_value_can_be_changed_in_a_manifest_that_is_sealed_again(
    run: RunResult, folder: Path, dataset: Path
) -> None:
    assert verdicts(folder, run.base_folder, dataset) == {"match"}
    for path in set(leaves(run.manifest)) - {("seal",)}:
        write_json(folder / MANIFEST, sealed(with_value(run.manifest, path)))
        # of a version that is not ours, and a probe that is not ours, nothing can be said: that is no match either
        assert is_found(folder) or verdicts(folder, run.base_folder, dataset) != {"match"}, name_of(path)


def test_no_file_can_be_exchanged_with_another_runs(run: RunResult, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.output, tmp_path / "other"))
    for file in (file for file in other.rglob("*") if file.is_file()):
        file.write_bytes(file.read_bytes()[:-2] + b" " + file.read_bytes()[-2:])
        name = file.relative_to(other)
        shutil.copy(file, folder / name)
        assert is_found(folder), name
        shutil.copy(run.output / name, folder / name)
    assert not is_found(folder)


def test_every_bit_of_the_manifest_counts(run: RunResult, folder: Path) -> None:
    text = (folder / MANIFEST).read_bytes()
    for at in range(0, len(text), 7):
        (folder / MANIFEST).write_bytes(text[:at] + bytes([text[at] ^ 1 << at % 8]) + text[at + 1 :])
        assert is_found(folder), text[at - 20 : at + 20]
