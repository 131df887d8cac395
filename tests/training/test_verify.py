from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import CONVERSATIONS, write_rows

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.notes import DECISION
from pytest_mistral_lora.records.verify import FieldCheck, verify
from pytest_mistral_lora.training.run import RunResult


def states(facts: list[FieldCheck]) -> dict[str, str]:
    return {fact.name: fact.state for fact in facts}


def mismatches(facts: list[FieldCheck]) -> set[str]:
    return {fact.name for fact in facts if fact.state == "mismatch"}


def flip_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_fresh_run_matches_in_every_fact(run: RunResult, adapter: Path, dataset: Path) -> None:
    facts = verify(adapter, base=run.base_folder, dataset=dataset)
    assert {fact.state for fact in facts} == {"match"}
    assert {"base_weights_sha256", "dataset_sha256", "dataset.rows_sha256", "masking.ids_sha256", "lora.r"} <= set(
        states(facts)
    )


def test_a_folder_of_data_files_serves_as_the_dataset(run: RunResult, adapter: Path, dataset: Path) -> None:
    assert mismatches(verify(adapter, dataset=dataset.parent)) == set()
    assert states(verify(adapter, dataset=[dataset]))["dataset_sha256"] == "match"


def test_what_is_not_at_hand_is_not_available(adapter: Path) -> None:
    found = states(verify(adapter))
    assert found["base_weights_sha256"] == "not available"
    assert found["dataset_sha256"] == "not available"
    assert found["lora.tensors_sha256"] == "match"


def recorded_files() -> list[str]:
    return [
        "DECISION.md",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generations.jsonl",
        "rendered_row.json",
        "tokenizer.model.v3",
        "training.html",
        "training_log.jsonl",
        *(f"transcripts/row-000{number}.json" for number in range(1, 6)),
    ]


def test_every_file_of_the_folder_is_recorded(run: RunResult) -> None:
    assert sorted(run.manifest["files"]) == recorded_files()
    there = [file.relative_to(run.output).as_posix() for file in run.output.rglob("*") if file.is_file()]
    assert sorted(there) == sorted([*recorded_files(), "manifest.json"])


@pytest.mark.parametrize(
    "where", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", recorded_files())
def test_one_flipped_bit_in_a_recorded_file_is_a_mismatch(adapter: Path, name: str, where: float) -> None:
    file = adapter / name
    flip_bit(file, min(int(file.stat().st_size * where), file.stat().st_size - 1))
    assert f"files.{name}.sha256" in mismatches(verify(adapter))


@pytest.mark.parametrize("name", ["more.txt", "transcripts/row-0009.json", "model.safetensors", ".hidden"])
def test_a_file_that_is_not_listed_is_a_mismatch(adapter: Path, name: str) -> None:
    (adapter / name).write_text("later")
    assert mismatches(verify(adapter)) == {f"files.{name}"}


def test_what_git_and_the_hub_add_is_not_of_the_run(adapter: Path) -> None:
    for name in (".gitattributes", ".git/config", ".cache/huggingface/download/README.md.metadata"):
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_text("later")
    assert mismatches(verify(adapter)) == set()


@pytest.mark.parametrize("name", recorded_files())
def test_a_missing_file_is_a_mismatch(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    assert f"files.{name}.sha256" in mismatches(verify(adapter))


def test_one_flipped_bit_of_the_base_is_a_mismatch(run: RunResult, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.base_folder, tmp_path / "base"))
    flip_bit(base / "model.safetensors", 1_000_000)
    assert mismatches(verify(adapter, base=base)) == {"base_weights_sha256"}
    assert mismatches(verify(adapter, base=tmp_path / "nowhere")) == {"base_weights_sha256", "base_config"}


def test_the_same_weights_with_another_configuration_are_another_base(
    run: RunResult, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(run.base_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5, "use_cache": False}))
    [field] = [field for field in verify(adapter, base=base) if field.state == "mismatch"]
    assert (field.name, field.found) == ("base_config.rms_norm_eps", 0.5)
    # smoke and merge ask for the identity, too
    with pytest.raises(InputError, match=r"rms_norm_eps is 0\.5; expected 1e-06"):
        _ = AdapterFolder(adapter, BaseFolder(base)).identity


