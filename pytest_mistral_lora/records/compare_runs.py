"""The differences of two runs: recorded values, tensors, answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.records.hashing import ADAPTER_TENSORS
from pytest_mistral_lora.records.manifest import Manifest, load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder, transcript_files

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class TensorKindDiff:
    """The difference of tensors of one kind, over all layers: `self_attn.q_proj.lora_A`.

    Attributes:
        name: The tensors' name without layer, prefix and `.weight`.
        tensors: Number that both have, in one shape.
        different: Number of those that differ in dtype or in any bit.
        max_abs: Largest absolute difference of two values.
    """

    name: str
    tensors: int = 0
    different: int = 0
    max_abs: float = 0.0
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("aa", "bb", "ab", "dd"), 0.0))

    @property
    def relative(self) -> float:
        """Norm of the difference, divided by the norm of the first; infinite if only the latter is zero."""
        # ||b - a|| / ||a||, from sums of squares over all tensors of the kind, in float64
        apart = math.sqrt(self._sums["dd"])
        return apart / math.sqrt(self._sums["aa"]) if self._sums["aa"] else math.inf if apart else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, from -1 to 1; not a number if one of them is zero."""
        # <a, b> / (||a|| ||b||), clipped: rounding can leave it outside of [-1, 1]
        norms = math.sqrt(self._sums["aa"]) * math.sqrt(self._sums["bb"])
        return max(-1.0, min(1.0, self._sums["ab"] / norms)) if norms else math.nan

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a pair of tensors of one shape, on the CPU."""
        import torch

        self.tensors += 1
        # torch.equal on values would call nan unequal to itself, and -0 equal to 0.
        same = a.dtype == b.dtype and torch.equal(*(one.contiguous().view(torch.uint8) for one in (a, b)))
        self.different += not same
        first, second = a.double().flatten(), b.double().flatten()
        apart = second - first
        # max() would pass over nan.
        largest = apart.abs().max().item() if apart.numel() else 0.0
        self.max_abs = largest if math.isnan(largest) or largest > self.max_abs else self.max_abs
        for name, value in (("aa", first @ first), ("bb", second @ second), ("ab", first @ second)):
            self._sums[name] += value.item()
        self._sums["dd"] += (apart @ apart).item()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON data; null in place of a number that is not finite."""
        values = {name: getattr(self, name) for name in ("max_abs", "relative", "cosine")}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"kind": self.name, "tensors": self.tensors, "different": self.different, **finite}


