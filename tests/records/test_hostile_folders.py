"""Records of a foreign folder: a value in them is a value, never another line, a command, a path or a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import COMMIT, adapter
from safetensors.torch import save_file

from pytest_mistral_lora.checkpoint.fp8 import fp8_layout
from pytest_mistral_lora.checkpoint.hub_cache import cached_snapshot, weight_names
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records import goldens
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.base_location import RecordedBase, locate_base
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.records.manifest import build, violations
from pytest_mistral_lora.records.merged_weights import inexact_tensors
from pytest_mistral_lora.records.notes import note_texts
from pytest_mistral_lora.records.tensors import TensorKindDiff
from pytest_mistral_lora.records.verify import verify

FORGED = "x\nmatch          seal\x1b[2J"


def written(folder: Path, **parts: Any) -> Path:
    """Write the record of a run with other parts."""
    folder.mkdir()
    data = {**adapter(), **parts}
    for name, text in note_texts(data).items():
        (folder / name).write_text(text)
    write_json(folder / "manifest.json", build(**{**data, "files": listing(folder)}))
    return folder


def lines_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    return out.splitlines()


def test_no_name_of_a_file_makes_a_line_of_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "run", base=FORGED)
    (folder / FORGED).touch()
    lines = lines_of(["verify", str(folder)], capsys)
    assert not any(line.startswith("match          seal") for line in lines)
    [unlisted] = [line for line in lines if "is not listed" in line]
    assert unlisted.startswith("mismatch       files.x match seal\\x1b[2J: ")


def test_no_value_makes_a_line_of_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = written(tmp_path / "a"), written(tmp_path / "b", base=FORGED)
    lines = lines_of(["diff", *(str(folder / "manifest.json") for folder in (one, other))], capsys)
    assert "  $.base: mistralai/Mistral-7B-v0.3 → x match seal\\x1b[2J" in lines


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors"])
def test_diff_reads_no_tensors_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    from pytest_mistral_lora.records.compare_runs import compare_runs

    one, other = written(tmp_path / "a"), written(tmp_path / "b")
    for folder in (one, other):
        (folder / name).symlink_to(__file__)
    with pytest.raises(InputError, match="leads out of the folder"):
        compare_runs(one, other)


HUGE = 10**400
NUMBERS = [
    ("lora", "alpha"),
    ("training", "learning_rate"),
    ("training", "epochs"),
    ("training", "weight_decay"),
    ("training", "max_grad_norm"),
    ("masking", "supervised_tokens"),
    ("masking", "tokens"),
]


@pytest.mark.parametrize(("part", "key"), NUMBERS)
def test_a_number_that_no_run_has_is_a_violation(part: str, key: str) -> None:
    data = adapter()
    data[part][key] = HUGE
    assert [str(one.place) for one in violations(data)] == [f"$.{part}.{key}"]
    data[part][key] = 10**18
    assert violations(data) == []
    assert note_texts(data)


@pytest.mark.parametrize(
    ("path", "refused"), [("a\0b", True), ("a" * 5000, False), ("é" * 200, False), ("../a", True), ("/a", True)]
)
def test_the_path_of_a_data_file_that_cannot_be_one_is_no_traceback(path: str, refused: bool, tmp_path: Path) -> None:
    data = adapter()
    data["dataset"]["files"][0] = {**data["dataset"]["files"][0], "path": path}
    assert bool(violations(data)) is refused
    if not refused:
        folder = written(tmp_path / "run", dataset=data["dataset"])
        states = {one.name: one.state for one in verify(folder, dataset=tmp_path)}
        assert states["dataset_sha256"] == "mismatch"


def test_whole_numbers_of_a_golden_may_be_written_as_json_allows(tmp_path: Path) -> None:
    source = goldens.golden_paths(goldens.goldens_folder() / "templates" / "spm-v3")[0]
    data = json.loads(source.read_text(encoding="utf-8"))

    def as_float(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_float(one) for key, one in value.items()}
        if isinstance(value, list):
            return [as_float(one) for one in value]
        return float(value) if type(value) is int else value

    parts = {name: as_float(data[name]) for name in ("input_ids", "labels", "spans")}
    (tmp_path / source.name).write_text(json.dumps({**data, **parts}), encoding="utf-8")
    assert goldens.load(tmp_path / source.name).text() == goldens.load(source).text()


@pytest.mark.parametrize("weight_map", [["x"], {"a": 1, "b": "x"}, {"a": None}, {"a": ["x"]}, None])
def test_an_index_of_any_types_is_an_error(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="not an index of safetensors files"):
        weight_names(tmp_path)


LAYER = "model.layers.0.self_attn.q_proj.weight"
SIDES = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("a", "b", "keys", "found"),
    [
        ((2, 4), (4, 2), {}, ""),
        ((0, 4), (4, 0), {}, r"has shape \[0, 4\], and B \[4, 0\]"),
        ((), (4, 2), {}, r"has shape \[\], and B"),
        ((2, 4, 1), (4, 2), {}, r"has shape \[2, 4, 1\]"),
        ((3, 4), (4, 2), {}, r"has shape \[3, 4\], and B \[4, 2\]"),
        ((2, 5), (4, 2), {}, r"is for a tensor of shape \[4, 5\]; expected \[4, 4\]"),
        ((2, 4), (5, 2), {}, r"is for a tensor of shape \[5, 4\]"),
        ((2, 4), (4, 2), {"lora_alpha": "x"}, 'lora_alpha is "x"'),
        ((2, 4), (4, 2), {"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
    ],
)
def test_sums_of_an_adapter_of_any_shapes_are_no_traceback(
    a: tuple[int, ...], b: tuple[int, ...], keys: dict[str, Any], found: str, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **keys}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {SIDES.format("A"): torch.zeros(a), SIDES.format("B"): torch.zeros(b)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    save_file({LAYER: torch.ones(4, 4)}, tmp_path / "model.safetensors")
    weights = Weights([tmp_path / "model.safetensors"])
    if not found:
        assert list(inexact_tensors(weights, weights, AdapterFolder(tmp_path))) == []
        return
    with pytest.raises(InputError, match=found):
        list(inexact_tensors(weights, weights, AdapterFolder(tmp_path)))


def test_complex_numbers_are_compared_in_both_parts() -> None:
    diff = TensorKindDiff("x")
    diff.add(np.array([1 + 1j]), np.array([1 + 4j]))
    assert (diff.different, diff.max_abs, diff.relative) == (1, 3.0, pytest.approx(3 / 2**0.5))


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0)])
def test_an_fp8_matrix_without_numbers_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    scale = torch.ones(shape[0] // 128, shape[1] // 128)
    tensors = {"a.weight": torch.zeros(shape).to(torch.float8_e4m3fn), "a.weight_scale_inv": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with pytest.raises(PinError, match="is FP8 of shape"):
        fp8_layout(config, Weights([tmp_path / "model.safetensors"]), Place.of("config.json"))


@pytest.mark.parametrize(
    "name", ["../base", "a/b.git", "-a/b", "a/b--c", "a/..", "a/b\n", "a/" + "b" * 200, "a//b", "a"]
)
def test_a_base_whose_name_is_no_repository_is_missing(name: str, tmp_path: Path) -> None:
    assert cached_snapshot(name, COMMIT) is None
    assert "is missing" in locate_base(RecordedBase(name, COMMIT), tmp_path).missing
    if name != "a":  # a repository of an old form, which the Hub may have
        assert "is missing" in locate_base(RecordedBase(name, COMMIT), tmp_path, may_fetch=True).missing


@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_folder_without_a_record_is_sent_to_the_check_of_its_files(
    has_adapter: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if has_adapter:
        (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ("another trainer made the adapter" in error) is has_adapter
    assert (f"mistral-lora check {tmp_path}\n" in error) is has_adapter
