"""One fault is one cause, with what follows from it below it; a second fault beside it stands for itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cut_sentencepiece import cut_v3
from dataset_recipes import said, write_rows

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.groups import FindingGroups
from pytest_mistral_lora.conformance.manifest import _folded
from pytest_mistral_lora.judging import judge
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.verify import FieldCheck

SPACE = ("'[INST] '", "'[INST]'")
WORD = ("{{- content -}}", "{{- content | replace('Zanzibar', 'Mombasa') -}}")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with mistral-common's template."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    file = cut_v3()
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("faults", "standing"),
    [
        ((SPACE,), [("ML004", 3)]),
        ((WORD,), [("ML603", 0)]),
        ((SPACE, WORD), [("ML004", 3), ("ML603", 0)]),
    ],
    ids=["of each row", "of one row", "both"],
)
def test_a_fault_of_a_template_is_one_cause_with_the_rows_that_it_breaks(
    faults: tuple[tuple[str, str], ...], standing: list[tuple[str, int]], sound: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    for right, wrong in faults:
        assert right in text
        text = text.replace(right, wrong)
    template.write_text(text)
    rows = [said("Where is it?", "In Zanzibar."), said("a", "b"), said("c", "d")]
    verdict = judge(folder, write_rows(tmp_path / "rows.jsonl", rows))
    assert [(finding.rule, dict(finding.covers).get("ML603", 0)) for finding in verdict.findings] == standing
    # the exit code and the data of a report have every finding
    found = [finding for check in verdict._report["checks"] for finding in check["findings"]]
    assert sum(finding["rule"] == "ML603" for finding in found) == 3 * (SPACE in faults) + (WORD in faults)
    assert not verdict


def test_an_effect_of_one_cause_is_not_counted_at_another_of_its_rule() -> None:
    causes = FindingGroups()
    for shape in ("a → b", "c → d"):
        # they name their own rule, and stand for themselves
        causes.add(Finding("ML004", "template", shape=shape, effect_of="ML004"), "model::template::case")
    for shape in ("c → d", "c → d", "e → f"):
        causes.add(Finding("ML603", "row", shape=shape, effect_of=f"ML004 {shape}"), "rows::dataset::case")
    found = [(cause.simplest.rule, cause.simplest.shape, cause.shown.covers) for cause in causes]
    assert found == [("ML004", "c → d", (("ML603", 2),)), ("ML004", "a → b", ()), ("ML603", "e → f", ())]


@pytest.mark.parametrize(("is_there", "standing"), [(True, ("ML706", 3)), (False, ("ML602", 4))])
def test_what_follows_from_another_or_a_missing_data_file_is_one_cause(
    is_there: bool, standing: tuple[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    if is_there:
        write_rows(file, [said("a", "b")])
    names = ("dataset_sha256", "dataset.files[0].sha256", "dataset.rows_sha256", "masking.ids_sha256")
    fields = [FieldCheck(name, "mismatch", "a" * 64, "b" * 64, Place.of(file)) for name in names]
    # an edit beside the rows is a fault of its own
    fields.append(FieldCheck("seed", "mismatch", 1, 2, Place.of(tmp_path / "manifest.json")))
    found = [*_folded(fields), *([] if is_there else [Finding("ML602", "No such file", Place.of(file))])]
    causes = FindingGroups()
    for finding in found:
        causes.add(finding, "recipe.yaml::manifest::dataset")
    rules = [(cause.simplest.rule, sum(count for _, count in cause.shown.covers)) for cause in causes]
    assert rules == [standing, ("ML702", 0)]
    # every finding stays in the outcome of its check
    assert [finding.rule for finding in found].count("ML706") == 4
