"""What a recipe asks of machine and libraries: refused before a weight, or even the base, is looked at."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.errors import MachineError, RecipeError
from pytest_mistral_lora.training import devices as libraries
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_folder import work_folder
from pytest_mistral_lora.training.run_metadata import environment

Make = Callable[..., Recipe]


@pytest.fixture
def without_base(base: Path, tmp_path: Path) -> Make:
    """Make a recipe whose base is not there."""
    write_rows(tmp_path / "rows.jsonl")

    def make(quantization: str | None = None, **training: Any) -> Recipe:
        data = recipe_data(base, training=training)
        data["base"] |= {"path": str(tmp_path / "nowhere"), **({"quantization": quantization} if quantization else {})}
        return parse_recipe(data, folder=tmp_path)

    return make


def installed(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    def version(package: str) -> str:
        if not found:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(libraries, "version", version)


@pytest.mark.parametrize(
    ("found", "asked", "place", "said"),
    [
        ("", {"quantization": "nf4"}, "base.quantization", r"'nf4' needs bitsandbytes, and it is not installed"),
        ("", {"quantization": "nf4"}, "base.quantization", r'pip install "bitsandbytes>=0.46.1"'),
        ("0.45.5", {"quantization": "nf4"}, "base.quantization", r"0.45.5 is installed; expected bitsandbytes 0.46.1"),
        ("", {"optimizer": "adamw_8bit"}, "training.optimizer", r"'adamw_8bit' needs bitsandbytes"),
        ("0.49.2", {"optimizer": "adamw_8bit"}, "training.optimizer", r"expected bitsandbytes 0.50 or newer"),
        ("9", {"kernels": "liger"}, "training.kernels", "kernels for a GPU, and the run is on the CPU"),
        ("9", {"precision": "fp16"}, "training.precision", "'fp16', and the run is on the CPU; expected fp32 or bf16"),
    ],
)
def test_what_is_not_there_is_an_error_with_its_place(
    without_base: Make, monkeypatch: pytest.MonkeyPatch, found: str, asked: dict[str, Any], place: str, said: str
) -> None:
    installed(monkeypatch, found)
    recipe = without_base(**asked)
    with pytest.raises(RecipeError, match=said) as caught:
        train(recipe)
    assert str(caught.value.place) == place
    assert caught.value.exit_code == 2
    assert (work_folder(recipe) / "failure.json").is_file()


DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize("image", [DIGEST, f"ghcr.io/someone/train@{DIGEST}", f"localhost:5000/a_b/c.d@{DIGEST}"])
def test_the_image_of_the_container_is_recorded(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "image" not in environment()
    monkeypatch.setenv(libraries.IMAGE, image)
    assert environment()["image"] == image


@pytest.mark.parametrize("image", ["train:latest", DIGEST.upper(), DIGEST[:-1], f"{DIGEST}\n", f"train {DIGEST}"])
def test_an_image_without_a_digest_is_refused(image: str, without_base: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.IMAGE, image)
    with pytest.raises(MachineError) as caught:
        train(without_base())
    assert str(caught.value.place) == libraries.IMAGE


def test_liger_that_is_not_installed_is_an_error_on_a_gpu(without_base: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "")
    monkeypatch.setattr(libraries, "on_gpu", lambda training: True)
    recipe = without_base(kernels="liger")
    with pytest.raises(RecipeError, match=r"'liger' needs liger-kernel.*pip install"):
        libraries.require_environment(recipe)


def test_what_is_there_passes(without_base: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.50.0")
    for asked in ({}, {"quantization": "nf4"}, {"optimizer": "adamw_8bit"}, {"precision": "bf16"}):
        libraries.require_environment(without_base(**asked))
