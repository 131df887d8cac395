"""The tiny runs of a GPU trial, each in a process of its own, and their verdicts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.errors import MachineError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.gpu_trial.reference import PRECISIONS, RecordedRuns, versions

STEPS = 8
SECONDS = 240
"""Longest time of one run: a tiny one takes some ten, most of them for imports."""

CHILD = "pytest_mistral_lora.training.gpu_trial.child"
Outcome = Literal["passed", "failed", "not checked"]
RECORDED, COMPUTED = "recorded", "computed here"
"""The two kinds of runs on a CPU with which a run is compared."""


@dataclass(frozen=True)
class Trial:
    """One tiny run on the GPU.

    Attributes:
        name: Its name.
        shows: What it shows.
        training: Settings of the recipe's `training`.
        base: Settings of the recipe's `base`.
        lora: Settings of the recipe's `lora`.
        package: A package that it needs; empty for none.
        is_exact: Whether its losses are those of the run in fp32 on a CPU with the same `lora`, but for rounding.
        is_resumed: Whether it is stopped after its first step, and resumed.
        launcher: Arguments of `accelerate launch`, for all GPUs; empty for one process.
        needs_bf16: Whether the GPU must compute in bf16.
        module: The module that trains it, and takes the paths of the recipe and of the evidence.
        options: Options of that module.
    """

    name: str
    shows: str
    training: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    is_exact: bool = True
    is_resumed: bool = False
    launcher: tuple[str, ...] = ()
    needs_bf16: bool = True
    module: str = CHILD
    options: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The precision of its base."""
        return str(self.training["precision"])

    def lacks(self, device: str, devices: int, *, has_bf16: bool) -> str:
        """Return why this machine cannot run it; empty if it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs_bf16 and not has_bf16:
            return "this GPU does not compute in bf16"
        if self.launcher and devices < 2:
            return "there is one GPU"
        if device == "cpu" and (self.precision == "fp16" or self.training.get("kernels")):
            return "it needs a GPU"
        return ""


_BF16 = {"precision": "bf16"}
_PATTERNS = {"layers_to_transform": [1], "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"down_proj": 8}}
_DDP = ("--multi_gpu",)
_FSDP2 = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
)
TRIALS = (
    Trial("fp32", "losses and gradients of the CPU", {"precision": "fp32"}, needs_bf16=False),
    Trial("bf16", "packed rows; rounding explains the distance", _BF16),
    Trial("fp16", "the loss is scaled, and no step is lost", {"precision": "fp16"}, needs_bf16=False),
    Trial("rows alone", "packed rows do not see one another", {**_BF16, "micro_batch_tokens": 1}),
    Trial("checkpointed", "activations computed twice", {**_BF16, "activation_checkpointing": True}),
    Trial("shared prefix", "rows that begin alike share passes", {**_BF16, "share_prefix": True}),
    Trial("DoRA", "PEFT's own layers", _BF16, lora={"dora": True}),
    Trial("head in full", "a head that is trained", _BF16, lora={"modules_to_save": ["lm_head"]}),
    Trial("patterns", "layers, ranks and alphas of their own", _BF16, lora=_PATTERNS),
    Trial("nf4", "a base in 4 bits", _BF16, base={"quantization": "nf4"}, package="bitsandbytes", is_exact=False),
    Trial("8-bit AdamW", "moments in 8 bits", {**_BF16, "optimizer": "adamw_8bit"}, package="bitsandbytes"),
    Trial("Liger", "fused kernels", {**_BF16, "kernels": "liger"}, package="liger_kernel"),
    Trial("resumed", "a run that went on from its first step", _BF16, is_resumed=True),
    Trial("DDP", "all GPUs", _BF16, launcher=_DDP),
    Trial("FSDP2", "the base shared by all GPUs", _BF16, launcher=_FSDP2),
)


@dataclass(frozen=True)
class TrialResult:
    """What a tiny run showed.

    Attributes:
        name: The name of the trial.
        shows: What the trial shows.
        outcome: Its verdict.
        reason: The reason of a failure, or why it was not checked; else empty.
        losses: The loss of each step, in nats a token.
        gradient_norms: The L2 norm of the gradients of each step.
        loss_distance: Largest distance of a loss from that of the run in fp32 on the CPU, in nats; None if it is not
            compared.
        gradient_distance: The same for the gradient norms, relative.
        compared_with: `RECORDED` or `COMPUTED`; empty if it is not compared with a run on a CPU.
        recorded_distance: Largest distance of a loss from that of the recorded run in the same precision, in nats; None
            if there is none.
        peak_bytes: Most bytes that the GPU's allocator gave to tensors at one time; None on a CPU.
        seconds: Time of the steps.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    shows: str = ""
    losses: Sequence[float] = ()
    gradient_norms: Sequence[float] = ()
    loss_distance: float | None = None
    gradient_distance: float | None = None
    compared_with: str = ""
    recorded_distance: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        """The outcome, with its reason."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome


_PROMPT = "You answer questions about a shop that sells boats, kindly and in one sentence."
_ROWS = [
    {
        "messages": [
            {"role": "system", "content": _PROMPT},
            {"role": "user", "content": f"How many boats of kind {number} are there?{' Please.' * (number % 5)}"},
            {"role": "assistant", "content": f"There are {number * 7 % 11} of them{' now' * (number % 4)}."},
        ]
    }
    for number in range(24)
]


class Trials:
    """The trials of a device, each beside the run in fp32 on the CPU.

    Args:
        folder: An empty folder for bases, recipes and runs.
        device: `cuda`; `cpu` tries the trials themselves.
        devices: The number of GPUs.
        has_bf16: Whether the device computes in bf16.
        reference: The recorded runs; None to compute them here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        devices: int,
        has_bf16: bool,
        reference: RecordedRuns | None = None,
    ) -> None:
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer
        from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
        from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

        self._folder, self._device, self._devices, self._has_bf16 = folder, device, devices, has_bf16
        self._base = write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
        self._weights_sha256 = BaseFolder(self._base).weights_sha256
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
        self.base_weights_sha256 = self._weights_sha256
        self._recorded = reference
        # several trials compare with the same run
        self._found: dict[str, Mapping[str, Any] | str] = {}

    @property
    def differences(self) -> tuple[str, ...]:
        """Why the recorded runs are computed again here; empty if they need not be."""
        if self._recorded is None:
            return ("none is recorded",)
        return self._recorded.differences(self._weights_sha256)

    def run(self, trial: Trial) -> TrialResult:
        """Run a trial, and judge it."""
        return replace(self._judged(trial), shows=trial.shows)

    def _judged(self, trial: Trial) -> TrialResult:
        if reason := trial.lacks(self._device, self._devices, has_bf16=self._has_bf16):
            return TrialResult(trial.name, "not checked", reason)
        found = self._train(trial, self._device)
        if isinstance(found, str):
            return TrialResult(trial.name, "failed", found)
        is_recorded = self._recorded_run(trial) is not None and not self.differences
        references = []
        for precision in ("fp32", "bf16"):
            reference = self._reference(trial, precision, is_recorded=is_recorded)
            if isinstance(reference, str):
                return TrialResult(trial.name, "not checked", f"the run on the CPU in {precision} failed: {reference}")
            references.append(reference)
        uninterrupted = None
        if trial.is_resumed:
            whole = self._train(replace(trial, is_resumed=False), self._device)
            uninterrupted = None if isinstance(whole, str) else whole
        result = judge(trial, found, *references, uninterrupted=uninterrupted)
        if not trial.is_exact or trial.is_resumed or result.loss_distance is None:
            return result
        with_which = RECORDED if is_recorded else COMPUTED
        of_record = self._recorded_run(trial)
        distance = None if of_record is None else _distance(result.losses, of_record["losses"])
        return replace(result, compared_with=with_which, recorded_distance=distance)

    def _recorded_run(self, trial: Trial) -> Mapping[str, Any] | None:
        """Return the recorded run in a trial's precision; None without one: only plain LoRA of this trainer has one."""
        is_plain = trial.module == CHILD and not trial.lora
        return None if self._recorded is None or not is_plain else self._recorded.runs[trial.precision]

    def _reference(self, trial: Trial, precision: str, *, is_recorded: bool) -> Mapping[str, Any] | str:
        """Return the evidence of the run on a CPU, or why it failed."""
        if is_recorded and self._recorded is not None:
            return self._recorded.runs[precision]
        same = Trial(precision, "", {"precision": precision}, lora=trial.lora, module=trial.module)
        return self._train(same, "cpu")

    def record(self) -> RecordedRuns:
        """Compute the runs on this CPU that a reference has, and return it.

        Raises:
            MachineError: If one fails.
        """
        import torch

        runs: dict[str, Mapping[str, Sequence[float]]] = {}
        for precision in PRECISIONS:
            # accelerate refuses fp16 on a CPU: the recipe is in fp32, and the module trains it in fp16
            trial = Trial(precision, "", {"precision": precision})
            if precision == "fp16":
                trial = Trial(precision, "", {"precision": "fp32"}, options=("--fp16-on-cpu",))
            found = self._train(trial, "cpu")
            if isinstance(found, str):
                raise MachineError(f"the run in {precision} failed: {found}", place="the tiny run on the CPU")
            runs[precision] = {key: found[key] for key in ("losses", "gradient_norms")}
        return RecordedRuns(versions(), torch.backends.cpu.get_cpu_capability(), self._weights_sha256, runs)

    def _train(self, trial: Trial, device: str) -> Mapping[str, Any] | str:
        """Return the evidence of a run, or why it failed; runs of the same settings are made once."""
        # the name and the rest of its words decide nothing
        key = f"{device} {replace(trial, name='', shows='', is_exact=True, needs_bf16=True)}"
        if key not in self._found:
            self._found[key] = self._run(trial, device)
        return self._found[key]

    def _run(self, trial: Trial, device: str) -> Mapping[str, Any] | str:
        work = self._folder / str(len(self._found))
        work.mkdir()
        recipe = {
            "base": {"path": "../base", "weights_sha256": self._weights_sha256, "name": "tiny", **trial.base},
            "data": {"train": ["../rows.jsonl"]},
            "lora": {"r": 8, "alpha": 16, "target_modules": "all-linear", **trial.lora},
            "training": {
                "steps": STEPS,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "logging_steps": 1,
                "device": device,
                **trial.training,
            },
            "output": "out",
        }
        write_json(work / "recipe.json", recipe)
        evidence = work / "evidence.json"
        module = ["-m", trial.module, str(work / "recipe.json"), str(evidence), *trial.options]
        launch = [sys.executable, *module]
        if trial.launcher:
            number = ("--num_processes", str(self._devices), "--num_machines", "1", "--mixed_precision", "no")
            launch = [sys.executable, "-m", "accelerate.commands.launch", *trial.launcher, *number, *module]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        for words in [["--stop-after-a-step"], ["--resume"]] if trial.is_resumed else [[]]:
            try:
                done = subprocess.run(
                    [*launch, *words], capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
                )
            except subprocess.TimeoutExpired:
                return f"it did not end in {SECONDS} seconds"
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                return lines[-1][:500] if lines else f"exit code {done.returncode}"
        found: Mapping[str, Any] = json.loads(evidence.read_text(encoding="utf-8"))
        return found


