"""A loss or a gradient that stops a run: the rows behind it are named, and written down as the model saw them."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import CONVERSATIONS, MakeRecipe, trainer_of

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import NonFiniteError
from pytest_mistral_lora.training import callbacks as gradients
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_folder import work_folder
from pytest_mistral_lora.training.step import trainer as trainer_module
from pytest_mistral_lora.training.step.forward import collate

BAD = 3
"""The row that has a token whose embedding is broken."""


@pytest.fixture
def broken(base: Path, tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    """A base that gives NaN where a token is fed that only one row has."""
    rows = load_data(make_recipe(), make_encoder("mistral-common", CheckpointTokenizer(base))).train.encoded
    seen = Counter(token for row in rows for token in set(row.input_ids))
    token = next(token for token in rows[BAD].input_ids if seen[token] == 1)
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).hardlink_to(file)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert BaseFolder(folder).weights_sha256 != BaseFolder(base).weights_sha256
    return folder


def written(recipe: Recipe) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    work = work_folder(recipe)
    rows = [json.loads(line) for line in (work / "bad_rows.jsonl").read_text().splitlines()]
    return rows, json.loads((work / "failure.json").read_text())


@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_row_whose_loss_is_not_finite_is_named_and_rendered(
    make_recipe: MakeRecipe, broken: Path, tokens: int
) -> None:
    recipe = make_recipe(broken, training={"steps": 1, "micro_batch_tokens": tokens})
    place = f"{recipe.data.train[0]}:{BAD + 1}"
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    assert (caught.value.rows, [*map(str, caught.value.places)]) == ((BAD,), [place])
    said = str(caught.value)
    assert f"the loss is nan at step 1; the rows: {place}. " in said
    assert str(work_folder(recipe)) in said
    (row,), failure = written(recipe)
    assert row["place"] == place
    assert row["messages"][-1]["content"] == CONVERSATIONS[BAD][-1][1]
    assert len(row["pieces"]) == len(row["input_ids"]) == len(row["labels"])
    assert failure["rows"] == [place]
    assert str(work_folder(recipe) / "bad_rows.jsonl") in failure["cause"]


def test_gradients_above_the_bound_stop_the_run_with_the_rows_of_the_step(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"steps": 3, "batch_size": 2, "stop_at_grad_norm": 1e-9})
    with pytest.raises(NonFiniteError, match=r"norm is .* at step 1, .*training\.stop_at_grad_norm"):
        train(recipe)
    rows, failure = written(recipe)
    assert len(rows) == 2
    assert failure["rows"] == [row["place"] for row in rows]


@pytest.mark.parametrize(("norm", "stops"), [(7.5, True), (0.5, False)])
def test_where_deepspeed_keeps_the_gradients_the_bound_is_on_the_norm_that_it_tells(
    norm: float, stops: bool, make_recipe: MakeRecipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed needs a GPU: what it tells stands in for it here."""
    trainer = trainer_of(make_recipe(training={"stop_at_grad_norm": 1.0}), base, tmp_path)
    for module in (trainer_module, gradients):
        monkeypatch.setattr(module, "engine", lambda: "deepspeed")
    trainer.model.get_global_grad_norm = lambda: norm
    batch = collate(list(trainer.train_dataset))
    with pytest.raises(NonFiniteError, match=r"norm is 7\.5 at step 1") if stops else nullcontext():
        trainer.training_step(trainer.model, batch)


def test_the_bound_is_on_the_norm_before_it_is_scaled_down(make_recipe: MakeRecipe) -> None:
    norm = train(make_recipe(training={"steps": 1, "max_grad_norm": 1e-3})).log[0]["grad_norm"]
    assert norm > 1e-2
    recipe = make_recipe(training={"steps": 1, "max_grad_norm": 1e-3, "stop_at_grad_norm": norm * 0.9})
    recipe.output.rename(recipe.output.with_name("first"))
    with pytest.raises(NonFiniteError):
        train(recipe)
    train(make_recipe(training={"steps": 1, "max_grad_norm": 1e-3, "stop_at_grad_norm": norm * 1.1}), resume=True)
