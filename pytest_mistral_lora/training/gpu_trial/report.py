"""The report of a GPU trial: one JSON file, and one page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.files import finished_folder, write_json, write_text
from pytest_mistral_lora.training.gpu_trial.reference import recorded
from pytest_mistral_lora.training.gpu_trial.shape import OURS, SEVEN_B, ShapeResult
from pytest_mistral_lora.training.gpu_trial.trials import TrialResult
from pytest_mistral_lora.training.step.memory_need import in_words

JSON, PAGE = "gpu-trial.json", "gpu-trial.md"
_OF_TRIALS = (
    *("run", "shows", "verdict", "compared with", "loss, distance", "gradient norm, distance"),
    *("loss, from the record", "peak", "time"),
)
_OF_SHAPES = (
    *("trainer", "adapter on", "step", "step, estimate", "tokens a second", "peak", "peak, estimate"),
    "waits in a step",
)


@dataclass(frozen=True)
class GpuReport:
    """What a trial of a GPU found.

    Attributes:
        trials: The tiny runs.
        differences: Why the tiny runs of a CPU were computed here; empty if the recorded ones count.
        shapes: The steps of a large model's shape.
        seconds: The time of all.
        machine: The machine and its libraries, as plain JSON data: `version` of this package, `torch` with its devices.
    """

    trials: Sequence[TrialResult]
    differences: Sequence[str]
    shapes: Sequence[ShapeResult]
    seconds: float
    machine: Mapping[str, Any]

    @property
    def failed(self) -> list[str]:
        """The names of what failed."""
        ours = [f"steps of 7B's shape, {one.targets}" for one in self.shapes if one.failed and one.contestant == OURS]
        return [one.name for one in self.trials if one.outcome == "failed"] + ours

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {
            **self.machine,
            "reference": {**recorded().to_json(), "differences": list(self.differences)},
            "trials": [asdict(one) for one in self.trials],
            "shape": {
                "config": dict(SEVEN_B.config),
                "tokens": SEVEN_B.tokens,
                "steps": [asdict(one) for one in self.shapes],
            },
            "seconds": self.seconds,
        }

    def page(self) -> str:
        """Return the report in Markdown."""
        torch, own = self.machine["torch"], f"pytest-mistral-lora {self.machine['version']}"
        devices = [device for device in torch["devices"] if device["name"].startswith("cuda")]
        lines = ["# A GPU tried with pytest-mistral-lora", ""]
        lines += [f"- {device['name']}, {in_words(device['memory'])}" for device in devices]
        lines += [f"- torch {torch['version']}, built for {torch['build']}; {own}"]
        lines += [f"- {self.seconds:.0f} s in all", "", "## Tiny runs, beside the same run on the CPU", ""]
        lines += [self._reference_line(), ""]
        lines += _table(_OF_TRIALS, map(_trial_cells, self.trials))
        lines += ["", f"## Steps of four layers of 7B's shape, {SEVEN_B.tokens} tokens, bf16", ""]
        lines += _table(_OF_SHAPES, map(_shape_cells, self.shapes))
        lines += ["", "The estimate of a step is the time of its products, at the speed of one large product here. The"]
        lines += ["rest of a step is norms, rotations, sums, casts, launches and waits."]
        return "\n".join(lines) + "\n"

    def _reference_line(self) -> str:
        reference = recorded()
        libraries = ", ".join(f"{name} {version}" for name, version in reference.versions.items())
        line = f"Losses and gradient norms are compared with those of a CPU, which were recorded with {libraries}"
        if not self.differences:
            return f"{line}."
        return f"{line}, and computed here again: {'; '.join(self.differences)}. The verdict is by those computed here."

    def write(self, output: Path) -> None:
        """Write both files into a new folder.

        Raises:
            InputError: If the folder exists.
        """
        with finished_folder(output) as folder:
            write_json(folder / JSON, self.to_json())
            write_text(folder / PAGE, self.page())


def _trial_cells(one: TrialResult) -> Sequence[str]:
    gradient = "" if one.gradient_distance is None else f"{one.gradient_distance:.2%}"
    seconds = "" if one.seconds is None else f"{one.seconds:.1f} s"
    distances = _nats(one.loss_distance), gradient, _nats(one.recorded_distance)
    return (one.name, one.shows, one.verdict, one.compared_with, *distances, _bytes(one.peak_bytes), seconds)


def _nats(distance: float | None) -> str:
    return "" if distance is None else f"{distance:.2g} nats"


def _bytes(size: int | None) -> str:
    return "" if size is None else in_words(size)


def _shape_cells(one: ShapeResult) -> Sequence[str]:
    if one.step_seconds is None or one.tokens_a_second is None:
        return (one.contestant, one.targets, f"not measured: {one.failed}", "", "", "", "", "")
    estimate = "" if one.estimated_seconds is None else f"{one.estimated_seconds * 1000:.0f} ms"
    figures = (f"{one.step_seconds * 1000:.0f} ms", estimate, f"{one.tokens_a_second:,.0f}")
    waits = "" if one.waits is None else str(one.waits)
    return (one.contestant, one.targets, *figures, _bytes(one.peak_bytes), _estimated_bytes(one), waits)


def _estimated_bytes(one: ShapeResult) -> str:
    """Return the estimate, and by how much the peak is above or below it."""
    if one.estimated_bytes is None or one.peak_bytes is None:
        return _bytes(one.estimated_bytes)
    return f"{in_words(one.estimated_bytes)} (peak {one.peak_bytes / one.estimated_bytes - 1:+.0%})"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (titles, ["---"] * len(titles), *rows):
        # a bar or a line break would end the cell
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
