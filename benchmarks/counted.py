"""What a training step of large bases launches, moves and keeps on GPUs, counted on tensors without memory.

No GPU is needed and none is asked: kernels, bytes and memory are counted, and the time is that of a roofline.
benchmarks/README.md says what the figures mean. Run it from a checkout: python benchmarks/counted.py --help
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_step import Count, FakeStep, Machine, fake_model, on_gpu
from rich import box
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.training.adapter import adapted_layers
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.step import StepSampler

DIMENSIONS = Path(__file__).parents[1] / "examples" / "recipes" / "dimensions.json"
BASES = {"7B": "mistral-7b-v0.3", "14B, Ministral 3": "ministral-3-8b", "24B, Small 3.2": "small-3.2-24b"}
"""The entry of each base in `DIMENSIONS`."""

LARGER = {"14B, Ministral 3": {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40}}
"""What a base has in place of its entry's sizes; by NVIDIA's code, the source of the entry."""

CARD = 80e9 * 0.94
"""Bytes of a card that tensors can have: CUDA and gaps take the rest."""

TARGETS = {"attention": "attention", "all layers": "all-linear"}
ROWS, STEPS = 8000, 40


@dataclass(frozen=True)
class Row:
    """The figures of a run.

    Attributes:
        base: The base.
        weights: The precision of its weights; computed in bf16.
        adapted: The layers with an adapter.
        cards: The number of cards.
        checkpointed: Whether activations are computed again, because a card would be too small without.
        launches: Kernels of a micro-batch and the optimizer's step on a card.
        gigabytes: What they read and write.
        products: Milliseconds of matrix products.
        attention: Milliseconds of attention.
        other: Milliseconds of all other kernels.
        exchange: Milliseconds to sum the gradients of the cards.
        useful: Share of a step in which a card has tokens of its own.
        tokens: Tokens a second of all cards.
        peak: GiB that a card has at a time at the most.
    """

    base: str
    weights: str
    adapted: str
    cards: int
    checkpointed: bool
    launches: int
    gigabytes: float
    products: float
    attention: float
    other: float
    exchange: float
    useful: float
    tokens: float
    peak: float

    @property
    def step(self) -> float:
        """Milliseconds of a micro-batch, the exchange and the optimizer's step, one after the other."""
        return self.products + self.attention + self.other + self.exchange


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, and write JSON where it is asked for."""
    given = _options(arguments)
    machine = Machine(given.product_tflops * 1e12, given.attention_tflops * 1e12, given.terabytes * 1e12, given.launch)
    bases = [*BASES][:1] if given.quick else [*BASES]
    useful = useful_share(given.batch_size, max(given.cards))
    found = [row for base in bases for row in _rows(base, given, machine, useful)]
    Console(width=200).print(_table(found))
    sys.stdout.write(
        f"counted, not measured: {given.product_tflops:g} TFLOP/s of products, {given.attention_tflops:g} of attention,"
        f" {given.terabytes:g} TB/s, {1e6 * given.launch:g} µs a launch, {given.exchange:g} GB/s between cards\n"
    )
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


def useful_share(batch_size: int, cards: int) -> float:
    """Return the mean share of a step in which a card has tokens, by the rows that this project deals to each.

    The lengths are drawn: half of the rows have more than 350 tokens, one in forty more than 1,700.
    """
    drawn = np.random.default_rng(0).lognormal(np.log(350), 0.8, ROWS)
    lengths = np.clip(drawn, 8, 4095).astype(np.int64)
    sampler = StepSampler(lengths, batch_size, processes=cards, seed=0)
    loads = np.array([lengths[share].sum() for share in sampler.shares(0, STEPS)]).reshape(STEPS, cards)
    return float((loads.mean(axis=1) / loads.max(axis=1)).mean())


def _rows(base: str, given: argparse.Namespace, machine: Machine, useful: float) -> Iterator[Row]:
    for weights in ("bf16", "nf4"):
        for adapted, targets in TARGETS.items():
            sys.stderr.write(f"{base}, {weights}, {adapted}\n")
            checkpointed, count, trained = False, *counted(base, given, machine, weights, targets)
            if count.most > CARD:
                checkpointed, count, _ = True, *counted(base, given, machine, weights, targets, checkpointed=True)
            for cards in given.cards:
                # each card sends and gets all but its own part, twice
                exchange = 2 * 4 * trained * (cards - 1) / cards / (given.exchange * 1e9)
                share = useful if cards > 1 else 1.0
                seconds = sum(count.seconds.values()) + exchange
                yield Row(
                    base,
                    weights,
                    adapted,
                    cards,
                    checkpointed,
                    sum(work.launches for work in count.work.values()),
                    sum(work.bytes for work in count.work.values()) / 1e9,
                    *(1e3 * count.seconds[kind] for kind in ("product", "attention", "other")),
                    1e3 * exchange,
                    share,
                    cards * given.tokens * share / seconds,
                    count.most / 2**30,
                )


def counted(
    base: str, given: argparse.Namespace, machine: Machine, weights: str, targets: str, *, checkpointed: bool = False
) -> tuple[Count, int]:
    """Return the count of a step with one row, and the number of trained values."""
    lora, mode = Lora(r=16, alpha=32, target_modules=(targets,)), FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(configuration(base, given.layers)))
        described = BaseFolder(Path(folder))
        layers = adapted_layers(described, lora.target_modules)
        how = {"nf4": weights == "nf4", "checkpointed": checkpointed}
        model = fake_model(described, lora, layers, "bf16", mode, **how)
    with on_gpu():
        count = FakeStep(model, [given.tokens], mode, machine).run()
    return count, sum(one.numel() for one in model.parameters() if one.requires_grad)


def configuration(base: str, layers: int | None = None) -> Mapping[str, Any]:
    """Return the `config.json` of a base, as far as a step depends on it.

    Args:
        base: A key of `BASES`.
        layers: The number of its layers; default: all.
    """
    data = json.loads(DIMENSIONS.read_text(encoding="utf-8"))
    config = data["recipes"][BASES[base]]["config"]
    text = config.get("text_config", config)
    text.update(LARGER.get(base, {}))
    if layers:
        text["num_hidden_layers"] = layers
    # FP8 weights are trained in bf16
    config.pop("quantization_config", None)
    if "vision_config" in config:
        config["vision_config"] = data["vision"][config["vision_config"]]["config"]
    return config


def _table(rows: Sequence[Row]) -> Table:
    table = Table("base", "weights", "adapted", box=box.MARKDOWN)
    names = ("cards", "launches", "GB", "products", "attention", "other", "exchange", "step, ms", "useful", "tokens/s")
    for name in (*names, "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        times = (row.products, row.attention, row.other, row.exchange, row.step)
        table.add_row(
            row.base,
            row.weights,
            row.adapted + ", checkpointed" * row.checkpointed,
            str(row.cards),
            f"{row.launches:,}",
            f"{row.gigabytes:,.0f}",
            *(f"{time:,.0f}" if time >= 10 else f"{time:.1f}" for time in times),
            f"{row.useful:.0%}",
            f"{row.tokens:,.0f}",
            f"{row.peak:.1f}",
        )
    return table


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=4096, help="tokens of a micro-batch, one row; default: 4096")
    add("--cards", type=int, nargs="+", default=[1, 8], help="numbers of cards; default: 1 8")
    add("--batch-size", type=int, default=64, help="rows of a step over all cards; default: 64")
    add("--layers", type=int, help="layers of each base; default: all of them")
    add("--product-tflops", type=float, default=650, help="operations of products in a second, in 10^12; default: 650")
    add("--attention-tflops", type=float, default=350, help="the same of attention; default: 350")
    add("--terabytes", type=float, default=2.6, help="memory that is read and written in a second; default: 2.6")
    add("--launch", type=float, default=2e-6, help="seconds of each launch; default: 2e-6")
    add("--exchange", type=float, default=360, help="GB that a card sends to others in a second; default: 360")
    add("--quick", action="store_true", help="two layers of the smallest base: shows that the script works")
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    given = parser.parse_args(arguments)
    if given.quick:
        given.layers = given.layers or 2
    return given


if __name__ == "__main__":
    main()