@dataclass(frozen=True, slots=True)
class TensorsDiff:
    """The difference of two sets of tensors.

    Attributes:
        kinds: The tensors that both have in one shape, by kind.
        reshaped: Name, and both shapes, of tensors that both have in different shapes.
        only_a: Names of tensors that only the first has.
        only_b: Names of tensors that only the second has.
    """

    kinds: tuple[TensorKindDiff, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def compared(self) -> int:
        """Number of tensors that both have in one shape."""
        return sum(kind.tensors for kind in self.kinds)

    @property
    def different(self) -> int:
        """Number of those that differ."""
        return sum(kind.different for kind in self.kinds)

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors, bit for bit."""
        return not (self.different or self.reshaped or self.only_a or self.only_b)


def tensor_files(folder: Path) -> list[Path]:
    """Return the safetensors files of an adapter's or a merged model's folder; empty if there are none."""
    adapter = folder / ADAPTER_TENSORS
    return [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))


def diff_tensors(a: Path, b: Path) -> TensorsDiff:
    """Compare the tensors of two folders by name.

    Raises:
        InputError: As for `read_header`.
    """
    kinds: dict[str, TensorKindDiff] = {}
    reshaped = []
    first, second = Weights(tensor_files(a)), Weights(tensor_files(b))
    for name in sorted(first.keys() & second.keys()):
        shapes = first.infos[name].shape, second.infos[name].shape
        if shapes[0] != shapes[1]:
            reshaped.append((name, *shapes))
            continue
        # "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" is of the kind "self_attn.q_proj.lora_A".
        kind = re.sub(r"^(?:base_model\.model\.)?(?:.*\.layers\.\d+\.)?|\.weight$", "", name)
        kinds.setdefault(kind, TensorKindDiff(kind)).add(first[name], second[name])
    only_a, only_b = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    return TensorsDiff(tuple(kinds.values()), tuple(reshaped), tuple(only_a), tuple(only_b))


_GROUP_OF = {
    "recipe": "recipe",
    "dataset": "data",
    "dataset_sha256": "data",
    "masking": "data",
    "base": "base",
    "revision": "base",
    "base_weights_sha256": "base",
    "tokenizer": "tokenizer",
    "template": "tokenizer",
    "lora": "lora",
    "training": "training",
    "seed": "training",
    "environment": "environment",
    "evaluation": "evaluation",
    "files": "files",
    "lora.tensors_sha256": "files",  # A result of the run, not a setting.
}
_OTHER = "record"
_SEAL = "seal"
"""The hash of all other fields: it differs if and only if one of them does."""

GROUPS = (_OTHER, *dict.fromkeys(_GROUP_OF.values()))
"""The groups of fields, in order: the record itself, its inputs, and its results."""


class _Absent:
    """The type of `ABSENT`."""


ABSENT = _Absent()
"""The value of a field that is not recorded: None is a value that can be."""


@dataclass(frozen=True, slots=True)
class ChangedField:
    """A field that differs between two manifests.

    Attributes:
        group: One of `GROUPS`.
        path: JSON path, `$.training.learning_rate`; of a part that only one of them has, the path of the part.
        a: Its value in the first, or `ABSENT`.
        b: Its value in the second, or `ABSENT`.
    """

    group: str
    path: str
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        """Return the field as plain JSON data; a side that does not have it is left out."""
        sides = {"a": self.a, "b": self.b}
        found = {side: value for side, value in sides.items() if value is not ABSENT}
        return {"group": self.group, "path": self.path, **found}


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """A transcript that differs between two runs.

    Attributes:
        case: Name of the transcript.
        differs: `question`: another conversation was asked; `prompt`: the same one, in other ids; `answer`.
        token: Index of the first completion token that differs; None if the answers are the same.
        a: The first run's answer.
        b: The second run's answer.
    """

    case: str
    differs: Literal["question", "prompt", "answer"]
    token: int | None
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class AnswersDiff:
    """The comparison of the transcripts of two runs.

    Attributes:
        compared: Number of transcripts that both have.
        different: Those that differ.
        only_a: Names of those that only the first has.
        only_b: Names of those that only the second has.
    """

    compared: int
    different: tuple[ChangedAnswer, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both have the same questions and answers."""
        return not (self.different or self.only_a or self.only_b)


@dataclass(frozen=True, slots=True)
class RunsDiff:
    """The differences between two runs.

    Attributes:
        a: The first folder, or manifest file.
        b: The second.
        facts: Fields of the manifests that differ, in the order of `GROUPS`.
        tensors: The comparison of their tensors, or the reason why there is none.
        answers: The comparison of their transcripts, or the reason why there is none.
    """

    a: Path
    b: Path
    facts: tuple[ChangedField, ...]
    tensors: TensorsDiff | str
    answers: AnswersDiff | str

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs."""
        compared = (part for part in (self.tensors, self.answers) if not isinstance(part, str))
        return not self.facts and all(part.equal for part in compared)


def compare_runs(a: Path, b: Path) -> RunsDiff:
    """Compare two runs.

    Args:
        a: An adapter's or a merged model's folder, or only a manifest file.
        b: The other one.

    Raises:
        InputError: If a manifest, a tensor file or a transcript cannot be read.
    """
    records = load(a), load(b)
    kinds = [record.data["kind"] for record in records]
    tensors: TensorsDiff | str = f"one is of kind {kinds[0]}, the other {kinds[1]}"
    if kinds[0] == kinds[1]:
        without = next((folder for folder in (a, b) if not tensor_files(folder)), None)
        tensors = diff_tensors(a, b) if without is None else f"no tensors in {without}"
    return RunsDiff(a, b, _changed_fields(*records), tensors, _compare_answers(a, b))


def _changed_fields(a: Manifest, b: Manifest) -> tuple[ChangedField, ...]:
    first, second = ({name: part for name, part in one.data.items() if name != _SEAL} for one in (a, b))
    changed = []
    for path, *sides in _differences((), first, second):
        names = (".".join(map(str, path[:2])), str(path[0]))
        group = next((_GROUP_OF[name] for name in names if name in _GROUP_OF), _OTHER)
        json_path = "$"
        for step in path:
            plain = isinstance(step, str) and step.replace("-", "_").isidentifier()
            json_path += f".{step}" if plain else f"[{step!r}]"
        changed.append(ChangedField(group, json_path, *sides))
    return tuple(sorted(changed, key=lambda field: GROUPS.index(field.group)))


def _differences(path: tuple[str | int, ...], a: Any, b: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """Yield the path and both values of each difference, as deep as both sides have it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            yield from _differences((*path, name), a.get(name, ABSENT), b.get(name, ABSENT))
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(one, Mapping) for one in (*a, *b)):
        for index in range(max(len(a), len(b))):
            sides = (side[index] if index < len(side) else ABSENT for side in (a, b))
            yield from _differences((*path, index), *sides)
    elif a != b:
        yield path, a, b


def _compare_answers(a: Path, b: Path) -> AnswersDiff | str:
    for folder in (a, b):
        if not transcript_files(folder / TRANSCRIPTS):
            return f"no transcripts in {folder}"
    first, second = ({one.case: one for one in load_folder(folder / TRANSCRIPTS)} for folder in (a, b))
    shared = [case for case in first if case in second]
    different = []
    for case in shared:
        one, other = first[case], second[case]
        token = None
        if one.completion_ids != other.completion_ids:
            pairs = enumerate(zip(one.completion_ids, other.completion_ids, strict=False))
            shorter = min(len(one.completion_ids), len(other.completion_ids))
            token = next((index for index, pair in pairs if pair[0] != pair[1]), shorter)
        # the first cause counts: another question explains another prompt, and that another answer
        if one.row != other.row:
            different.append(ChangedAnswer(case, "question", token, one.text, other.text))
        elif one.prompt_ids != other.prompt_ids:
            different.append(ChangedAnswer(case, "prompt", token, one.text, other.text))
        elif token is not None:
            different.append(ChangedAnswer(case, "answer", token, one.text, other.text))
    return AnswersDiff(
        compared=len(shared),
        different=tuple(different),
        only_a=tuple(case for case in first if case not in second),
        only_b=tuple(case for case in second if case not in first),
    )
