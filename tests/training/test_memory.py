"""What is done where memory runs out: on a CPU, under a limit that the kernel keeps."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from tiny_runs import MakeRecipe, recipe_data, rows_of, trainer_of, write_rows
from transformers import TrainerCallback

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.cli import train as train_verb
from pytest_mistral_lora.errors import MemoryShortageError, TrainingError
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.step.forward import attend_in_segments
from pytest_mistral_lora.training.step.memory_need import MemoryNeed, measure_need, memory_savings


@pytest.fixture(scope="module")
def need(base: Path) -> MemoryNeed:
    lora = Lora()
    folder = BaseFolder(base)
    model = attach_adapter(load_base(folder, "fp32", "cpu"), lora, adapted_layers(folder, lora.target_modules), seed=0)
    attend_in_segments(model)
    return measure_need(model)


def test_the_need_is_counted_on_the_model(need: MemoryNeed, base: Path) -> None:
    model = load_base(BaseFolder(base), "fp32", "cpu")
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert need.base == sum(one.nbytes for one in model.parameters())
    assert need.quantisable == 4 * need.values < need.base
    assert need.checkpointed.head < need.checkpointed.backward < need.plain.backward
    # at the least, what each layer's projections and its MLP were given, in float32
    assert need.plain.head > 4 * layers * (4 * width + 2 * model.config.intermediate_size)
    assert need.plain.backward < 4 * layers * 40 * (width + model.config.intermediate_size)


def test_ways_are_in_the_order_of_least_harm_and_less_is_less(need: MemoryNeed) -> None:
    # so many tokens that the activations need more than the logits, of which a part is made at a time
    limit = need.total(8000)
    found = list(memory_savings(need, limit, tokens=20000, longest=10000, checkpointed=False))
    assert [way.setting.partition(":")[0].partition(" ")[0] for way in found] == [
        "training.micro_batch_tokens",
        "training.activation_checkpointing",
        "sharding",
        "base.quantization",
    ]
    assert found[0].bytes > limit >= found[1].bytes
    assert need.total(20000) > found[0].bytes
    tight = list(memory_savings(need, need.total(10, checkpointed=True), tokens=500, longest=500, checkpointed=True))
    assert [way.setting for way in tight][-1] == "rows of at most 10 tokens, checkpointed"


def gives_way(trainer: Any, *, above: int, spared: int = 0) -> list[int]:
    """Let the device have no room for passes of more tokens, but for the first ones; return what was fed."""
    fed: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        fed.append(kwargs["input_ids"].shape[1])
        if len(fed) > spared and fed[-1] > above and not (above < 0 and checkpointed()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def checkpointed() -> bool:
        return any(getattr(one, "gradient_checkpointing", False) for one in trainer.model.modules())

    trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
    return fed


class KeepGradients(TrainerCallback):
    """Keeps the gradients of each step, after they are clipped and before the optimizer takes them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = kwargs["model"].named_parameters()
        self.steps.append({name: one.grad.clone() for name, one in found if one.grad is not None})


