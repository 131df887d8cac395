"""CPU seconds and memory that the guard's look at a gradient takes, beside a LoRA step of the same run, in pairs.

Each side is a process of its own, and they take turns, so that a busy machine slows both. The weights are random:
their shapes alone count. Run it from a checkout: python benchmarks/guard.py --help
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from meters import memory
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.guarding.loss import LossSettings, columns_of
from pytest_mistral_lora.guarding.steps import LOSS, StepWatch

SIDES = ("without", "with")
SHAPES = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64},
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
}
_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 32768}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure pairs of processes, and print what the guard takes as shares of a step."""
    given = _options(arguments)
    if given.side:
        sys.stdout.write(json.dumps(side(given.side == "with", given)) + "\n")
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for pair in range(given.pairs):
        sys.stderr.write(f"pair {pair + 1} of {given.pairs}\n")
        for name in SIDES:
            runs[name].append(_in_process(name, given))
    found = summary(runs)
    table = Table("shape", *(name.replace("_", " ") for name in found), box=box.MARKDOWN)
    table.add_row(given.shape, *(f"{value:.4g}" for value in found.values()))
    Console(width=160).print(table)
    if given.json:
        given.json.write_text(json.dumps({"runs": runs, "summary": found}, indent=2) + "\n")


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return medians over the pairs: seconds of CPU time, shares of a step of the same run in percent, and MiB."""

    def share(name: str) -> float:
        return statistics.median(100 * run[name] / run["step"] for run in runs["with"])

    pairs = zip(runs["with"], runs["without"], strict=True)
    return {
        "CPU_seconds_of_a_step": statistics.median(run["step"] for run in runs["without"]),
        "positions,_%": share("positions"),
        "targets,_%": share("targets"),
        "a_step_with,_times": statistics.median(run["step"] / other["step"] for run, other in pairs),
        **{f"peak_MiB_{name}": statistics.median(run["memory"] for run in runs[name]) / 2**20 for name in SIDES},
    }


def side(is_guarded: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Take steps, each judged if they are guarded; return the medians of their CPU seconds without the first."""
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(MistralConfig(**SHAPES[given.shape], **_HEADS))
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).train()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    ids = torch.randint(10, _HEADS["vocab_size"], (given.rows, given.tokens))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(given.tokens) < given.tokens // 2, -100)}
    watch = StepWatch(model, lambda name: LossSettings.of_model(model, None, name)) if is_guarded else None
    seconds: list[dict[str, float]] = []
    with memory("cpu") as peak:
        for _ in range(given.steps + 1):
            seconds.append(_step(model, optimizer, batch, watch))
    medians = {name: statistics.median(step[name] for step in seconds[1:]) for name in seconds[0]}
    return {**medians, "memory": peak.peak - peak.before}


def _step(model: Any, optimizer: Any, batch: dict[str, torch.Tensor], watch: StepWatch | None) -> dict[str, float]:
    """Take a step, and judge it if it is watched; return the CPU seconds of the step itself, and of what judges it."""
    start = time.process_time()
    if watch is not None:
        watch.begin_step(is_judged=True)
        watch.begin_batch(batch)
    loss = model(**batch).loss
    if watch is not None:
        watch.end_batch()
    loss.backward()
    step, positions, targets = time.process_time() - start, 0.0, 0.0
    if watch is not None:
        [gradient] = watch._gradients.values()
        positions = _seconds(lambda: (columns_of(batch), (gradient != 0).any(-1)))
        targets = _seconds(lambda: _require_judged(watch)) - positions
    step += _seconds(lambda: (optimizer.step(), optimizer.zero_grad()))
    return {"step": step, "positions": positions, "targets": targets}


def _require_judged(watch: StepWatch) -> None:
    result = watch.results()[LOSS]
    if result.findings or result.not_checked:
        raise SystemExit(f"the step was not judged: {result}")


def _seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _in_process(name: str, given: argparse.Namespace) -> dict[str, Any]:
    numbers = [f"--{key}={getattr(given, key)}" for key in ("shape", "rows", "tokens", "steps")]
    command = [sys.executable, __file__, "--side", name, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="135M", help="the model; `quick` shows that the script works")
    add("--rows", type=int, default=4, help="rows of a batch")
    add("--tokens", type=int, default=256, help="tokens of a row, half of them with a label")
    add("--steps", type=int, default=3, help="steps of each process, without the first")
    add("--pairs", type=int, default=3)
    add("--json", type=Path, help="write all figures to this file")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
