"""The differences of two runs: recorded values, tensors, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.goldens import golden_paths
from pytest_mistral_lora.records.manifest import NOTES_RECORD, load
from pytest_mistral_lora.records.tensors import TensorsDiff, diff_tensors, tensor_files
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder

_GROUP_OF = {
    "recipe": "recipe",
    "dataset": "data",
    "dataset_sha256": "data",
    "masking": "data",
    "base": "base",
    "revision": "base",
    "base_weights_sha256": "base",
    "base_config": "base",
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
_MOST_SHOWN = 80
_DERIVED = ("seal", NOTES_RECORD)
"""Hashes of other fields: they differ if and only if another field does."""

GROUPS = (_OTHER, *dict.fromkeys(_GROUP_OF.values()))
"""The groups of fields, in order: the record itself, its inputs, and its results."""


class _Absent:
    """The type of `ABSENT`."""


ABSENT = _Absent()
"""The value of a field that is not recorded; None can be a recorded value."""


@dataclass(frozen=True, slots=True)
class ChangedField:
    """A field that differs between two manifests.

    Attributes:
        group: One of `GROUPS`.
        path: JSON path, `$.training.learning_rate`; the path of a whole part if only one manifest has it.
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
        differs: `question`: the conversations differ; `prompt`: same conversation, different ids; `answer`.
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
        different: The transcripts that differ.
        only_a: Names of transcripts that only the first has.
        only_b: Names of transcripts that only the second has.
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
        tensors: The comparison of their tensors, or the reason why it is missing.
        answers: The comparison of their transcripts, or the reason why it is missing.
    """

    a: Path
    b: Path
    facts: tuple[ChangedField, ...]
    tensors: TensorsDiff | str
    answers: AnswersDiff | str

    @property
    def equal(self) -> bool:
        """Whether everything that was compared is equal."""
        compared = (part for part in (self.tensors, self.answers) if not isinstance(part, str))
        return not self.facts and all(part.equal for part in compared)


def compare_runs(a: Path, b: Path) -> RunsDiff:
    """Compare two runs.

    Args:
        a: An adapter's or a merged model's folder, or only a manifest file.
        b: The other one.

    Raises:
        InputError: If a manifest, a tensor file or a transcript cannot be read, or a folder holds no tensors.
    """
    records = load(a), load(b)
    for folder in (a, b):
        if folder.is_dir() and not tensor_files(folder):
            alone = "Name the two manifest.json files to compare nothing else."
            raise InputError("no tensors", place=str(folder), expected="an adapter or a model", next_step=alone)
    kinds = [record.data["kind"] for record in records]
    tensors: TensorsDiff | str = f"one is of kind {kinds[0]}, the other {kinds[1]}"
    if kinds[0] == kinds[1]:
        without = next((folder for folder in (a, b) if not tensor_files(folder)), None)
        tensors = diff_tensors(a, b) if without is None else f"no tensors in {without}"
    first, second = ({name: part for name, part in record.data.items() if name not in _DERIVED} for record in records)
    changed = []
    for path, *sides in differences((), first, second):
        names = (".".join(map(str, path[:2])), str(path[0]))
        group = next((_GROUP_OF[name] for name in names if name in _GROUP_OF), _OTHER)
        json_path = "$"
        for step in path:
            plain = isinstance(step, str) and step.replace("-", "_").isidentifier()
            json_path += f".{step}" if plain else f"[{step!r}]"
        changed.append(ChangedField(group, json_path, *sides))
    changed.sort(key=lambda field: GROUPS.index(field.group))
    return RunsDiff(a, b, tuple(changed), tensors, _compare_answers(a, b))


def differences(path: tuple[str | int, ...], a: Any, b: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """Yield the path and both values of each difference, as deep as both sides have it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            yield from differences((*path, name), a.get(name, ABSENT), b.get(name, ABSENT))
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(item, Mapping) for item in (*a, *b)):
        for index in range(max(len(a), len(b))):
            sides = (side[index] if index < len(side) else ABSENT for side in (a, b))
            yield from differences((*path, index), *sides)
    elif a != b:
        yield path, a, b


def changed_settings(recorded: Any, identity: Mapping[str, Any]) -> str:
    """Return the settings that differ between a run and an unfinished run, with both values.

    Args:
        recorded: The content of the `run.json` of the unfinished run.
        identity: Everything that decides the steps of the run that would resume it.
    """
    settings = recorded.get("settings") if isinstance(recorded, Mapping) else None
    if not isinstance(settings, Mapping):
        return "recipe, base, precision, data or number of devices"
    shown: dict[str, None] = {}
    for path, before, now in differences((), settings, json.loads(json.dumps(identity))):
        if path[0] == "rows":
            shown.setdefault("set of rows (the data changed, or its tokens)")
            continue
        name = ".".join(str(part) for part in (path[1:] if path[0] == "recipe" else path))
        sides = (
            "not set" if value is ABSENT else json.dumps(value, ensure_ascii=False)[:_MOST_SHOWN]
            for value in (before, now)
        )
        shown.setdefault(f"{name} ({', now '.join(sides)})")
    return ", ".join(shown)


def _compare_answers(a: Path, b: Path) -> AnswersDiff | str:
    for folder in (a, b):
        if not golden_paths(folder / TRANSCRIPTS):
            return f"no transcripts in {folder}"
    first, second = (
        {transcript.case: transcript for transcript in load_folder(folder / TRANSCRIPTS)} for folder in (a, b)
    )
    shared = [case for case in first if case in second]
    different = []
    for case in shared:
        before, after = first[case], second[case]
        same = before.completion_ids == after.completion_ids
        token = None if same else equal_beginning(before.completion_ids, after.completion_ids)
        # the first cause counts: a changed question explains a changed prompt, which explains a changed answer
        if before.row != after.row:
            different.append(ChangedAnswer(case, "question", token, before.text, after.text))
        elif before.prompt_ids != after.prompt_ids:
            different.append(ChangedAnswer(case, "prompt", token, before.text, after.text))
        elif token is not None:
            different.append(ChangedAnswer(case, "answer", token, before.text, after.text))
    return AnswersDiff(
        compared=len(shared),
        different=tuple(different),
        only_a=tuple(case for case in first if case not in second),
        only_b=tuple(case for case in second if case not in first),
    )
