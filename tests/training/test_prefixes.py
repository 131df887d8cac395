"""Rows that begin alike share the passes of their beginning, and nothing that is computed changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MakeRecipe, rows_of, trainer_of, write_rows
from transformers import TrainerCallback

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.step import StepRow, micro_batches, pack_rows
from pytest_mistral_lora.training.step import forward as passes
from pytest_mistral_lora.training.step import packing as prefixes
from pytest_mistral_lora.training.step.forward import supervised_losses

SYSTEM = "You are a careful assistant who answers in one short sentence and never guesses. " * 3
ALIKE = [
    [("system", SYSTEM), ("user", "What is the capital of France?"), ("assistant", "Paris.")],
    [("system", SYSTEM), ("user", "What is the capital of Peru?"), ("assistant", "Lima.")],
    [("user", "Say hello in German."), ("assistant", "Guten Tag!")],
    [("system", SYSTEM), ("user", "Name a prime."), ("assistant", "Seven is prime.")],
    [("system", SYSTEM + "Be kind. "), ("user", "Name a prime."), ("assistant", "Two, if you like.")],
]
IGNORED = -100


def row(index: int, beginning: int, own: int) -> StepRow:
    """A row of a beginning that all share, tokens of its own, and two supervised ones."""
    ids = torch.tensor([*range(beginning), *(100 + 10 * index + place for place in range(own)), 7, 8])
    labels = torch.tensor([*[IGNORED] * (beginning + own), 7, 8])
    return StepRow(index, ids, labels)


ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=7).map(
    lambda shapes: [row(index, *shape) for index, shape in enumerate(shapes)]
)


@given(ROWS, st.integers(1, 120))
def test_every_row_is_there_once_and_less_is_fed(rows: list[StepRow], most: int) -> None:
    parts = micro_batches(rows, most, share_prefix=True)
    assert sorted(one.index for part in parts for one in part) == list(range(len(rows)))
    for part in parts:
        packed = pack_rows(part, share_prefix=True)
        assert packed.input_ids.shape[1] <= sum(one.num_input_tokens for one in part)
        assert packed.input_ids.shape[1] <= most or len(part) == 1


@given(ROWS)
def test_each_row_can_be_read_back_from_the_segments(rows: list[StepRow]) -> None:
    packed = pack_rows(rows, share_prefix=True)
    read = {}
    for start, end, (first, last) in packed.segments:
        tokens = packed.input_ids[0, [*range(first, last), *range(start, end)]]
        places = packed.position_ids[0, [*range(first, last), *range(start, end)]]
        assert places.tolist() == list(range(len(tokens)))
        for column, owner, target in zip(packed.loss_positions, packed.row_indices, packed.targets, strict=True):
            if start <= column < end:
                read[int(owner)] = tokens
                own = rows[int(owner)]
                assert own.labels[places[(last - first) + int(column) - start] + 1] == target
    assert {index: tokens.tolist() for index, tokens in read.items()} == {
        one.index: one.input_ids[: one.num_input_tokens].tolist() for one in rows
    }


def test_a_short_beginning_is_not_shared() -> None:
    rows = [row(index, 10, 3) for index in range(3)]
    assert [group.shared for group in prefixes.prefix_groups(rows, share_prefix=True)] == [0, 0, 0]
    rows = [row(index, 30, 3) for index in range(3)]
    assert [
        (group.shared, len(group.rows), group.num_input_tokens)
        for group in prefixes.prefix_groups(rows, share_prefix=True)
    ] == [(30, 3, 30 + 3 * 4)]


def first_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Train, and return the gradients of the first optimizer step."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients.setdefault(name, parameter.grad.clone())

    trainer.add_callback(Keep())
    trainer.train()
    return gradients


@pytest.mark.parametrize("tokens", [4096, 300, 1])
def test_sharing_changes_no_gradient(tokens: int, make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "batch_size": 5, "max_grad_norm": 0, "micro_batch_tokens": tokens}
    recipes = [make_recipe(training={**settings, "share_prefix": share}) for share in (False, True)]
    write_rows(tmp_path / "rows.jsonl", ALIKE)
    plain, shared = (first_gradients(trainer_of(recipe, base, tmp_path)) for recipe in recipes)
    assert len(shared) == 16
    for name, gradient in plain.items():
        assert (shared[name] - gradient).abs().max() < 2e-5 * gradient.abs().max()


@pytest.mark.parametrize("window", [None, 8])
def test_each_row_loses_what_it_loses_alone(
    window: int | None, make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    trainer, rows = trainer_and_rows(make_recipe, base, tmp_path)
    trainer.model.config.sliding_window = window
    with torch.no_grad():
        together, owners = supervised_losses(trainer.model, rows, share_prefix=True)
        for one in rows:
            alone, _ = supervised_losses(trainer.model, [one])
            assert torch.allclose(together[owners == one.index], alone, rtol=1e-5, atol=1e-5)
    fed = pack_rows(rows, share_prefix=True).input_ids.shape[1]
    assert fed < 0.6 * sum(one.num_input_tokens for one in rows)


def trainer_and_rows(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> tuple[Any, list[StepRow]]:
    recipe = make_recipe()
    write_rows(tmp_path / "rows.jsonl", ALIKE)
    trainer = trainer_of(recipe, base, tmp_path)
    return trainer, rows_of(trainer)


def test_rows_that_did_not_see_their_beginning_would_be_seen(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, rows = trainer_and_rows(make_recipe, base, tmp_path)
    with torch.no_grad():
        sound, _ = supervised_losses(trainer.model, rows, share_prefix=True)
        own = passes.segment_arguments
        monkeypatch.setattr(
            passes, "segment_arguments", lambda given, device: own([one._replace(prefix=(0, 0)) for one in given])
        )
        found, _ = supervised_losses(trainer.model, rows, share_prefix=True)
    assert not torch.allclose(found, sound, rtol=1e-2)


def test_sharing_with_dropout_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="rows would share its mask"):
        make_recipe(training={"share_prefix": True}, lora={"dropout": 0.1})
