"""Steps of a model with the layers of a 7B base, without its weights: their time, memory and waits for the GPU."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.adapter import attach_adapter, lora_config
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.memory import RunMemory
from pytest_mistral_lora.training.recipe import Lora, Recipe, parse_recipe

OURS = "this trainer"
WARM, MEASURED = 3, 5
"""Steps before the measurement, and measured ones."""

TARGETS = ("attention", "all-linear")
"""`lora.target_modules` of the two measurements."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of its steps.

    Attributes:
        config: The model's `config.json`.
        tokens: Tokens of a step: one row, all of it supervised.
    """

    config: Mapping[str, Any]
    tokens: int


SEVEN_B = Shape(
    {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    4096,
)
"""Four of the 32 layers of Mistral 7B v0.3, its embeddings and its head."""


@dataclass(frozen=True)
class ShapeResult:
    """What steps of a shape took.

    Attributes:
        contestant: `OURS`, or the title of another trainer.
        targets: The layers that have an adapter.
        step_seconds: Median time of a step.
        tokens_a_second: Supervised tokens a second.
        peak_bytes: Most bytes that the allocator gave to tensors at one time; None on a CPU.
        estimated_bytes: The estimate of `check --device-memory` for it; None for another trainer.
        estimated_seconds: Time of the step's products at the speed of one large product on this device.
        waits: How often a step waited for the GPU; None on a CPU.
        failed: Why there is no figure; empty otherwise.
    """

    contestant: str
    targets: str
    step_seconds: float | None = None
    tokens_a_second: float | None = None
    peak_bytes: int | None = None
    estimated_bytes: int | None = None
    estimated_seconds: float | None = None
    waits: int | None = None
    failed: str = ""


class _Clock(TrainerCallback):
    """Takes the time of each step, and counts the waits of one of them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._begin = 0.0
        self._counting: Any = None
        self.seconds: list[float] = []
        self.waits: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
            if state.global_step == WARM - 1:
                self._counting = _waits_counted()
                self._found = self._counting.__enter__()
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self.waits, self._counting = len(self._found), None
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


@contextmanager
def _waits_counted() -> Iterator[list[warnings.WarningMessage]]:
    """Yield a list that gets a warning for each wait for the GPU within the block."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Steps:
    """Steps to be timed.

    Attributes:
        model: The model without an adapter, on its device.
        lora: PEFT's configuration of the adapter.
        ids: The ids of the row of each step, all of them supervised.
        device: `cuda` or `cpu`.
        folder: An empty folder.
    """

    model: Any
    lora: LoraConfig
    ids: Sequence[Sequence[int]]
    device: str
    folder: Path


MakeLoop = Callable[[Steps], Any]
"""Makes a loop with transformers' callbacks and `train()`."""


def measure(
    shape: Shape, *, device: str, targets: str = "attention", peers: Mapping[str, MakeLoop | None] | None = None
) -> list[ShapeResult]:
    """Return what steps of a shape take: with this trainer, and with others.

    Args:
        shape: The shape.
        device: `cuda`, or `cpu` to try the measurement itself.
        targets: `lora.target_modules` of the recipe.
        peers: The other trainers by their titles; None for one that is not installed.
    """
    found = []
    for contestant, make in {OURS: None, **(peers or {})}.items():
        if make is None and contestant != OURS:
            found.append(ShapeResult(contestant, targets, failed="not installed"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found.append(_measured(contestant, make, shape, device, targets, Path(folder)))
            except Exception as error:  # of a driver or a kernel, or for want of memory: the trial looks for it
                found.append(ShapeResult(contestant, targets, failed=f"{type(error).__name__}: {error}"[:500]))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _recipe(shape: Shape, device: str, targets: str, folder: Path) -> tuple[Recipe, BaseFolder]:
    base = folder / "base"
    base.mkdir()
    write_json(base / "config.json", dict(shape.config))
    data = {
        "base": {"path": "base", "weights_sha256": "0" * 64, "name": "shape"},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 16, "alpha": 32, "target_modules": targets},
        "training": {
            "steps": WARM + MEASURED,
            "batch_size": 1,
            "micro_batch_tokens": shape.tokens,
            "max_length": shape.tokens + 1,
            "precision": "bf16",
            "device": device,
            "dry_run": False,
            "checkpoint_steps": None,
            "checkpoint_minutes": 1000,
        },
        "output": "out",
    }
    return parse_recipe(data, folder=folder), BaseFolder(base)


def _model(base: BaseFolder, device: str) -> Any:
    config = AutoConfig.from_pretrained(base.path)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _ids(shape: Shape) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape_of_ids = (WARM + MEASURED, shape.tokens + 1)
    return torch.randint(3, int(shape.config["vocab_size"]), shape_of_ids, generator=generator).tolist()


def _measured(
    contestant: str, make: MakeLoop | None, shape: Shape, device: str, targets: str, folder: Path
) -> ShapeResult:
    recipe, base = _recipe(shape, device, targets, folder)
    layers = planned_layers(base, recipe.lora)
    model, ids, estimate = _model(base, device), _ids(shape), None
    if make is None:
        rows = [EncodedRow(tuple(row), tuple(row), ()) for row in ids]
        adapted = attach_adapter(model, recipe.lora, layers, seed=0)
        loop: Any = make_trainer(adapted, recipe.training, rows, [], work=folder / "work")
        estimate = RunMemory(base, recipe, layers, "bf16", device == "cuda", shape.tokens).total
    else:
        loop = make(Steps(model, lora_config(recipe.lora, layers), ids, device, folder))
    found = _taken(contestant, targets, shape, device, loop, estimate)
    seconds = operations_of_a_step(base, shape, recipe.lora, layers) / product_speed(shape, device)
    return replace(found, estimated_seconds=seconds)


def operations_of_a_step(base: BaseFolder, shape: Shape, lora: Lora, layers: Sequence[str]) -> int:
    """Return the multiplications and additions of a step's products, attention included.

    A product by a frozen weight is made forward, and backward for its input; those of the adapter also for its weight.
    Attention is causal, and its backward pass has five products for two (FlashAttention, arXiv:2205.14135).

    Args:
        base: The base checkpoint; only its configuration is read.
        shape: The sizes.
        lora: The recipe's adapter.
        layers: The adapted layers.
    """
    model, config = base.empty_model(), base.model_config().get_text_config()
    linear = {name: one.weight for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    frozen = sum(weight.numel() for weight in linear.values())
    adapter = sum(lora.r * sum(linear[name].shape) for name in layers)
    heads = config.num_attention_heads * config.head_dim
    attention: int = 2 * shape.tokens**2 // 2 * heads * config.num_hidden_layers
    products: int = 2 * shape.tokens * (2 * frozen + 3 * adapter)
    return products + (2 + 5) * attention


def product_speed(shape: Shape, device: str, repeats: int = 10) -> float:
    """Return the operations a second of a product of a shape's MLP in bf16, the fastest of some tries."""
    sizes = (int(shape.config["hidden_size"]), int(shape.config["intermediate_size"]))
    x = torch.ones(shape.tokens, sizes[0], dtype=torch.bfloat16, device=device)
    weight = torch.ones(*sizes, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        x @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * shape.tokens * sizes[0] * sizes[1] / min(seconds)


def _taken(contestant: str, targets: str, shape: Shape, device: str, trainer: Any, estimate: int | None) -> ShapeResult:
    """Train, and return the figures."""
    clock = _Clock(device)
    trainer.add_callback(clock)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = sorted(clock.seconds[WARM:])[MEASURED // 2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return ShapeResult(contestant, targets, seconds, shape.tokens / seconds, peak, estimate, waits=clock.waits)
