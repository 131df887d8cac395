"""TRL itself, with the training template and exported runs. Left out, with the reason, where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.export.run import export
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed here; tox run -e runner-trl")


def in_trl(folder: Path, *words: str) -> Any:
    script = Path(__file__).with_name("trl_process.py")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, folder / "result.json", *words]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return read_json(folder / "result.json")


@pytest.fixture(scope="module", params=["spm-v3", "tekken-240911"])
def base_for_trl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose folder has the tokenizer of transformers alone: beside `tekken.json` TRL gets another."""
    folder = write_tiny_base(tmp_path_factory.mktemp("trl") / "tiny", shipped_tokenizer(request.param))
    tokenizer = CheckpointTokenizer(folder)
    tokenizer.fast.save_pretrained(folder)
    (folder / "tekken.json").unlink(missing_ok=True)
    (folder / "name").write_text(request.param)
    return folder


def _for_trl(row: Row) -> dict[str, Any]:
    """Tools as JSON text, which TRL takes: a table would give each tool the keys of the others, as nulls."""
    data = row.to_json()
    return {**data, "tools": json.dumps(row.tools, ensure_ascii=False)} if row.tools else data


def test_trl_trains_on_the_oracles_labels_with_the_training_template(base_for_trl: Path, tmp_path: Path) -> None:
    file = shipped_tokenizer((base_for_trl / "name").read_text())
    oracle, official = Oracle(file), ChatTemplate(CheckpointTokenizer(file).fast)
    cases = [case for case in packaged_cases() if case.fits(oracle) and not case.row.reasoning_effort]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(_for_trl(case.row)) + "\n" for case in cases))
    (tmp_path / "training.jinja").write_text(training_template(file))
    found = in_trl(tmp_path, str(base_for_trl), "training.jinja", "rows.jsonl")["rows"]
    equal = 0
    for case, row in zip(cases, found, strict=True):
        comparison = compare(case.row, oracle, official)
        weighted = any(message.get("weight") == 0 for message in case.row.messages)
        if comparison.equal and not weighted:
            equal += 1
            assert row == {
                "input_ids": list(comparison.oracle.input_ids),
                "labels": list(comparison.oracle.labels or ()),
            }, case.name
        else:
            assert weighted or comparison.deviations, case.name
    assert equal >= 25


def test_trl_refuses_the_official_template(base_for_trl: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    [first, *_] = in_trl(tmp_path, str(base_for_trl), "", "rows.jsonl")["rows"]
    assert "not training-compatible" in first["error"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, full_base: Path) -> RunResult:
    return train(_recipe(tmp_path_factory.mktemp("ours"), full_base))


def _recipe(folder: Path, base: Path) -> Any:
    write_rows(folder / "rows.jsonl")
    return parse_recipe(
        recipe_data(base, training={"steps": 2, "precision": "fp32", "logging_steps": 1}), folder=folder
    )


@pytest.mark.parametrize("form", ["messages", "tokens"])
def test_an_exported_run_trains_the_same_in_trl(form: Any, tmp_path: Path, full_base: Path, ours: RunResult) -> None:
    done = export(_recipe(tmp_path, full_base), TRAINERS["trl"].load_exporter(), tmp_path / "to", form=form)
    result = in_trl(done.folder, "--config", done.config.name)
    expected = [(list(row.input_ids), list(row.labels or ())) for row in ours.data.train.encoded]
    assert [(row["input_ids"], row["labels"]) for row in result["rows"]] == expected
    # each step has all rows, so that their order is nothing to the loss
    first, second = (line["loss"] for line in ours.log if "loss" in line)
    assert float(result["log"][0]["loss"]) == pytest.approx(first, abs=1e-3)
    assert float(result["log"][1]["loss"]) == pytest.approx(second, abs=1e-3)
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    own = json.loads((ours.output / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"):
        assert config[key] == own[key]
    assert set(config["target_modules"]) == set(own["target_modules"])