def test_shrinking_changes_no_gradient(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    # gradients, not weights: Adam makes a full step of a gradient that is almost nothing, whatever its size
    settings = {"steps": 3, "dry_run": False, "on_oom": "shrink", "micro_batch_tokens": 70}
    plain = trainer_of(make_recipe(training=settings), base, tmp_path)
    plain.add_callback(expected := KeepGradients())
    plain.train()
    short = trainer_of(make_recipe(training=settings), base, tmp_path)
    short.add_callback(found := KeepGradients())
    # the second pass fails, when the first has left gradients
    fed = gives_way(short, above=40, spared=1)
    short.train()
    assert max(fed[2:]) <= 40 < min(fed[:2])
    assert short.memory_changes
    assert all(
        one.startswith("micro_batch_tokens: ") and one.endswith("from step 1 on") for one in short.memory_changes
    )
    assert len(found.steps) == len(expected.steps) == 3
    for step, (shrunk, whole) in enumerate(zip(found.steps, expected.steps, strict=True)):
        assert shrunk.keys() == whole.keys()
        for name, tensor in whole.items():
            assert (shrunk[name] - tensor).norm() <= 5e-3 * tensor.norm(), f"step {step}: {name}"


def test_where_a_single_row_does_not_fit_activations_are_checkpointed(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(
        make_recipe(training={"steps": 1, "micro_batch_tokens": 1, "on_oom": "shrink"}), base, tmp_path
    )
    gives_way(trainer, above=-1)
    trainer.train()
    assert trainer.memory_changes == ["activation_checkpointing: true from step 1 on"]
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_stopping_says_what_would_fit(make_recipe: MakeRecipe, base: Path, tmp_path: Path, dry_run: bool) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 1, "dry_run": dry_run}), base, tmp_path)
    before = adapter_tensors(trainer.model)
    gives_way(trainer, above=60)
    with pytest.raises(MemoryShortageError) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith("a dry run of the largest micro-batch" if dry_run else "step 1")
    assert "Tried to allocate 2.00 GiB" in said
    assert said.index("micro_batch_tokens") < said.index("activation_checkpointing") < said.index("sharding")
    last = said.splitlines()[-1]
    assert "training.on_oom: shrink" in last
    assert "--resume" in last
    assert caught.value.exit_code == 3
    after = adapter_tensors(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dry_run", [None, True, False])
def test_a_layer_without_a_gradient_is_refused_before_the_first_step(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, dry_run: bool | None
) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 1, "dry_run": dry_run}), base, tmp_path)
    # nothing that the layer computes reaches the loss: as an adapter on a vision tower, or behind a zero matrix
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    layer.register_forward_hook(lambda module, given, output: output.detach())
    if dry_run is False:
        trainer.train()  # as before: a step, and no word of it
        return
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.self_attn\.v_proj gets no gradient") as caught:
        trainer.train()
    assert str(caught.value.place) == "lora.target_modules"
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("steps", "tries"), [(20, 0), (21, 1)])
def test_a_short_run_spends_nothing_on_a_dry_run(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, steps: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe(training={"steps": steps, "batch_size": 1}), base, tmp_path)
    tried: list[str] = []
    own = trainer._attempt
    monkeypatch.setattr(trainer, "_attempt", lambda action, *given: tried.append(action) or own(action, *given))
    trainer.train()
    assert len(tried) == steps + tries
    assert sum(action.startswith("a dry run") for action in tried) == tries


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_dry_run_feeds_as_many_tokens_as_the_largest_micro_batch_of_the_run(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, share_prefix: bool
) -> None:
    # the longest rows do not fit together: shorter ones of one step do
    words = [24, 24, 23, 5, 6, 7]
    rows = [[("user", "a " * number), ("assistant", "b " * (30 - number // 2))] for number in words]
    # of these, two are the most tokens if each has its prompt, and few if they share it
    rows += [[("user", "c " * 29), ("assistant", f"{answer} " * 5)] for answer in "xyz"]
    write_rows(tmp_path / "rows.jsonl", rows)
    training = {
        "steps": 9,
        "batch_size": 4,
        "micro_batch_tokens": 81,
        "dry_run": True,
        "share_prefix": share_prefix,
        "seed": 3,  # an order in which the first step is not the largest
    }
    trainer = trainer_of(make_recipe(training=training), base, tmp_path)
    fed = gives_way(trainer, above=10_000)
    trainer.train()
    tried, *real = fed
    assert tried == max(real)
    longest = max(row.num_input_tokens for row in rows_of(trainer))
    assert tried > longest > 81 / 2


@pytest.mark.parametrize("optimizer_has_moments", [False, True])
def test_a_dry_run_has_the_optimizers_moments_beside_it(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, optimizer_has_moments: bool
) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 1, "dry_run": False}), base, tmp_path)
    trainer.train()
    if not optimizer_has_moments:
        trainer.optimizer.state.clear()
    alive: list[int] = []

    def look(*given: Any) -> None:
        gc.collect()
        alive.append(sum(one.nbytes for one in gc.get_objects() if type(one) is torch.Tensor and not one.requires_grad))

    hook = trainer.model.get_base_model().model.register_forward_pre_hook(look)
    trainer.state.max_steps = 2
    trainer.try_largest()
    hook.remove()
    look()
    trained = sum(one.nbytes for one in trainer.model.parameters() if one.requires_grad)
    held = alive[0] - alive[1]
    assert (held >= 2 * trained) is not optimizer_has_moments


def test_a_dry_run_changes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    hashes = []
    for dry_run in (True, False):
        recipe = make_recipe(training={"steps": 3, "dry_run": dry_run}, lora={"dropout": 0.1})
        result = train(recipe.model_copy(update={"output": tmp_path / str(dry_run)}))
        hashes.append(result.manifest["lora"]["tensors_sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("torch_version", "name"), [("2.6.0+cu124", "PYTORCH_CUDA_ALLOC_CONF"), ("2.13.0", "PYTORCH_ALLOC_CONF")]
)
@pytest.mark.parametrize("chosen", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_grow_unless_you_have_configured_them(
    torch_version: str, name: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {chosen: "max_split_size_mb:128"} if chosen else {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(train_verb, "version", lambda package: torch_version)
    train_verb.let_memory_grow()
    assert environment == ({chosen: "max_split_size_mb:128"} if chosen else {name: "expandable_segments:True"})


LIMITED = """
import resource, sys
from pathlib import Path
from pytest_mistral_lora.training import run
from pytest_mistral_lora.cli import main

own = run.make_trainer
def limited(*given, **named):
    trainer = own(*given, **named)
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]) * 2**20,) * 2)
    return trainer
run.make_trainer = limited
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("on_oom", "code"), [("stop", 3), ("shrink", 0)])
def test_a_limit_of_the_kernel(on_oom: str, code: int, base: Path, tmp_path: Path) -> None:
    """80 rows of 400 tokens at once need more than the limit allows; a few at a time do not."""
    write_rows(
        tmp_path / "rows.jsonl", [[("user", f"{index} " * 180), ("assistant", "yes " * 20)] for index in range(80)]
    )
    data = recipe_data(base, training={"steps": 1, "batch_size": 80, "micro_batch_tokens": 100_000, "on_oom": on_oom})
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    done = run_forked([sys.executable, "-c", LIMITED, tmp_path / "recipe.yaml", "600"])
    assert done.returncode == code, done.stderr
    if code:
        failure = json.loads((tmp_path / "out.work" / "failure.json").read_text())
        assert failure["exit_code"] == 3
        assert "training.micro_batch_tokens" in failure["advice"]
        assert "fits" in done.stderr
        assert not (tmp_path / "out").exists()
    else:
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert "micro_batch_tokens" in manifest["training"]["memory_relief"][0]
