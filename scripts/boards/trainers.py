"""Trainers with their configurations: their recorded verdicts on rows and pairs, in docs/scoreboard/recorded/.

A record has no ids: they would be megabytes that nobody reads, and the trainer makes them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from boards.inputs import DOCS, ROOT, TOKENIZERS
from boards.results import Example, Result
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import packaged_pairs
from pytest_mistral_lora.runners import TRAINERS, Trainer

RECORDED = DOCS / "scoreboard" / "recorded"
OURS = "mistral-lora train"
"""This package's own trainer: it has no record, as the tests judge each of its encodings."""
NEEDS_MISTRALS_FILE = ("axolotl-mistral-common",)
"""Configurations that read Mistral's own tokenizer file, so that only names that end in `-hub` have results."""
_OF_DATA = ("dataset", "datasets", "dataset_dir")
"""Keys that name the rows, and are no setting."""
_TEMPLATE = "chat_template_path"


@dataclass(frozen=True)
class Configuration:
    """A runner with one of its configurations.

    Attributes:
        runner: The runner.
        config: The configuration.
        task: Its command for preferences; empty for chat rows.
    """

    runner: Trainer
    config: Path
    task: str = ""

    @property
    def name(self) -> str:
        """Its name in the tables, and of its records."""
        if not self.task:
            return self.config.stem
        is_default = self.config == self.runner.default_config(self.task)
        variant = "" if is_default else self.config.stem.removeprefix(self.runner.name)
        return f"{self.runner.name}-{self.task}{variant}"

    @property
    def kind(self) -> str:
        """The key of its records of packaged rows."""
        return "pairs" if self.task else "packaged"

    @cached_property
    def recorded(self) -> dict[str, Result]:
        """What is recorded, by tokenizer."""
        return {tokenizer: self._result(tokenizer, data) for tokenizer, data in self.read()[self.kind].items()}

    def _result(self, tokenizer: str, data: Mapping[str, Any]) -> Result:
        return Result(
            program=self.runner.title,
            task=self.task,
            version=data["environment"].get(self.runner.distribution, ""),
            setting=self.setting,
            name=self.name,
            tokenizer=tokenizer,
            verdicts={case: rules.split() for case, rules in data["verdicts"].items()},
            refused=data["refused"],
            date=data["date"],
            environment=data["environment"],
            examples={rule: Example(**example) for rule, example in data["examples"].items()},
            uncounted=_REFUSED if self.task else (),
        )

    @property
    def file(self) -> Path:
        """The file of its records."""
        return RECORDED / f"{self.name}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return its records: of the packaged pairs, or of the packaged rows and of real ones, each by tokenizer."""
        if not self.file.is_file():
            return {self.kind: {}} if self.task else {self.kind: {}, "real": {}}
        data: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
        return data

    def write(self, kind: str, tokenizer: str, data: dict[str, Any] | None) -> None:
        """Write a record of a tokenizer in place of the one before, or take it away."""
        records = self.read()
        kept = {name: old for name, old in records[kind].items() if name != tokenizer}
        kept |= {tokenizer: data} if data is not None else {}
        records[kind] = {name: kept[name] for name in TOKENIZERS if name in kept}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(records, ensure_ascii=False, indent=1) + "\n")

    @property
    def about(self) -> str:
        """What the configuration says of itself."""
        return self.config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Its keys with their values."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}

    @cached_property
    def setting(self) -> str:
        """The keys in which it differs from the trainer's other configurations, as a link to it."""
        beside = [one.keys for one in every_configuration() if (one.runner, one.task) == (self.runner, self.task)]
        named = dict.fromkeys(key for keys in beside for key in keys if key not in _OF_DATA)
        varied = [key for key in named if any(keys.get(key, ...) != self.keys.get(key, ...) for keys in beside)]
        words = [f"`{key}: {_plain(self.keys[key])}`" for key in varied if key in self.keys]
        words = words or [f"no `{key}`" for key in varied] or [self.config.name]
        file = ", with Mistral's own tokenizer file in the folder" if self.name in NEEDS_MISTRALS_FILE else ""
        return f"[{', '.join(words)}](../../{self.config.relative_to(ROOT).as_posix()}){file}"

    @property
    def template(self) -> str:
        """The file of the training template that it names, in the folder in which the trainer runs; may be empty."""
        return str(self.keys.get(_TEMPLATE, ""))

    def commands(self, tokenizer: str) -> Iterator[str]:
        """Yield the commands that make a column of a table again."""
        if self.template:
            yield f"mistral-lora template --tokenizer {tokenizer} --output {self.template}"
        config = self.config.relative_to(ROOT)
        task = f" --task {self.task}" if self.task else ""
        yield f"mistral-lora audit --runner {self.runner.name}{task} --config {config} --tokenizer {tokenizer}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


CONFIGURATIONS = tuple(
    Configuration(runner, config)
    for runner in TRAINERS.values()
    if not runner.is_evaluation
    for config in (runner.config, *sorted(runner.config.parent.glob(f"{runner.name}-*.yaml")))
)
_PREFERENCES = {
    "trl": ("dpo", "kto", "reward"),
    "axolotl": ("dpo", "kto", "orpo"),
    "llamafactory": ("dpo", "kto", "rm"),
    "ms-swift": ("dpo", "kto", "rm", "orpo"),
}
"""The commands that are given the packaged pairs, by the name of their runner."""
PAIR_CONFIGURATIONS = tuple(
    Configuration(runner, config, task)
    for runner, tasks in ((TRAINERS[name], tasks) for name, tasks in _PREFERENCES.items())
    for task in tasks
    for config in (
        runner.default_config(task),
        *sorted((runner.config.parent / "preferences").glob(f"{runner.name}-own-*.yaml")),
    )
)

_REFUSED = frozenset(case.name for case in packaged_pairs() if case.is_refused)
"""Pairs that no trainer can encode as mistral-common does: they count neither as right nor as wrong."""


def every_configuration() -> tuple[Configuration, ...]:
    """Return the configurations of all tables."""
    return (*CONFIGURATIONS, *PAIR_CONFIGURATIONS)


def row_results() -> list[Result]:
    """Return what is recorded of the packaged rows, and at the end that this package's own trainer is right."""
    recorded = [one for configuration in CONFIGURATIONS for one in configuration.recorded.values()]
    return recorded + [_ours(tokenizer, recorded) for tokenizer in TOKENIZERS]


def _ours(tokenizer: str, recorded: list[Result]) -> Result:
    cases = next(one.verdicts for one in recorded if one.tokenizer == tokenizer and one.verdicts)
    return Result(OURS, "", "", "nothing", OURS, tokenizer, {case: [] for case in cases})


def pair_results() -> list[Result]:
    """Return what is recorded of the packaged pairs."""
    return [one for configuration in PAIR_CONFIGURATIONS for one in configuration.recorded.values()]
