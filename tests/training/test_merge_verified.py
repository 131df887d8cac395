"""A merged folder is verified and judged by its parent and its own answers, and a change of it is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from declared import declare
from safetensors.torch import load_file, save_file
from suite_outcomes import suite_outcomes
from tiny_runs import CONVERSATIONS, write_rows

from pytest_mistral_lora import cli
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import listing
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import MergedModel
from pytest_mistral_lora.training.run import RunResult

WEIGHTS = "model.safetensors"


def test_verify_knows_the_parent(run: RunResult, merged: MergedModel, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    facts = verify(merged.output, base=run.base_folder, dataset=rows, parent=run.output)
    assert {fact.state for fact in facts} == {"match"}
    assert {"parent.manifest_sha256", "parent.tensors_sha256", "masking.ids_sha256"} <= {fact.name for fact in facts}
    alone = {fact.name: fact.state for fact in verify(merged.output)}
    assert alone["parent.manifest_sha256"] == alone["parent.tensors_sha256"] == "not available"
    assert cli.main(["verify", str(merged.output), "--parent", str(run.output)]) == 0


def test_an_element_that_is_not_the_sum_is_a_mismatch_whatever_is_declared(
    run: RunResult, merged: MergedModel, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    tensors, name = load_file(copy / WEIGHTS), "model.layers.1.self_attn.o_proj.weight"
    tensors[name][7, 7] *= 1 + 2**-20
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    files = {one: entry for one, entry in listing(copy).items() if one in merged.manifest["files"]}
    declare(copy, {**merged.manifest, "files": files})
    wrong = [one for one in verify(copy, base=run.base_folder, parent=run.output) if one.state == "mismatch"]
    assert [one.name for one in wrong] == ["parent.correctly_rounded"]
    assert re.search(rf"{re.escape(name)} is not the rounded sum .* in 1 of", wrong[0].found)
    alone = {one.name: (one.state, one.found) for one in verify(copy, parent=run.output)}
    assert alone["parent.correctly_rounded"] == ("not available", "no base given")
    older = {key: value for key, value in merged.manifest["parent"].items() if key != "correctly_rounded"}
    declare(copy, {**merged.manifest, "files": files, "parent": older})
    facts = verify(copy, base=run.base_folder, parent=run.output)
    assert "parent.correctly_rounded" not in {one.name for one in facts}


def test_another_parent_or_a_changed_bit_is_a_mismatch(adapter: Path, merged: MergedModel) -> None:
    file = adapter / "manifest.json"
    file.write_text(file.read_text() + "\n")
    states = {fact.name: fact.state for fact in verify(merged.output, parent=adapter)}
    assert (states["parent.manifest_sha256"], states["parent.tensors_sha256"]) == ("mismatch", "match")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert {fact.name: fact.state for fact in verify(merged.output, parent=adapter)}[
        "parent.tensors_sha256"
    ] == "mismatch"


def test_whatever_is_changed_in_the_folder_is_found(merged: MergedModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    for name in (*merged.manifest["files"], "manifest.json"):
        before = (copy / name).read_bytes()
        at = len(before) // 2
        (copy / name).write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        try:
            assert "mismatch" in {fact.state for fact in verify(copy)}, name
        except InputError:
            assert name == "manifest.json"
        (copy / name).write_bytes(before)
    assert "mismatch" not in {fact.state for fact in verify(copy)}


def test_answers_of_the_adapter_are_not_the_merged_models_own(
    run: RunResult, merged: MergedModel, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    shutil.copytree(run.output / TRANSCRIPTS, copy / TRANSCRIPTS, dirs_exist_ok=True)
    findings = [finding for outcome in suite_outcomes([copy]) for finding in outcome.findings]
    assert {finding.rule for finding in findings} == {"ML702", "ML803"}
    assert any("the model's tensors have SHA-256" in finding.found for finding in findings)


def test_smoke_needs_no_base(
    merged: MergedModel, run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["smoke", str(merged.output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 exact, 0 equivalent, 0 different; fp32 on cpu"
    assert cli.main(["smoke", str(merged.output), "--golden", str(run.output / TRANSCRIPTS)]) == 0
    *_, remark, verdict = capsys.readouterr().out.splitlines()
    assert "recorded with another model" in remark
    assert verdict == "5 exact, 0 equivalent, 0 different; fp32 on cpu"
    rows = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:1])
    assert cli.main(["smoke", str(merged.output), "--rows", str(rows), "--json"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert (answered["completions"][0]["equal"], "adapter_effect" in answered) == (True, False)
    assert cli.main(["smoke", str(merged.output), "--base", str(run.base_folder)]) == 2
    error = capsys.readouterr().err
    assert f"{merged.output}: " in error
    assert "which needs no base" in error


def test_a_merged_model_that_is_changed_is_different(merged: MergedModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, copy / WEIGHTS)
    comparison = compare(copy)
    assert (comparison.passed, comparison.recorded_adapter, comparison.kind) == (False, False, "merged")
