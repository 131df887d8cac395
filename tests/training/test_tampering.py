"""Nothing that is changed after a run passes: every value of the manifest, every file, each in turn."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.manifest import MANIFEST, sealed
from pytest_mistral_lora.records.notes import with_author_section
from pytest_mistral_lora.records.verify import adapter_fields, folder_fields, verify
from pytest_mistral_lora.training.run import RunResult

Path_ = tuple[str | int, ...]


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
        adapter = AdapterFolder(folder)
        adapter.require_manifest()
    except InputError:
        return True
    return any(fact.state == "mismatch" for fact in chain(folder_fields(adapter), adapter_fields(adapter)))


def test_no_value_can_be_changed(run: RunResult, adapter: Path) -> None:
    for path in leaves(run.manifest):
        write_json(adapter / MANIFEST, with_value(run.manifest, path))
        assert is_found(adapter), name_of(path)


def test_no_value_can_be_removed(run: RunResult, adapter: Path) -> None:
    for path in [(key,) for key in run.manifest]:
        write_json(adapter / MANIFEST, {key: value for key, value in run.manifest.items() if (key,) != path})
        assert is_found(adapter), name_of(path)


@pytest.mark.slow
def test_no_value_can_be_changed_in_a_manifest_that_is_sealed_again(
    run: RunResult, adapter: Path, dataset: Path
) -> None:
    assert verdicts(adapter, run.base_folder, dataset) == {"match"}
    for path in set(leaves(run.manifest)) - {("seal",)}:
        write_json(adapter / MANIFEST, sealed(with_value(run.manifest, path)))
        # of a version that is not ours, and a probe that is not ours, nothing can be said: that is no match either
        assert is_found(adapter) or verdicts(adapter, run.base_folder, dataset) != {"match"}, name_of(path)


def test_no_file_can_be_exchanged_with_another_runs(run: RunResult, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.output, tmp_path / "other"))
    for file in (file for file in other.rglob("*") if file.is_file()):
        file.write_bytes(file.read_bytes()[:-2] + b" " + file.read_bytes()[-2:])
        name = file.relative_to(other)
        shutil.copy(file, adapter / name)
        assert is_found(adapter), name
        shutil.copy(run.output / name, adapter / name)
    assert not is_found(adapter)


def test_every_bit_of_the_manifest_counts(run: RunResult, adapter: Path) -> None:
    text = (adapter / MANIFEST).read_bytes()
    # a sample: every 31st byte, and each time another bit
    for at in range(0, len(text), 31):
        (adapter / MANIFEST).write_bytes(text[:at] + bytes([text[at] ^ 1 << at % 8]) + text[at + 1 :])
        assert is_found(adapter), text[at - 20 : at + 20]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def reseal(file: Path, **changes: Any) -> None:
    write_json(file, sealed({**json.loads(file.read_text()), **changes}))


def of_another_run(folder: Path, name: str) -> None:
    """Put in the file that a run with another seed would have left."""
    edit(folder / name, '"seed": 0', '"seed": 1')
    if name == MANIFEST:
        reseal(folder / name)


CHANGES: Mapping[str, Callable[[Path, Path, Path], object]] = {
    "a bit of a file": lambda folder, base, rows: flip(folder / "tokenizer.model.v3"),
    "a file is missing": lambda folder, base, rows: (folder / "rendered_row.json").unlink(),
    "an additional file": lambda folder, base, rows: (folder / "model.safetensors").write_bytes(b""),
    "a file of another run": lambda folder, base, rows: edit(folder / "training_log.jsonl", '"step": 2', '"step": 3'),
    "a value of the manifest": lambda folder, base, rows: edit(folder / MANIFEST, '"seed": 0', '"seed": 1'),
    "a value of the manifest, and the seal made again": lambda folder, base, rows: reseal(folder / MANIFEST, seed=1),
    "the manifest of another run": lambda folder, base, rows: of_another_run(folder, MANIFEST),
    "a file that the manifest lists outside of the folder": lambda folder, base, rows: edit(
        folder / MANIFEST, '"file": "chat_template.jinja"', '"file": "../chat_template.jinja"'
    ),
    "a word of DECISION.md": lambda folder, base, rows: edit(folder / "DECISION.md", "40 of 5 rows", "41 of 5 rows"),
    "the author's part of DECISION.md": lambda folder, base, rows: (folder / "DECISION.md").write_text(
        with_author_section((folder / "DECISION.md").read_text(), "We had to.")
    ),
    "a letter of the data": lambda folder, base, rows: edit(rows, "Guten Tag!", "Guten Tag?"),
    "a weight of the base": lambda folder, base, rows: flip(base / "model.safetensors"),
    "the form of the adapter's configuration": lambda folder, base, rows: edit(
        folder / "adapter_config.json", "\n}", "\n\n}"
    ),
    "files that Git and the Hub add": lambda folder, base, rows: (folder / ".gitattributes").write_text("* -text"),
}


def table() -> dict[str, str]:
    """Return the table of docs/records.md: the verdict of `verify` for each change."""
    text = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")
    lines = text.partition("| change after the run")[2].partition("\n\n")[0].splitlines()[2:]
    return {change: verdict for _, change, verdict, _ in (re.split(r"\s*\|\s*", line) for line in lines)}


def test_the_table_of_the_docs_has_every_change() -> None:
    assert list(table()) == list(CHANGES)


@pytest.mark.parametrize("what", CHANGES)
def test_the_docs_say_what_becomes_of_a_change(
    what: str, run: RunResult, adapter: Path, dataset: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(run.base_folder, tmp_path / "base"))
    CHANGES[what](adapter, base, dataset)
    found = verdicts(adapter, base, dataset)
    assert table()[what] in found
    assert table()[what] != "match" or found == {"match"}
