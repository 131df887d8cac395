"""The tiny end-to-end train: the trainer's own code on a seeded tiny Mistral with the target's real tokenizer.

It runs once for a target and a session. What the checks need of it is written down as plain data, so that the
workers of pytest-xdist share one run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import MistralLoraError, TokenizerError
from pytest_mistral_lora.records.files import read_json, write_json
from pytest_mistral_lora.records.goldens import goldens_folder

if TYPE_CHECKING:
    from pytest_mistral_lora.training.run import RunResult

STEPS = 40
SEED_STEPS = 2
"""Steps of the runs that are only compared with one another, by their bytes."""


@dataclass(frozen=True, slots=True)
class TinyRun:
    """What a tiny run left.

    Attributes:
        folder: Where everything of the run is.
        evidence: What was seen while the trained model was in memory, as plain data.
        smoke: What a new process saw of the saved adapter, or why it did not come back.
    """

    folder: Path
    evidence: dict[str, Any]
    smoke: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The adapter folder."""
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        """The tiny base checkpoint."""
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        """The training rows."""
        return self.folder / "rows.jsonl"


def start(target: Target, work_folder: Path, *, device: str) -> subprocess.Popen[bytes] | None:
    """Start the tiny run of a target in a new process, for `tiny_run` to wait for; None if it has no tokenizer.

    What goes wrong there is not lost: `tiny_run` then does it again and says what.
    """
    try:
        file = target.oracle.path
    except TokenizerError:
        return None
    command = [sys.executable, "-m", __name__, str(file), str(work_folder), device]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tiny_run(oracle: Oracle, work_folder: Path, *, device: str) -> TinyRun:
    """Return the tiny run of a tokenizer, trained now or by another worker of this session.

    Args:
        oracle: The tokenizer.
        work_folder: Folder of the session.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        MistralLoraError: If the run fails; what it says is the cause.
    """
    folder = work_folder / f"train-{oracle.sha256[:12]}-{device}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "evidence.json").is_file():
            with _one_thread():
                _train(oracle, folder, device)
    evidence = read_json(folder / "evidence.json")
    return TinyRun(folder, evidence, evidence.pop("smoke"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread: the tiny model's operations are too small to share, and waiting for a busy core is slow."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(oracle: Oracle, folder: Path, device: str) -> None:
    from pytest_mistral_lora.checkpoint.tiny import write_tiny_base
    from pytest_mistral_lora.training.run import train

    folder.mkdir(exist_ok=True)
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", folder / "rows.jsonl")
    write_tiny_base(folder / "base", oracle.path)
    result = train(_recipe(folder, "adapter", device))
    evidence = {
        "changed_base_tensors": _changed_base_tensors(result),
        "unmoved_layers": _unmoved_layers(result),
        "losses": [line["loss"] for line in result.log if "loss" in line],
        "probe_sha256": result.probe.sha256,
        "label_logits": [list(row) for row in result.probe.label_logits],
        "ignored_gradient": _ignored_gradient(result),
        "seeds": _seeds(folder, device),
        "smoke": _in_a_new_process(folder, device),
    }
    write_json(folder / "evidence.json", evidence)


def _recipe(folder: Path, output: str, device: str, *, seed: int = 0, steps: int = STEPS) -> Any:
    from pytest_mistral_lora.records.identity import base_weights_sha256
    from pytest_mistral_lora.training.recipe import parse_recipe

    data = {
        "base": {"path": "base", "weights_sha256": base_weights_sha256(folder / "base")},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 8, "alpha": 16},
        "training": {
            "steps": steps,
            "learning_rate": 0.01,
            "schedule": "constant",
            "batch_size": 5,
            "micro_batch_size": 5,
            "logging_steps": 1,
            "seed": seed,
            "precision": "fp32",
            "device": device,
        },
        "output": output,
    }
    return parse_recipe(data, folder=folder, place="the tiny run's recipe")


def _changed_base_tensors(result: RunResult) -> list[str]:
    """Return the tensors of the base that training changed: there must be none."""
    import torch
    from safetensors.torch import load_file

    from pytest_mistral_lora.training.adapter import base_tensors

    before = load_file(result.base_folder / "model.safetensors")
    after = base_tensors(result.model)
    same = {name for name in before if name in after and torch.equal(before[name], after[name].cpu())}
    return sorted((before.keys() | after.keys()) - same)


def _unmoved_layers(result: RunResult) -> list[str]:
    import torch

    initial = result.adapter.initial
    return [name for name, tensor in result.adapter.tensors.items() if torch.equal(tensor, initial[name])]


def _ignored_gradient(result: RunResult) -> float:
    """Return the largest gradient of the loss by a logit that predicts a token without loss: 0.0 is right."""
    from pytest_mistral_lora.training.data import PadRight, RowDataset
    from pytest_mistral_lora.training.loop import supervised_losses

    dataset = RowDataset(result.data.train.encoded)
    batch = PadRight(0)([dataset[index] for index in range(len(dataset))])
    return largest_ignored_gradient(supervised_losses, result.model, batch)


def largest_ignored_gradient(losses: Callable[..., Any], model: Any, batch: dict[str, Any]) -> float:
    """Return the largest gradient of a loss by a logit whose next label is -100.

    Args:
        losses: The trainer's loss: from a model and a batch to the losses and their rows.
        model: A causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, each `(batch, length)` int64.
    """
    kept: dict[str, Any] = {}

    def all_logits(**inputs: Any) -> Any:
        # the loss asks for the logits of some columns; their gradient is looked at among all of them
        columns = inputs.pop("logits_to_keep", slice(None))
        output = model(**inputs)
        kept["logits"] = output.logits
        kept["logits"].retain_grad()
        output.logits = output.logits[:, columns]
        return output

    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    losses(all_logits, batch)[0].sum().backward()
    gradient = kept["logits"].grad.abs().amax(dim=-1)
    ignored = batch["labels"].new_full(batch["labels"].shape, True, dtype=bool)
    ignored[:, :-1] = batch["labels"][:, 1:] == IGNORE_INDEX
    return float(gradient[ignored].max().item())


def _seeds(folder: Path, device: str) -> dict[str, Any]:
    """Train three times for a moment: twice with one seed, once with another; return how the adapters compare."""
    import torch

    from pytest_mistral_lora.records.hashing import sha256_file
    from pytest_mistral_lora.training.run import train

    seen: dict[str, Any] = {}
    tensors = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.rand(17)  # whatever a process drew before must not matter
        result = train(_recipe(folder, f"seed-{name}", device, seed=seed, steps=SEED_STEPS))
        seen[name] = sha256_file(result.output / "adapter_model.safetensors")
        tensors[name] = result.adapter.tensors
    pairs = [(tensor, tensors["again"][key]) for key, tensor in tensors["first"].items()]
    return {**seen, "farthest": max(float((one - two).abs().max()) for one, two in pairs)}


def _in_a_new_process(folder: Path, device: str) -> dict[str, Any]:
    out = folder / "smoke.json"
    command = [sys.executable, "-m", "pytest_mistral_lora.training.smoke", str(folder / "adapter")]
    command += ["--base", str(folder / "base"), "--rows", str(folder / "rows.jsonl"), "--json", str(out)]
    command += ["--max-new-tokens", "64", "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise MistralLoraError(
            f"the saved adapter cannot be used in a new process (exit code {process.returncode}): {process.stderr}",
            place=str(folder / "adapter"),
        )
    return dict(read_json(out))


if __name__ == "__main__":
    tiny_run(Oracle(sys.argv[1]), Path(sys.argv[2]), device=sys.argv[3])