def test_one_changed_letter_of_the_dataset_is_a_mismatch(adapter: Path, dataset: Path) -> None:
    dataset.write_text(dataset.read_text().replace("Guten Tag!", "Guten Tag?"))
    found = mismatches(verify(adapter, dataset=dataset))
    assert {"dataset_sha256", "dataset.files[0].sha256", "dataset.rows_sha256", "masking.ids_sha256"} <= found


def test_line_endings_change_the_bytes_and_not_the_rows(adapter: Path, dataset: Path) -> None:
    dataset.write_bytes(dataset.read_bytes().replace(b"\n", b"\r\n"))
    assert mismatches(verify(adapter, dataset=dataset)) == {"dataset_sha256", "dataset.files[0].sha256"}


def test_another_order_of_rows_is_another_dataset(adapter: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[::-1])
    assert "dataset.rows_sha256" in mismatches(verify(adapter, dataset=rows))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"lora_alpha": 8}, "lora.alpha"),
        ({"r": 4}, "lora.r"),
        ({"use_rslora": True}, "lora.rslora"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules"),
        ({"base_model_name_or_path": "other"}, "base"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_an_edited_adapter_config_contradicts_the_manifest(adapter: Path, change: dict[str, Any], fact: str) -> None:
    edit_json(adapter / "adapter_config.json", **change)
    assert mismatches(verify(adapter)) == {fact, "files.adapter_config.json.sha256", "files.adapter_config.json.size"}


def test_an_edited_manifest_contradicts_the_tensors(adapter: Path) -> None:
    lora = {**load(adapter).data["lora"], "parameters": 1, "layers": 9, "tensors_sha256": "0" * 64}
    edit_json(adapter / "manifest.json", lora=lora)
    assert mismatches(verify(adapter)) == {
        "lora.parameters",
        "lora.layers",
        "lora.tensors_sha256",
        "seal",
        "files.DECISION.md.text",
    }


def test_a_manifest_of_four_keys_is_verified_as_far_as_it_goes(adapter: Path, dataset: Path, run: RunResult) -> None:
    keys = ("base", "revision", "dataset_sha256", "seed", "base_weights_sha256")
    (adapter / "manifest.json").write_text(json.dumps({key: run.manifest[key] for key in keys}))
    facts = verify(adapter, base=run.base_folder, dataset=dataset)
    assert states(facts)["dataset_sha256"] == "match"
    assert states(facts)["base_weights_sha256"] == "match"
    assert states(facts)["lora.tensors_sha256"] == "not available"
    assert load(adapter).version == 0
    assert {"tokenizer", "lora", "training", "files"} <= set(load(adapter).not_recorded)


def test_decision_record_states_what_the_manifest_states(run: RunResult) -> None:
    text = (run.output / DECISION).read_text()
    manifest = run.manifest
    for fact in (
        manifest["base"],
        manifest["base_weights_sha256"],
        manifest["dataset_sha256"],
        manifest["tokenizer"]["sha256"],
        manifest["template"]["sha256"],
        "constant, 0 warm-up steps, 40 in all",
        "0 for the adapter, 0 for dropout, 0 for the order of rows",
        "equal to the row | 5",
        f"{manifest['evaluation'][0]['results']['training loss, last log']:.6g}",
        f"torch=={manifest['environment']['packages']['torch']}",
    ):
        assert fact in text


def test_recipe_of_the_decision_record_is_the_recipe(run: RunResult) -> None:
    text = (run.output / DECISION).read_text()
    written = json.loads(text.rpartition("```json")[2].partition("```")[0])
    assert written["data"]["train"] == ["rows.jsonl"]
    assert written["training"]["steps"] == 40
    assert written["base"]["weights_sha256"] == run.manifest["base_weights_sha256"]
