"""Measure a model on the rows of a gate, and judge the adapter by the differences from the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pytest_mistral_lora.chat.completions import verdicts
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import NonFiniteError, counted
from pytest_mistral_lora.records.bootstrap import LEVEL, RESAMPLES, SEED, paired_interval
from pytest_mistral_lora.records.gate import HELD_OUT, RATE, RETENTION, Gate, GateLine, Measured
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.gate.rows import GateRows, Numbers, RowsToMeasure, numbers_of
from pytest_mistral_lora.training.generate.answers import generate
from pytest_mistral_lora.training.generate.record import answer_of, preserve_rng_and_modes
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.step.forward import attend_in_segments, collate, step_rows, supervised_losses

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowSums:
    """A value of each row, as a sum and the number of things that it is summed over.

    Attributes:
        sums: Nats over the trained tokens of each row, or whether its answer passes, `(rows,)` float64.
        counts: Trained tokens of each row, or 1, `(rows,)` float64.
        rows: The index of each row among those that were given, `(rows,)` int64.
    """

    sums: Floats
    counts: Floats
    rows: Numbers

    @property
    def mean(self) -> float:
        """The sum over all rows divided by the number of things."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class ModelValues:
    """The values of one model on the rows of a gate.

    Attributes:
        held_out: Losses of the held-out rows; None without them.
        retention: Losses of the rows of other subjects; None without them.
        rates: Passes of each format check, by its name.
    """

    held_out: RowSums | None
    retention: RowSums | None
    rates: Mapping[str, RowSums] = field(default_factory=dict)


def row_losses(model: Any, encoded: Sequence[EncodedRow], each: Callable[[int], None] = lambda done: None) -> RowSums:
    """Return the teacher-forced loss of each row with a trained token, summed over these tokens, in nats.

    Each row is computed alone and with dropout off, so that its value depends on no other row.

    Args:
        model: A causal language model that attends by segments.
        encoded: The rows.
        each: Gets the number of finished rows, after each.
    """
    model.eval()
    dataset, sums, counts, rows = RowDataset(encoded), list[float](), list[int](), list[int]()
    for index in range(len(dataset)):
        [row] = step_rows(collate([dataset[index]]))
        if len(row.targets):
            # not inference mode: a mask that is kept for the next pass could then be in no gradient
            with torch.no_grad():
                losses, _ = supervised_losses(model, [row])
            sums.append(losses.double().sum().item())
            counts.append(len(losses))
            rows.append(index)
        each(index + 1)
    return RowSums(np.array(sums), np.array(counts, np.float64), np.array(rows, np.int64))


def measure(model: Any, encoder: Encoder, rows: GateRows, title: str, display: RunDisplay) -> ModelValues:
    """Return the values of a model on the rows of a gate; every process of a run must call it.

    Args:
        model: Base and adapter, one of them alone, or a merged model; it attends by segments from now on.
        encoder: The backend that makes prompts.
        rows: The rows.
        title: Name of the model, for the display.
        display: Display of the progress.

    Raises:
        NonFiniteError: If the loss of a row is NaN or infinite.
    """
    attend_in_segments(model)

    def losses(measured: RowsToMeasure, kind: str) -> RowSums | None:
        encoded = measured.encoded
        if not encoded:
            return None
        display.phase(f"gate: loss of {counted(len(encoded), f'{kind} row')}, {title}")
        found = row_losses(model, encoded, lambda done: display.count(done, len(encoded), "row"))
        _refuse_non_finite(found, f"{kind} rows, {title}")
        return found if len(found.sums) else None

    with preserve_rng_and_modes(model):
        held_out, retention = losses(rows.held_out, "held-out"), losses(rows.retention, "retention")
        return ModelValues(held_out, retention, dict(_rates(model, encoder, rows, title, display)))


