"""The optimizer step: what it computes is exact, and what it leaves out is nothing that counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import MakeRecipe, rows_of, trainer_of
from torch.nn.functional import pad

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.conformance.train.step_laws import reference_step
from pytest_mistral_lora.errors import NonFiniteError
from pytest_mistral_lora.records.data_stats import RowCounts, SplitStats
from pytest_mistral_lora.training.adapter import adapter_tensors
from pytest_mistral_lora.training.rows import ColumnBuilder, EncodedRows, RowDataset, RowTable, input_tokens_of
from pytest_mistral_lora.training.step import Segment, StepRow, StepSampler, micro_batches, pack_rows
from pytest_mistral_lora.training.step import forward as loss_module
from pytest_mistral_lora.training.step.forward import (
    IMPLEMENTATION,
    attend_in_segments,
    collate,
    losses_at_head,
    segment_arguments,
    step_rows,
    supervised_losses,
    token_losses,
)


def row(index: int, labels: Sequence[int]) -> StepRow:
    return StepRow(index, torch.arange(1, len(labels) + 1), torch.tensor(labels))


# the loss at the head


def stock(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")


def gradient(losses: torch.Tensor, hidden: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    return found


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradient_are_at_least_as_near_to_fp64_as_the_stock_path(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "most_logits", lambda device: chunk * 5000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).requires_grad_()
    head = torch.nn.Linear(64, 5000, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(5000, 64, generator=generator))
    targets, upstream = torch.randint(5000, (40,), generator=generator), torch.rand(40, generator=generator)
    exact_hidden = hidden.detach().double().requires_grad_()
    truth = stock(exact_hidden, head.weight.double(), targets)
    slope = gradient(truth, exact_hidden, upstream.double())
    errors = {}
    for name, losses in (
        ("ours", token_losses(hidden, head, targets, head.forward)),
        ("stock", stock(hidden, head.weight, targets)),
    ):
        apart = (losses.double() - truth).abs().max()
        errors[name] = (apart.item(), (gradient(losses, hidden, upstream).double() - slope).abs().max().item())
    assert errors["ours"][0] <= errors["stock"][0] * 1.5
    assert errors["ours"][1] <= errors["stock"][1] * 1.5
    assert errors["ours"][1] < 1e-5 * slope.abs().max().item()


def test_a_head_that_is_trained_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "most_logits", lambda device: 30 * 11)
    head, hidden, targets = torch.nn.Linear(8, 30), torch.randn(20, 8), torch.randint(30, (20,))
    for losses in (token_losses(hidden, head, targets, head.forward), stock_with_bias(head, hidden, targets)):
        losses.sum().backward()
    assert head.weight.grad is not None
    found, expected = head.weight.grad.clone(), torch.zeros(())
    head.zero_grad()
    stock_with_bias(head, hidden, targets).sum().backward()
    assert head.weight.grad is not None
    expected = 2 * head.weight.grad
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_that_is_trained_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "most_logits", lambda device: 3000)
    head, kept = torch.nn.Linear(8, 1000, bias=False), []
    hidden, targets = torch.randn(40, 8, requires_grad=True), torch.randint(1000, (40,))
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        token_losses(hidden, head, targets, head.forward).sum().backward()
        # each part of three positions in the forward pass; what the backward pass keeps is of one part at a time
    assert sum(number >= 3000 for number in kept if number != head.weight.numel()) <= 4 * 14
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        losses = token_losses(hidden, head, targets, head.forward)
    assert max(kept, default=0) < 3000
    losses.sum().backward()
    assert hidden.grad is not None


def stock_with_bias(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")


def test_the_head_is_as_it_was_after_an_error() -> None:
    head = torch.nn.Linear(4, 9, bias=False)
    hidden = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="batch_size"), losses_at_head(head, torch.tensor([1, 2, 3])):
        head(hidden)
    assert head(hidden).shape == (1, 2, 9)
    assert "forward" not in vars(head)


# rows packed end to end


LABELS = st.lists(st.sampled_from([IGNORE_INDEX, 5]), min_size=1, max_size=12)


@given(st.lists(LABELS, min_size=1, max_size=6), st.integers(1, 30))
def test_micro_batches_have_every_row_with_a_loss_once(labels: list[list[int]], most: int) -> None:
    rows = [row(index, one) for index, one in enumerate(labels)]
    parts = micro_batches(rows, most)
    expected = [index for index, one in enumerate(labels) if any(label != IGNORE_INDEX for label in one[1:])]
    assert sorted(one.index for part in parts for one in part) == expected
    for part in parts:
        assert sum(one.num_input_tokens for one in part) <= most or len(part) == 1


@given(st.lists(LABELS.filter(lambda one: 5 in one[1:]), min_size=1, max_size=5))
def test_a_layout_has_what_a_supervised_token_needs_and_no_more(labels: list[list[int]]) -> None:
    rows = [row(index, one) for index, one in enumerate(labels)]
    packed = pack_rows(rows)
    assert packed.input_ids.shape == packed.position_ids.shape == (1, packed.segments[-1].end)
    for one, (start, end, _) in zip(rows, packed.segments, strict=True):
        assert packed.input_ids[0, start:end].tolist() == one.input_ids[: end - start].tolist()
        assert packed.position_ids[0, start:end].tolist() == list(range(end - start))
        own = packed.row_indices == one.index
        assert (packed.loss_positions[own] - start + 1).tolist() == [
            place for place, label in enumerate(one.labels.tolist()) if place and label != IGNORE_INDEX
        ]
        assert packed.targets[own].tolist() == [5] * int(own.sum())
        assert int(packed.loss_positions[own][-1]) == end - 1


def test_nothing_behind_the_last_supervised_token_is_fed(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_recipe(), base, tmp_path)
    rows = rows_of(trainer)
    longer = [
        StepRow(one.index, pad(one.input_ids, (0, 3), value=7), pad(one.labels, (0, 3), value=-100)) for one in rows
    ]
    fed = []
    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        losses = [supervised_losses(trainer.model, part)[0] for part in (rows, longer)]
    assert torch.equal(*losses)
    assert fed == [sum(len(one.input_ids) - 1 for one in rows)] * 2


def test_gradients_are_as_near_to_fp64_as_those_of_the_stock_path(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(make_recipe(), base, tmp_path)
    rows, model = rows_of(trainer), trainer.model
    truth = reference_step(base, adapter_tensors(model), 2.0, trainer.train_dataset.encoded)
    parameters = {name.replace(".default.", "."): one for name, one in model.named_parameters() if one.requires_grad}
    losses = {
        "ours": supervised_losses(model, rows)[0].sum() / truth.tokens,
        "stock": sum(
            model(input_ids=one.input_ids[None], labels=one.labels[None]).loss * len(one.targets) for one in rows
        )
        / truth.tokens,
    }
    errors = {}
    for name, value in losses.items():
        found = torch.autograd.grad(value, list(parameters.values()))
        exact = [truth.gradients[key] for key in parameters]
        errors[name] = max(
            float((one.double() - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True)
        )
    assert errors["ours"] <= 1.5 * errors["stock"]
    assert errors["ours"] < 1e-4


# attention


def test_within_its_window_a_segment_attends_as_a_row_alone_does(base: Path) -> None:
    model = load_base(BaseFolder(base), "fp32", "cpu")
    model.config.sliding_window = 4
    rows = [torch.arange(3, 14), torch.arange(20, 23), torch.arange(40, 47)]
    with torch.no_grad():
        alone = [model(input_ids=ids[None]).logits[0] for ids in rows]
        attend_in_segments(model)
        call = segment_arguments([Segment(0, 11), Segment(11, 14), Segment(14, 21)])
        places = torch.cat([torch.arange(len(ids)) for ids in rows])[None]
        together = model(input_ids=torch.cat(rows)[None], position_ids=places, **call).logits[0]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_without_segments_a_model_is_what_it_was(base: Path) -> None:
    model = load_base(BaseFolder(base), "fp32", "cpu")
    ids, mask = torch.tensor([[1, 5, 9, 4], [0, 1, 7, 3]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        said = model.generate(input_ids=ids, attention_mask=mask, **settings)
        attend_in_segments(model)
        assert model.config._attn_implementation == IMPLEMENTATION
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), said)


# the order of the rows


LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=30).map(np.array)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_processes_share_the_rows_of_each_step(
    tokens: np.ndarray[Any, Any], size: int, processes: int, seed: int, epoch: int
) -> None:
    def steps(process: int, of: int) -> list[list[int]]:
        return list(StepSampler(tokens, size, process=process, processes=of, seed=seed, epoch=lambda: epoch))

    whole = steps(0, 1)
    assert sorted(one for step in whole for one in step) == list(range(len(tokens)))
    assert len(whole) == len(StepSampler(tokens, size))
    shares = [steps(process, processes) for process in range(processes)]
    for number, step in enumerate(whole):
        dealt = [share[number] for share in shares]
        assert sorted(one for share in dealt for one in share) == sorted(step)
        # each process keeps the order of the step
        assert all(share == [one for one in step if one in share] for share in dealt)
        # the last row of the fullest process went to the emptiest one
        loads = [sum(tokens[share]) for share in dealt]
        assert max(loads) - min(loads) <= max(tokens[step])
        assert all(map(len, dealt)) or len(step) < processes


@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(0, 12), st.integers(0, 12))
def test_the_plan_of_a_run_has_the_rows_of_its_steps(
    tokens: np.ndarray[Any, Any], size: int, processes: int, first: int, more: int
) -> None:
    def sampler(process: int, epoch: int = 0) -> StepSampler:
        return StepSampler(tokens, size, process=process, processes=processes, seed=3, epoch=lambda: epoch)

    steps = len(sampler(0))
    fed = [[*sampler(process, epoch)] for epoch in range(25) for process in range(processes)]
    expected = [
        fed[step // steps * processes + process][step % steps]
        for step in range(first, first + more)
        for process in range(processes)
    ]
    assert [*sampler(0).shares(first, first + more)] == expected


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = {
        tuple(one for step in StepSampler(np.ones(50), 7, seed=seed, epoch=lambda epoch=epoch: epoch) for one in step)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert [one for step in StepSampler(np.ones(9), 4) for one in step] == list(range(9))


@given(st.lists(st.lists(st.sampled_from([-100, 7]), min_size=1, max_size=6), max_size=8), st.booleans())
def test_input_tokens_end_before_the_last_supervised_one(labels: list[list[int]], in_arrow: bool) -> None:
    rows = [EncodedRow(tuple(range(len(one))), tuple(one), ()) for one in labels]
    encoded: Any = rows
    if in_arrow:
        columns = ColumnBuilder()
        for row in rows:
            columns.add(row, 1, b"")
        encoded = EncodedRows(RowTable(pa.Table.from_batches([columns.batch(0)])), SplitStats(RowCounts(), {}))
    expected = [row.num_input_tokens for row in step_rows(collate([*RowDataset(rows)]))]
    assert input_tokens_of(encoded).tolist() == expected


# numbers that are not finite


def test_the_rows_whose_loss_is_not_finite_are_named(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 1}), base, tmp_path)
    rows = rows_of(trainer)
    only = set(rows[1].input_ids.tolist()) - {
        token for one in rows if one.index != 1 for token in one.input_ids.tolist()
    }
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[max(only)] = float("nan")
    with pytest.raises(NonFiniteError, match="the loss is nan at step 1") as caught:
        trainer.train()
    assert caught.value.rows == (1,)


def test_a_step_of_rows_without_a_label_changes_no_weight(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(training={"steps": 1, "unsupervised": "warn", "dry_run": False})
    question = '{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No.", "weight": 0}'
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(f'{{"messages": [{question}]}}\n' * 5)
    trainer = trainer_of(recipe, base, tmp_path)
    trainer.train_dataset = RowDataset(trainer.train_dataset.encoded[5:])
    before = adapter_tensors(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_tensors(trainer.model).items())
