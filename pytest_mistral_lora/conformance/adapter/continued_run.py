"""A run of another trainer that goes on from an adapter: its log begins with the loss that the adapter ended with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.conformance.adapter.checkpoints import TRAINER_STATE, state_of
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.formats.importers import declared_path
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import clash, inside

if TYPE_CHECKING:
    from pytest_mistral_lora.runners.going_on import GoingOn, RunSettings

_ROUNDING = 0.05
"""Nats by which two losses of the same model on the same rows can differ: half precision, and other batches."""

_LEARNED = 0.2
"""Nats that a run must have gained for the beginning of the next to tell whether that one goes on from it."""

_MOST_FILES = 20
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class _Curve:
    """The losses in the log of a run, in nats a token; None where there is none.

    Attributes:
        place: The place of the log.
        before: The held-out loss before the first step.
        after: The held-out losses that the saved adapter may have: at its step, and the best of the run.
        first: The training loss of the first line.
        last: That of the last line.
    """

    place: Place
    before: float | None
    after: tuple[float, ...]
    first: float | None
    last: float | None

    @classmethod
    def of(cls, folder: Path) -> _Curve | None:
        """Return the losses of a run's folder or a checkpoint; None without a log of a loss of labels."""
        below = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        file = next((path / TRAINER_STATE for path in (folder, *reversed(below)) if state_of(path)), None)
        state = {} if file is None else state_of(file.parent)
        log = state.get("log_history")
        if file is None or not isinstance(log, list):
            return None
        lines = [line for line in log if isinstance(line, Mapping)]
        if any(str(key).removeprefix("eval_").startswith("reward") for line in lines for key in line):
            return None  # a loss of preferences, which no loss of labels can be compared with
        held_out = [(line.get("step"), loss) for line in lines if (loss := _loss(line, "eval_loss")) is not None]
        training = [loss for line in lines if (loss := _loss(line, "loss")) is not None]
        best = _loss(state, "best_metric")
        after = [loss for step, loss in held_out if step and step == state.get("global_step")]
        after += [loss for _, loss in held_out if loss == best]
        before = next((loss for step, loss in held_out if step == 0), None)
        ends = (training[0], training[-1]) if training else (None, None)
        return cls(Place.of(file) / "log_history", before, tuple(after), *ends)


def _loss(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    with suppress(OverflowError):  # a whole number of hundreds of digits
        return float(value) if math.isfinite(value) else None
    return None


class ContinuedRun:
    """The run that wrote an adapter, if a configuration of a known trainer tells that it went on from another one."""

    def __init__(self, folder: AdapterFolder) -> None:
        self._folder = folder.path

    @cached_property
    def _curve(self) -> _Curve | None:
        return _Curve.of(self._folder)

    @cached_property
    def _found(self) -> tuple[GoingOn, RunSettings, Path] | None:
        for keys, settings in _settings_of(self._folder) if self._curve is not None else ():
            if start := keys.start_in(settings.data):
                with suppress(OSError, ValueError):
                    return keys, settings, declared_path(settings.file, start)
        return None

    @property
    def is_known(self) -> bool:
        """Whether the run has a log, and went on from an adapter."""
        return self._found is not None

    def judge(self) -> Result:
        """Compare the first loss of the run with the last one of the adapter (ML456)."""
        if self._found is None or self._curve is None:
            return Result(not_checked="no log, or nothing beside the adapter names one that its run went on from")
        keys, settings, start = self._found
        curve, parent = self._curve, _Curve.of(start)
        if parent is None:
            return Result(not_checked=f"no {TRAINER_STATE} has the log of {start}, which the run went on from")
        alike = any(
            keys.hold_out_alike(settings, other)
            for theirs, other in _settings_of(start)
            if theirs == keys and parent.after and curve.before is not None
        )
        finding = _contradiction(curve, parent, start) if alike else _sign(curve, parent, start)
        return Result((finding,) if finding else ())


def _contradiction(curve: _Curve, parent: _Curve, start: Path) -> Finding | None:
    """Return the error of a run whose first loss is worse than the last one of the adapter, on the same rows."""
    if curve.before is None or curve.before <= max(parent.after) + _ROUNDING:
        return None
    text = f"begins with a held-out loss of {curve.before:.6g}"
    if parent.before is not None and abs(curve.before - parent.before) <= _ROUNDING:
        text += f", that of the base alone ({parent.before:.6g}): the adapter was dropped"
    else:
        text += ": the adapter was loaded in part, or is on another base"
    expected = f"{parent.after[0]:.6g}, with which {start} ended on the same rows"
    return Finding("ML456", text, curve.place, expected, severity="error")


def _sign(curve: _Curve, parent: _Curve, start: Path) -> Finding | None:
    """Return the note on a run that begins nearer to where the adapter began than to where it ended."""
    held_out = (curve.before, parent.before, parent.after[0] if parent.after else None)
    for kind, (now, began, ended) in {
        "held-out": held_out,
        "training": (curve.first, parent.first, parent.last),
    }.items():
        if now is None or began is None or ended is None:
            continue
        if began - ended >= _LEARNED and now > (began + ended) / 2:
            text = f"begins with a {kind} loss of {now:.6g}, and {start} began with {began:.6g} and ended with "
            text += f"{ended:.6g}; nothing tells whether the rows are the same"
            return Finding("ML456", text, curve.place, "a loss near the one with which that adapter ended")
        return None
    return None


def _settings_of(folder: Path) -> Iterator[tuple[GoingOn, RunSettings]]:
    """Yield the settings of known trainers whose output is a folder, or the run of which it is a checkpoint."""
    from pytest_mistral_lora.runners import TRAINERS
    from pytest_mistral_lora.runners.configuration import read_configuration
    from pytest_mistral_lora.runners.going_on import RunSettings

    known = [trainer.going_on for trainer in TRAINERS.of_this_package() if trainer.going_on is not None]
    folder = folder.absolute()
    outputs = [folder, *([folder.parent] if _CHECKPOINT.fullmatch(folder.name) else [])]
    ended = max((path.stat().st_mtime for path in folder.glob("*.safetensors") if path.is_file()), default=0.0)
    for keys in known:
        for output in outputs if keys.file else ():
            with suppress(MistralLoraError, OSError):
                data = read_json(inside(output, keys.file))
                if isinstance(data, dict):
                    yield keys, RunSettings(output / keys.file, data, ended)
    homes = dict.fromkeys(home for output in outputs for home in (output, output.parent, output.parent.parent))
    for home in homes:
        for file in islice(sorted(home.glob("*.y*ml")), _MOST_FILES):
            with suppress(MistralLoraError, OSError, ValueError):
                data = read_configuration(inside(home, file.name))[0]
                named = data.get("output_dir")
                if isinstance(named, str) and any(clash(home / named, one) == "is" for one in outputs):
                    yield from ((keys, RunSettings(file, data, ended)) for keys in known)
