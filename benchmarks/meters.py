"""What is measured of a training run: time, memory, and the machine's own limit. Needs torch, transformers, psutil."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

Row = Mapping[str, Sequence[int]]
"""`input_ids` and `labels`, -100 where there is no loss."""

_SAMPLING_SECONDS = 0.01
_GEMM_ROUNDS = 5


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step ended; the time between two ends holds everything, data loading included.

    Attributes:
        wall: Seconds of each step by the clock.
        cpu: Seconds of each step of CPU time of this process, all threads together.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note a step."""
        wall, cpu = self._now()
        self.wall.append(wall - self._last[0])
        self.cpu.append(cpu - self._last[1])
        self._last = wall, cpu

    def _now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


@dataclass
class Peak:
    """Memory in bytes.

    Attributes:
        before: What was taken when the block was entered.
        peak: The most that was taken in it.
    """

    before: int
    peak: int


@contextmanager
def memory(device: str) -> Iterator[Peak]:
    """Watch the memory of a block: torch's allocator on a GPU, the resident set of this process on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        found = Peak(torch.cuda.memory_allocated(), 0)
        yield found
        found.peak = torch.cuda.max_memory_allocated()
        return
    process = psutil.Process()
    found = Peak(process.memory_info().rss, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            found.peak = max(found.peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def tokens(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many tokens rows have, and how many of them are predicted under loss."""
    rows = list(rows)
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "supervised": sum(label != -100 for row in rows for label in row["labels"][1:]),
    }


def needed_flops(config: Any, rank: int, rows: Sequence[Row]) -> float:
    """Return the floating-point operations that a pass over these rows cannot do without.

    Two for each multiplication of the forward pass; as many again for the gradient of the inputs, and, for the adapter
    alone, for that of the weights. Causal attention is counted without its masked half, the head only where there is
    loss; norms, activations and the optimizer are left out. The adapter is on q, k, v and o.
    """
    shapes, layers = linear_shapes(config), config.num_hidden_layers
    weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    adapter = rank * sum(sum(shapes[name]) for name in "qkvo")
    count = tokens(rows)
    # scores, and values mixed by them: n * n / 2 products each of the queries' width, twice that backward
    attention = 6 * shapes["q"][0] * sum(len(row["input_ids"]) ** 2 for row in rows)
    head = 4 * config.hidden_size * config.vocab_size * count["supervised"]
    return layers * (count["tokens"] * (4 * weights + 6 * adapter) + attention) + head


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return the shape of each weight of a decoder layer: outputs, inputs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = head * config.num_attention_heads, head * config.num_key_value_heads
    attention = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    return {**attention, "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


def possible_flops(config: Any, count: int, device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of the layer's own matrix products, nothing else between them.

    Each shape is multiplied with `count` tokens some times, and its fastest time counts.
    """
    done = seconds = 0.0
    for outputs, width in linear_shapes(config).values():
        weight = torch.randn(outputs, width, device=device, dtype=dtype)
        inputs = torch.randn(count, width, device=device, dtype=dtype)
        done += 2 * outputs * width * count
        seconds += min(_product_seconds(inputs, weight) for _ in range(_GEMM_ROUNDS))
    return done / seconds


def _product_seconds(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    if inputs.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.nn.functional.linear(inputs, weight)
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
