"""Files of many small tensors: each file is opened once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_mistral_lora.checkpoint import weights as module
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.adapter.weights import summarize_tensors
from pytest_mistral_lora.conformance.merged.weights import compare_tensors
from pytest_mistral_lora.records.tensors import sha256_of_weights

COUNT = 300


@pytest.fixture
def shards(tmp_path: Path) -> Weights:
    files = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        save_file({f"t{number}.{n}": np.full((2, 3), n, np.float32) for n in range(COUNT)}, file)
    return Weights(files)


@pytest.mark.parametrize(
    ("read", "files"),
    [
        (summarize_tensors, 2),
        (sha256_of_weights, 2),
        (lambda weights: compare_tensors(weights, weights, dict(zip(weights, weights, strict=True))), 4),
    ],
    ids=["summary", "hash", "comparison"],
)
def test_a_file_is_opened_once_for_all_its_tensors(
    read: Callable[[Weights], Any], files: int, shards: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, opened = module.opened, list[Path]()

    def counted(path: Path) -> Any:
        opened.append(path)
        return given(path)

    monkeypatch.setattr(module, "opened", counted)
    found = read(shards)
    assert len(opened) == files
    if isinstance(found, dict):
        assert len(found) == 2 * COUNT


def test_a_tensor_is_the_same_from_a_file_that_is_open(shards: Weights) -> None:
    names = ["t0.0", "t1.7", f"t1.{COUNT - 1}", "t0.3"]
    alone = [(shards.array(name), shards.read_bytes(name)) for name in names]
    with shards.held_open():
        held = [(shards.array(name), shards.read_bytes(name)) for name in names]
    for name, (array, data), (other, same) in zip(names, alone, held, strict=True):
        assert array.tolist() == other.tolist() == [[float(name.partition(".")[2])] * 3] * 2
        assert data == same == array.tobytes()
