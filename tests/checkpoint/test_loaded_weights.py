"""The weights that are loaded are those that are hashed, and a base that cannot be loaded is an error by its file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from of_classes import tiny_base
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.checkpoint import base_model
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, require_trainable
from pytest_mistral_lora.checkpoint.weights import INDEX
from pytest_mistral_lora.errors import InputError, PinError

QUERY = "model.layers.0.self_attn.q_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ATTENTION = "kernels-community/flash-attn"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two files with an index, and beside it a file with other numbers."""
    folder = tmp_path_factory.mktemp("made") / "base"
    shutil.copytree(tiny_base("mistral"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    for file in SHARDS:
        save_file({name: one for name, one in tensors.items() if places[name] == file}, folder / file, {"format": "pt"})
    save_file({QUERY: tensors[QUERY] + 1}, folder / "others.safetensors", {"format": "pt"})
    write_index(folder, places)
    return folder


def copy_or_link(source: str, target: str) -> None:
    """Copy a small file; no test changes a large one."""
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    shutil.copy(made / "others.safetensors", tmp_path / "outside.safetensors")
    return Path(shutil.copytree(made, tmp_path / "base", copy_function=copy_or_link))


def write_index(folder: Path, places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_a_base_in_several_files_is_loaded(base: Path) -> None:
    require_trainable(BaseFolder(base))
    found = load_base(BaseFolder(base), "fp32", "cpu").state_dict()[QUERY]
    assert torch.equal(found, load_file(tiny_base("mistral") / "model.safetensors")[QUERY])


def move_to(file: str) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {QUERY: file, "model.norm.weight": SHARDS[0]})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file beside the weights": (move_to("others.safetensors"), 'names the files "model-00001.*", "others'),
    "a file outside": (move_to("../outside.safetensors"), r'names the files "\.\./outside'),
    "a file that is missing": (move_to("model-00009-of-00009.safetensors"), "names the files .*00009"),
    "a shard too few": (move_to(SHARDS[0]), 'names the files "model-00001-of-00002'),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"no {INDEX}"),
    "a list": (lambda folder: write_index(folder, [SHARDS[0]]), "not an index"),
    "numbers": (lambda folder: write_index(folder, {"a": 1, "b": SHARDS[0]}), "not an index"),
    "a damaged index": (lambda folder: write_index_text(folder, "{"), "not valid JSON"),
    "another file by a key": (
        lambda folder: change_config(folder, transformers_weights="others.safetensors"),
        'transformers_weights is "others.safetensors"',
    ),
}


def write_index_text(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)


@pytest.mark.parametrize("case", CHANGES)
def test_weights_that_transformers_would_take_from_elsewhere_are_refused(case: str, base: Path) -> None:
    change, found = CHANGES[case]
    change(base)
    for use in (require_trainable, lambda folder: load_base(folder, "fp32", "cpu")):
        with pytest.raises(InputError, match=found):
            use(BaseFolder(base))
    with pytest.raises(InputError, match=found):
        load_base(BaseFolder(base), "fp32", "cpu", packed=True)


@pytest.mark.parametrize(
    "keys",
    [{"vocab_size": "many"}, {"hidden_size": 0}, {"hidden_act": "nope"}, {"rope_scaling": {"rope_type": "x"}}],
    ids=str,
)
def test_a_configuration_with_a_wrong_value_is_an_error_of_its_file(keys: dict[str, Any], base: Path) -> None:
    change_config(base, **keys)
    with pytest.raises(PinError, match=r"config\.json: no model can be made of it"):
        load_base(BaseFolder(base), "fp32", "cpu")


def test_a_damaged_generation_config_is_an_error(base: Path) -> None:
    (base / "generation_config.json").write_text("[1]")
    with pytest.raises(PinError, match="no model can be made of it"):
        load_base(BaseFolder(base), "fp32", "cpu")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_code_of_the_hub_is_fetched_for_the_attention(key: str, base: Path) -> None:
    change_config(base, **{key: ATTENTION})
    require_trainable(BaseFolder(base))
    assert load_base(BaseFolder(base), "fp32", "cpu").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(name: str, base: Path) -> None:
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(InputError, match=f"{name}: is not a regular file"):
        load_base(BaseFolder(base), "fp32", "cpu")
    if name == SHARDS[0]:
        with pytest.raises(InputError, match="is not a regular file"):
            _ = BaseFolder(base).weights_sha256


@pytest.mark.parametrize(("device", "placed"), [("cuda:1", {"device_map": {"": "cuda:1"}}), ("cpu", {})])
def test_weights_for_a_device_are_not_first_loaded_into_memory(
    made: Path, device: str, placed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def load(base: BaseFolder, precision: str, *, packed: bool, **options: Any) -> torch.nn.Module:
        given.append(options)
        return torch.nn.Identity()

    monkeypatch.setattr(base_model, "_load", load)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: model)
    load_base(BaseFolder(made), "bf16", device)
    assert given == [placed]
