"""A merge of a model with experts: rounding moves tokens between experts, and the proof tells that from a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from class_steps import CASES, ClassRun
from safetensors.torch import load_file, save_file
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.errors import MergeError
from pytest_mistral_lora.training.merge import MergedModel, merge, proof, routing
from pytest_mistral_lora.training.merge import run as merging
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> ClassRun:
    """A Mixtral that has hardly learned: many of its tokens, and of its experts, are nearly as good as others."""
    run = ClassRun(next(case for case in CASES if str(case) == "mixtral"), tmp_path_factory.mktemp("experts"))
    run.write_base()
    write_rows(run.folder / "rows.jsonl")
    evaluation = {"generations": 3, "max_new_tokens": 16}
    train(parse_recipe(recipe_data(run.base, training={"steps": 3}, evaluation=evaluation), folder=run.folder))
    return run


def merged(
    one: ClassRun, output: Path, change: Change | None, monkeypatch: pytest.MonkeyPatch, *, by_answers: bool = True
) -> MergedModel:
    """Merge in bfloat16, with a change of the tensors that are written; prove it by answers alone, or by sums, too."""
    write = merging.write_weights
    if by_answers:
        monkeypatch.setattr(merging, "check_sums", lambda *given: None)

    def writing(folder: Path, *given: Any, **named: Any) -> None:
        write(folder, *given, **named)
        tensors = load_file(folder / "model.safetensors")
        change(tensors) if change else None
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_weights", writing)
    return merge(one.output, output, one.base, dtype="bfloat16")


def test_a_token_that_rounding_moves_to_another_expert_is_no_fault(
    one: ClassRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = merged(one, tmp_path / "out", None, monkeypatch, by_answers=False)
    assert done.manifest["parent"]["correctly_rounded"]
    assert done.manifest["parent"]["max_abs_logit_difference"] < 1
    assert "choices of experts" in done.notes[0]


@pytest.mark.slow
def test_by_its_own_choices_the_same_model_is_far_away(
    one: ClassRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def own_choices(*given: Any) -> Iterator[routing.RouterDifference]:
        yield routing.RouterDifference()

    monkeypatch.setattr(proof, "replayed_routing", own_choices)
    with pytest.raises(MergeError, match=r"logits are up to [1-9].* --dtype float32"):
        merged(one, tmp_path / "out", None, monkeypatch)


def _router(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith(".gate.weight"))


def _swap_experts(tensors: Tensors) -> None:
    name = _router(tensors)
    tensors[name] = tensors[name][[1, 0, 2, 3]].contiguous()


def _touch_router(tensors: Tensors) -> None:
    tensors[_router(tensors)][0, 0] *= 1.01


def _lose_expert(tensors: Tensors) -> None:
    tensors[next(name for name in tensors if ".experts.1." in name and name.endswith(".w2.weight"))].zero_()


def _lose_layer(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_swap_experts, "router 0 is not the base's"),
        pytest.param(_touch_router, "router 0 is not the base's", marks=pytest.mark.slow),
        pytest.param(_lose_expert, "a router's logits are up to", marks=pytest.mark.slow),
        pytest.param(_lose_layer, "from those of base and adapter", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_found_with_the_experts_of_base_and_adapter(
    one: ClassRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, said: str
) -> None:
    with pytest.raises(MergeError, match=said):
        merged(one, tmp_path / "out", change, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        ("model.layers.1.self_attn.o_proj.weight", 1.01),
        pytest.param("model.layers.1.self_attn.o_proj.weight", 1.05, marks=pytest.mark.slow),
        pytest.param("gate.weight", 1.01, marks=pytest.mark.slow),
        pytest.param("experts.2.w1.weight", 1.01, marks=pytest.mark.slow),
    ],
)
def test_a_small_fault_is_found_by_the_sums(
    one: ClassRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, factor: float
) -> None:
    def scale(tensors: Tensors) -> None:
        tensors[next(name for name in tensors if name.endswith(layer))] *= factor

    with pytest.raises(MergeError, match=rf"{layer} is not the rounded sum .* in [\d,]+ of"):
        merged(one, tmp_path / "out", scale, monkeypatch, by_answers=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_that_is_left_out_is_found(one: ClassRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "plan_merge", lambda *given: {})
    with pytest.raises(MergeError, match="from those of base and adapter"):
        merged(one, tmp_path / "out", None, monkeypatch)