def _refuse_non_finite(found: RowSums, what: str) -> None:
    """Refuse losses that no interval can be made of.

    Raises:
        NonFiniteError: If the loss of a row is NaN or infinite.
    """
    wrong = np.flatnonzero(~np.isfinite(found.sums))
    if len(wrong):
        raise NonFiniteError(
            f"the gate cannot compare the {what}: {counted(len(wrong), 'loss', 'es')} not finite, first "
            f"{found.sums[wrong[0]]}",
            next_step="Use precision: fp32 or bf16, lower training.learning_rate, or check the base.",
        )


def _rates(
    model: Any, encoder: Encoder, rows: GateRows, title: str, display: RunDisplay
) -> Iterator[tuple[str, RowSums]]:
    if not rows.checks or not rows.asked:
        return
    display.phase(f"gate: answers to {counted(len(rows.asked), 'row')}, {title}")
    answers = generate(model, encoder, rows.asked, max_new_tokens=rows.max_new_tokens, display=display)
    passes = [
        [verdict.passed for verdict in verdicts(answer_of(answer, row, encoder), rows.checks)]
        for answer, row in zip(answers, rows.asked, strict=True)
    ]
    for check, found in zip(rows.checks, zip(*passes, strict=True), strict=True):
        yield check.name, RowSums(np.array(found, np.float64), np.ones(len(found)), np.arange(len(found)))


def judge(base: ModelValues, adapter: ModelValues, rows: GateRows, *, precision: str, device: str) -> Gate:
    """Return the gate that two models on the same rows make.

    Args:
        base: The values of the base.
        adapter: The values of the adapter, or of the merged model.
        rows: The rows of both.
        precision: dtype of the weights of both.
        device: `cpu` or `cuda`.
    """
    asked = numbers_of(rows.asked)
    pairs: list[tuple[str, Measured, RowSums | None, RowSums | None, float, Numbers]] = [
        (HELD_OUT, "loss", base.held_out, adapter.held_out, 0.0, rows.held_out.conversations),
        (RETENTION, "loss", base.retention, adapter.retention, rows.max_loss_increase, rows.retention.conversations),
        *((f"{RATE}{name}", "rate", base.rates[name], adapter.rates[name], 0.0, asked) for name in base.rates),
    ]
    lines = [
        gate_line(name, measures, of_base, of_adapter, limit, numbers[of_base.rows])
        for name, measures, of_base, of_adapter, limit, numbers in pairs
        if of_base is not None and of_adapter is not None
    ]
    return Gate(tuple(lines), precision, device, LEVEL, RESAMPLES, SEED)


def gate_line(
    name: str, measures: Measured, base: RowSums, adapter: RowSums, limit: float, conversations: Numbers
) -> GateLine:
    """Return the line of one measurement of two models on the same rows, in the same order.

    Args:
        name: Its name.
        measures: `loss` or `rate`.
        base: The values of the base.
        adapter: Those of the adapter.
        limit: The difference that is still allowed.
        conversations: The number of each row's conversation, `(rows,)` int64: one is drawn as a whole.
    """
    differences = adapter.sums - base.sums
    _, numbers = np.unique(conversations, return_inverse=True)
    of_each = [np.bincount(numbers, values) for values in (differences, base.counts)]
    low, high = paired_interval(*of_each)
    return GateLine(
        name=name,
        measures=measures,
        base=base.mean,
        adapter=adapter.mean,
        difference=float(differences.sum() / base.counts.sum()),
        low=low,
        high=high,
        limit=limit,
        rows=len(differences),
        conversations=len(of_each[0]),
        tokens=int(base.counts.sum()) if measures == "loss" else 0,
    )


def adapter_gate(
    model: Any, encoder: Encoder, rows: GateRows, *, precision: str, device: str, display: RunDisplay
) -> Gate:
    """Return the gate of an adapter: the base is the same model with the adapter switched off.

    Every process of a run must call it.

    Args:
        model: Base and adapter (PEFT).
        encoder: The backend that makes prompts.
        rows: The rows.
        precision: dtype of the base's weights.
        device: `cpu` or `cuda`.
        display: Display of the progress.
    """
    with model.disable_adapter():
        base = measure(model, encoder, rows, "base", display)
    adapter = measure(model, encoder, rows, "adapter", display)
    return judge(base, adapter, rows, precision=precision, device=device)
