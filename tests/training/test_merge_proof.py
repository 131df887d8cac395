"""A merge is proven before its folder is there: in each dtype, by each kind of prompt, and not if weights are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora import cli
from pytest_mistral_lora.errors import MergeError
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import merge, proof
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_rounded_weights_are_proven_in_their_own_dtype(
    run: RunResult, one: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "merge",
        run.output,
        tmp_path / "out",
        "--base",
        run.base_folder,
        "--golden",
        one,
        "--dtype",
        dtype,
        "--json",
    ]
    assert cli.main([str(word) for word in words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(tmp_path / "out")
    assert said["parent"]["merge_dtype"] == dtype
    assert 0 < said["parent"]["max_abs_logit_difference"] < 1
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    [transcript] = load_folder(tmp_path / "out" / TRANSCRIPTS)
    assert transcript.precision == {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert compare(tmp_path / "out").tiers["exact"] == 1


@pytest.mark.parametrize(
    "lora",
    [
        {"rslora": True, "dora": True},
        pytest.param(
            {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_without_transcripts_is_proven_with_its_rendered_row(
    base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    train(parse_recipe(recipe_data(base, lora=lora, training={"steps": 3}), folder=tmp_path))
    done = merge(tmp_path / "out", tmp_path / "merged", base)
    assert done.manifest["parent"]["prompts"] == 1
    assert done.manifest["parent"]["max_abs_logit_difference"] < 1e-3
    assert [one.case for one in load_folder(tmp_path / "merged" / TRANSCRIPTS)] == ["rendered_row"]
    assert done.manifest["lora"] == load(tmp_path / "out").data["lora"]


def test_the_base_in_the_wrong_dtype_or_scale_fails_the_proof(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(run.output), str(tmp_path / "out"), "--base", str(run.base_folder), "--golden", str(one)]
    monkeypatch.setattr("pytest_mistral_lora.training.merge.run.plan_merge", lambda *given: {})
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "is not the rounded sum" in said
    assert re.search("units .*, and 7 more; expected at most half a unit", said)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("pytest_mistral_lora.training.merge.run.check_sums", lambda *given: None)
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "from those of base and adapter; expected at most 0.01" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(proof, "FARTHEST", {"float32": 1e9})
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "1 of 1 prompts are answered otherwise\n  row-0004: " in said
    assert "token 0: recorded" in said
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_fail_the_proof(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([torch.zeros(9, 9), torch.full((9, 9), torch.nan)])
    monkeypatch.setattr(proof, "_answer_logits", lambda *given: next(found))
    with pytest.raises(MergeError, match="logits are up to inf from those"):
        merge(run.output, tmp_path / "out", run.base_folder, golden=one)


def test_a_near_tie_is_recorded_and_said(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tie that falls otherwise cannot be made at will: every difference is taken for one."""
    for name, found in (("plan_merge", {}), ("check_sums", None)):
        monkeypatch.setattr(f"pytest_mistral_lora.training.merge.run.{name}", lambda *given, found=found: found)
    monkeypatch.setattr(proof, "FARTHEST", {"float32": 1e9})
    monkeypatch.setattr("pytest_mistral_lora.training.generate.judge.answer_tier", lambda *given: "equivalent")
    done = merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert (done.manifest["parent"]["greedy_equal"], done.manifest["parent"]["near_ties"]) == (False, 1)
    [note] = done.notes
    assert note.startswith("1 of 1 answers differ")
