"""In what two runs differ: the facts of their manifests, their tensors, their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.records.compare_tensors import TensorsDiff, diff_tensors, tensor_files
from pytest_mistral_lora.records.manifest import Manifest, load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder, transcript_files

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
    "lora.tensors_sha256": "files",  # what the run made, not how it was set
}
_OTHER = "record"
_SEAL = "seal"
"""The hash of all other facts: it says nothing of its own."""

GROUPS = (_OTHER, *dict.fromkeys(_GROUP_OF.values()))
"""The groups of facts, in order: the record itself, what went in, and what came out."""


class _Absent:
    """The value of a fact that is not recorded."""


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Fact:
    """A recorded fact that two manifests do not have alike.

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
        """Return the fact as plain JSON data; a side that does not have it is left out."""
        sides = {"a": self.a, "b": self.b}
        found = {side: value for side, value in sides.items() if value is not ABSENT}
        return {"group": self.group, "path": self.path, **found}


@dataclass(frozen=True, slots=True)
class Answer:
    """A transcript that two runs do not have alike.

    Attributes:
        case: Name of the transcript.
        differs: `question`: another conversation was asked; `prompt`: the same one, in other ids; `answer`.
        token: The first completion token that differs; None where the answers are the same.
        a: What the first answered.
        b: What the second answered.
    """

    case: str
    differs: Literal["question", "prompt", "answer"]
    token: int | None
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What two runs answered.

    Attributes:
        compared: How many transcripts both have.
        different: Those that are not alike.
        only_a: Names of those that only the first has.
        only_b: Names of those that only the second has.
    """

    compared: int
    different: tuple[Answer, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both have the same questions and answers."""
        return not (self.different or self.only_a or self.only_b)


@dataclass(frozen=True, slots=True)
class Diff:
    """In what two runs differ.

    Attributes:
        a: The first folder, or manifest file.
        b: The second.
        facts: Facts that differ, in the order of `GROUPS`.
        tensors: Their tensors, or why they were not compared.
        answers: Their transcripts, or why they were not compared.
    """

    a: Path
    b: Path
    facts: tuple[Fact, ...]
    tensors: TensorsDiff | str
    answers: Answers | str

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs."""
        compared = (part for part in (self.tensors, self.answers) if not isinstance(part, str))
        return not self.facts and all(part.equal for part in compared)


def diff(a: Path, b: Path) -> Diff:
    """Compare two runs.

    Args:
        a: An adapter's or a merged model's folder, or only a manifest file.
        b: The other one.

    Raises:
        InputError: If a manifest, a tensor file or a transcript cannot be read.
    """
    records = load(a), load(b)
    return Diff(a, b, tuple(_facts(*records)), _tensors(a, b, *records), _answers(a, b))


def _facts(a: Manifest, b: Manifest) -> Iterator[Fact]:
    first, second = ({name: part for name, part in one.data.items() if name != _SEAL} for one in (a, b))
    facts = [Fact(_group(path), _written(path), *sides) for path, *sides in _differences((), first, second)]
    return iter(sorted(facts, key=lambda fact: GROUPS.index(fact.group)))


def _differences(path: tuple[str | int, ...], a: Any, b: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """Yield path and both values of everything that differs, as deep as both have it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            yield from _differences((*path, name), a.get(name, ABSENT), b.get(name, ABSENT))
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(one, Mapping) for one in (*a, *b)):
        for index in range(max(len(a), len(b))):
            sides = (side[index] if index < len(side) else ABSENT for side in (a, b))
            yield from _differences((*path, index), *sides)
    elif a != b:
        yield path, a, b


def _group(path: tuple[str | int, ...]) -> str:
    names = (".".join(map(str, path[:2])), str(path[0]))
    return next((_GROUP_OF[name] for name in names if name in _GROUP_OF), _OTHER)


def _written(path: tuple[str | int, ...]) -> str:
    def step(name: str | int) -> str:
        if isinstance(name, int):
            return f"[{name}]"
        return f".{name}" if name.replace("-", "_").isidentifier() else f"[{name!r}]"

    return "$" + "".join(map(step, path))


def _tensors(a: Path, b: Path, *records: Manifest) -> TensorsDiff | str:
    kinds = [record.data["kind"] for record in records]
    if kinds[0] != kinds[1]:
        return f"one is of kind {kinds[0]}, the other {kinds[1]}"
    for folder in (a, b):
        if not tensor_files(folder):
            return f"no tensors in {folder}"
    return diff_tensors(a, b)


def _answers(a: Path, b: Path) -> Answers | str:
    for folder in (a, b):
        if not transcript_files(folder / TRANSCRIPTS):
            return f"no transcripts in {folder}"
    first, second = ({one.case: one for one in load_folder(folder / TRANSCRIPTS)} for folder in (a, b))
    shared = [case for case in first if case in second]
    different = (_answer(first[case], second[case]) for case in shared)
    return Answers(
        compared=len(shared),
        different=tuple(one for one in different if one is not None),
        only_a=tuple(case for case in first if case not in second),
        only_b=tuple(case for case in second if case not in first),
    )


def _answer(a: Transcript, b: Transcript) -> Answer | None:
    token = None
    if a.completion_ids != b.completion_ids:
        pairs = enumerate(zip(a.completion_ids, b.completion_ids, strict=False))
        shorter = min(len(a.completion_ids), len(b.completion_ids))
        token = next((index for index, pair in pairs if pair[0] != pair[1]), shorter)
    if a.row != b.row:
        return Answer(a.case, "question", token, a.text, b.text)
    if a.prompt_ids != b.prompt_ids:
        return Answer(a.case, "prompt", token, a.text, b.text)
    return None if token is None else Answer(a.case, "answer", token, a.text, b.text)
