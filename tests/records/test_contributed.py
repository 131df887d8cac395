"""Goldens of a tokenizer file that is not shipped: recorded by its owner, used for it alone, checked as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance import template
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.user_goldens import rendering_checks
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.contributed import CONTRIBUTED, PROVENANCE, find_set, read_set, record_set
from pytest_mistral_lora.records.goldens import goldens_folder, packaged_cases

NEW = {"thinking", "thinking-call", "effort-high", "response-format", "result-chunks", "call-ids-of-any-form"}


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own tokenizer file, with few words."""
    return write_derived("derived-v15-schema", tmp_path_factory.mktemp("own"), words=1000)


@pytest.fixture(scope="module")
def recorded(own_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of goldens with the set of that file."""
    folder = tmp_path_factory.mktemp("goldens")
    assert record_set(Oracle(own_file), folder, None)[1] == "created"
    return folder


@pytest.fixture
def goldens(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the recorded folder, which a test may break."""
    return Path(shutil.copytree(recorded, tmp_path / "goldens"))


def home(folder: Path) -> Path:
    [found] = (folder / CONTRIBUTED).iterdir()
    return found


def settings(folder: Path, *, update: bool = False) -> Settings:
    return Settings(1, None, "cpu", True, (folder,), update, folder)


def findings(file: Path, folder: Path) -> list[Finding]:
    checks = template.checks(Target("own", file), settings(folder))
    return [finding for check in checks for finding in check.run().findings]


def test_a_set_has_every_row_that_the_file_can_encode(own_file: Path, recorded: Path) -> None:
    oracle = Oracle(own_file)
    found = find_set(oracle.sha256, (recorded,))
    assert found is not None
    assert not isinstance(found, InputError)
    assert NEW <= found.goldens.keys() == {case.name for case in packaged_cases() if case.fits(oracle)}
    assert "thinking-system" not in found.goldens  # v15 refuses it
    provenance = json.loads((home(recorded) / PROVENANCE).read_text(encoding="utf-8"))
    assert provenance["tokenizer"] == {"file": "tekken.json", "version": "v15", "sha256": oracle.sha256}
    assert provenance["vocabulary"]["control_tokens"]["36"] == "[MODEL_SETTINGS]"
    assert "20" not in provenance["vocabulary"]["control_tokens"]  # a filler
    assert found.text.endswith("recorded from a file of unknown origin")


@pytest.mark.parametrize("text", ["[]", '{"cases": null}', "{"])
def test_a_damaged_provenance_is_not_written_over(text: str, own_file: Path, goldens: Path) -> None:
    (home(goldens) / PROVENANCE).write_text(text)
    with pytest.raises(InputError, match=r"provenance\.json"):
        record_set(Oracle(own_file), goldens, None)
    assert (home(goldens) / PROVENANCE).read_text() == text


def test_a_shipped_file_needs_no_set(tmp_path: Path) -> None:
    from pytest_mistral_lora.chat.oracle import shipped_tokenizer

    target = Target("own", shipped_tokenizer("spm-v3"))
    [check] = rendering_checks(target, settings(tmp_path, update=True))
    assert check.run().not_checked == "the packaged goldens of spm-v3 are those of this file"


def test_a_file_is_judged_by_its_set(own_file: Path, goldens: Path) -> None:
    assert findings(own_file, goldens) == []
    [check] = [c for c in template.checks(Target("own", own_file), settings(goldens)) if c.case == "recorded-set"]
    assert dict(check.run().facts)["goldens of"].endswith("recorded from a file of unknown origin")


def move_an_id(data: dict[str, Any]) -> None:
    data["input_ids"][3] += 1


def test_an_id_that_has_moved_is_a_finding(own_file: Path, goldens: Path) -> None:
    """As after an upgrade of mistral-common: the set is whole, and its ids are others than those of today."""
    _edit(home(goldens) / "thinking.json", move_an_id, in_provenance=True)
    [finding] = findings(own_file, goldens)
    assert finding.text().startswith("ML002 ")
    assert "thinking.json: mistral-common gives other ids than recorded" in finding.text()


def change_the_file(data: dict[str, Any]) -> None:
    data["tokenizer"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("name", "change", "in_provenance", "found"),
    [
        ("thinking.json", move_an_id, False, "it is not the file that provenance.json names"),
        ("thinking.json", change_the_file, True, "it is of another tokenizer file than provenance.json"),
        pytest.param(PROVENANCE, change_the_file, False, "it is of a tokenizer file 0000", marks=pytest.mark.slow),
        (PROVENANCE, lambda data: data.pop("source"), False, "not a provenance of contributed goldens: $.source"),
        pytest.param(
            PROVENANCE,
            lambda data: data.update(licence="mine"),
            False,
            '$.licence: "mine"; expected no such key',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PROVENANCE, lambda data: data["cases"].update(other="0" * 64), False, "No such file", marks=pytest.mark.slow
        ),
    ],
)
def test_a_set_that_is_not_whole_is_a_finding(
    name: str,
    change: Callable[[dict[str, Any]], Any],
    in_provenance: bool,
    found: str,
    own_file: Path,
    goldens: Path,
) -> None:
    _edit(home(goldens) / name, change, in_provenance=in_provenance)
    [finding] = findings(own_file, goldens)
    assert finding.rule == "ML001"
    assert found in finding.text()


def _edit(path: Path, change: Callable[[dict[str, Any]], Any], *, in_provenance: bool) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    if in_provenance:
        file = path.with_name(PROVENANCE)
        provenance = json.loads(file.read_text(encoding="utf-8"))
        provenance["cases"][path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
        file.write_text(json.dumps(provenance), encoding="utf-8")


def test_a_set_of_another_file_is_not_used(recorded: Path, tmp_path: Path) -> None:
    other = write_derived("derived-v15", tmp_path, words=1000)
    assert find_set(Oracle(other).sha256, (recorded,)) is None


def test_recording_again_changes_nothing_and_keeps_the_source(own_file: Path, goldens: Path) -> None:
    source = {"repository": "mistralai/Some-Model", "revision": "ab" * 20}
    record_set(Oracle(own_file), goldens, (source["repository"], source["revision"]))
    [check] = rendering_checks(Target("own", own_file), settings(goldens, update=True))
    assert check.case == CONTRIBUTED
    assert dict(check.run().facts) == {"golden": str(home(goldens)), "written": "unchanged", "orphan": False}
    assert read_set(home(goldens)).source == source


def test_a_packaged_set_is_whole_and_of_a_published_file() -> None:
    """Whoever contributes a set runs this test: derived files have no source, and are not taken."""
    for folder in (goldens_folder() / CONTRIBUTED).glob("*/"):
        found = read_set(folder)
        assert found.source is not None, f"{folder}: name the repository and the commit under source"