_NOISE = 3.0
"""Distance of a loss that is allowed, as a multiple of the distance that bf16 makes on the CPU."""

_FLOORS = {"fp32": (1e-3, 1e-2), "bf16": (0.02, 0.1), "fp16": (0.02, 0.1)}
"""Distances that are allowed in any case: of a loss in nats, and of a gradient norm, relative."""


def judge(
    trial: Trial,
    found: Mapping[str, Any],
    reference: Mapping[str, Any],
    in_bf16: Mapping[str, Any],
    *,
    uninterrupted: Mapping[str, Any] | None = None,
) -> TrialResult:
    """Return the verdict on a run that ended.

    Args:
        trial: The trial.
        found: The evidence of the run.
        reference: That of the run in fp32 on the CPU.
        in_bf16: That of the run in bf16 on the CPU, whose distance is what rounding makes.
        uninterrupted: That of the same run without a stop; None for a run that was not stopped.
    """
    losses, norms = found["losses"], found["gradient_norms"]
    measured = {
        "losses": losses,
        "gradient_norms": norms,
        "peak_bytes": found["peak_bytes"],
        "seconds": found["seconds"],
    }
    if len(losses) != STEPS or not all(map(math.isfinite, (*losses, *norms))):
        reason = f"{len(losses)} of {STEPS} steps have a loss, and each must be finite: {losses}"
        return TrialResult(trial.name, "failed", reason, **measured)
    if uninterrupted is not None:
        measured["loss_distance"] = _distance(losses, uninterrupted["losses"])
        # a GPU adds in an order that changes
        most = 0.0 if found["peak_bytes"] is None else _FLOORS[trial.precision][0]
        is_right = measured["loss_distance"] <= most
        reason = "" if is_right else f"a loss differs by {measured['loss_distance']:.3g} nats from the whole run's"
        return TrialResult(trial.name, "passed" if is_right else "failed", reason, **measured)
    if not trial.is_exact:
        is_right = losses[-1] < losses[0]
        reason = "" if is_right else f"the loss does not fall: {losses[0]:.3f} to {losses[-1]:.3f}"
        return TrialResult(trial.name, "passed" if is_right else "failed", reason, **measured)
    distance, relative = _distance(losses, reference["losses"]), _relative(norms, reference["gradient_norms"])
    measured |= {"loss_distance": distance, "gradient_distance": relative}
    floor, relative_floor = _FLOORS[trial.precision]
    rounds = trial.precision != "fp32"
    most = max(floor, _NOISE * _distance(in_bf16["losses"], reference["losses"]) * rounds)
    of_bf16 = _relative(in_bf16["gradient_norms"], reference["gradient_norms"])
    most_relative = max(relative_floor, _NOISE * of_bf16 * rounds)
    if distance > most:
        reason = f"a loss differs by {distance:.3g} nats from the CPU's; rounding explains {most:.3g}"
        return TrialResult(trial.name, "failed", reason, **measured)
    if relative > most_relative:
        reason = f"a gradient's norm differs by {relative:.1%} from the CPU's; rounding explains {most_relative:.1%}"
        return TrialResult(trial.name, "failed", reason, **measured)
    return TrialResult(trial.name, "passed", **measured)


def _distance(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def _relative(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
