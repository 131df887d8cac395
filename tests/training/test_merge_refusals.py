"""Folders that cannot be merged: each is refused with the reason and the next step, and nothing is written."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from declared import declare
from safetensors.torch import load_file, save_file

from pytest_mistral_lora import cli
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.merge import MergedModel, merge
from pytest_mistral_lora.training.run import RunResult

WEIGHTS = "model.safetensors"


def refused(adapter: Path, output: Path, base: Path | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        merge(adapter, output, base, **options)
    assert caught.value.exit_code == 2
    assert not output.exists() or output.is_dir()
    return str(caught.value)


def test_a_merged_model_is_taken_for_no_adapter_and_for_no_base(
    run: RunResult, merged: MergedModel, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(merged.output, tmp_path / "again", run.base_folder)
    assert said.startswith(f"{merged.output}: a merged model (kind merged in its manifest.json)")
    assert "Name the folder that it was merged from." in said
    said = refused(run.output, tmp_path / "twice", merged.output)
    assert said.startswith(f"{merged.output}: ")
    assert "which has an adapter in its weights" in said
    assert f"expected tiny with {run.manifest['base_weights_sha256']}, which the adapter was trained on" in said
    assert cli.main(["smoke", str(run.output), "--base", str(merged.output)]) == 2
    assert "which has an adapter in its weights" in capsys.readouterr().err
    assert cli.main(["verify", str(run.output), "--base", str(merged.output)]) == 1
    assert ", of a merged model; recorded" in capsys.readouterr().out
    (adapter / "manifest.json").unlink()
    assert cli.main(["smoke", str(adapter), "--base", str(merged.output)]) == 2
    assert "which has an adapter in its weights" in capsys.readouterr().err


def test_another_base_is_refused(run: RunResult, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.base_folder, tmp_path / "other"))
    tensors = load_file(other / WEIGHTS)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / WEIGHTS)
    assert "which the adapter was trained on" in refused(run.output, tmp_path / "x", other)


def test_a_quantised_base_is_refused_before_its_weights_are_read(run: RunResult, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.base_folder, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    (base / WEIGHTS).unlink()
    said = refused(run.output, tmp_path / "out", base)
    assert "the base is quantised (bitsandbytes)" in said


def test_there_is_nothing_to_dequantise_in_a_full_base(run: RunResult, tmp_path: Path) -> None:
    said = refused(run.output, tmp_path / "out", run.base_folder, dequantize=True)
    assert "neither the base nor its training was quantised" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_a_library_that_is_not_there_is_said(adapter: Path, run: RunResult, tmp_path: Path) -> None:
    recipe = {**run.manifest["recipe"], "base": {**run.manifest["recipe"]["base"], "quantization": "nf4"}}
    training = {**run.manifest["training"], "quantization": "nf4"}
    declare(adapter, {**run.manifest, "recipe": recipe, "training": training})
    said = refused(adapter, tmp_path / "out", run.base_folder, dequantize=True)
    assert "cannot be dequantised: " in said
    assert "bitsandbytes" in said
    assert list(tmp_path.iterdir()) == [adapter]


def test_an_adapter_without_a_whole_record_is_refused(adapter: Path, run: RunResult, tmp_path: Path) -> None:
    manifest = adapter / "manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps({key: data[key] for key in ("base", "revision", "base_weights_sha256", "dataset_sha256", "seed")})
    )
    assert "a manifest of version 0, which does not record" in refused(adapter, tmp_path / "out", run.base_folder)
    manifest.unlink()
    said = refused(adapter, tmp_path / "out", run.base_folder)
    assert "no manifest.json: " in said
    assert "mistral-lora train" in said


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.model.v3"])
def test_an_adapter_that_is_not_as_it_was_saved_is_refused(
    adapter: Path, run: RunResult, tmp_path: Path, name: str
) -> None:
    data = bytearray((adapter / name).read_bytes())
    data[-9] ^= 1
    (adapter / name).write_bytes(bytes(data))
    said = refused(adapter, tmp_path / "out", run.base_folder)
    assert f"files.{name}.sha256 is" in said
    assert "mistral-lora verify" in said


def test_without_prompts_there_is_no_proof(adapter: Path, run: RunResult, tmp_path: Path) -> None:
    shutil.rmtree(adapter / TRANSCRIPTS)
    (adapter / "rendered_row.json").unlink()
    kept = {name: entry for name, entry in run.manifest["files"].items() if (adapter / name).is_file()}
    declare(adapter, {**run.manifest, "files": kept})
    said = refused(adapter, tmp_path / "out", run.base_folder)
    assert "there is no prompt" in said
    assert "--golden" in said
