"""The verdict on a recipe: what is found in its layers and its rows, and what is not checked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boards.trainers import every_configuration

from recipes_of_trainers import layers, rows
from recipes_of_trainers.bases import base_of
from recipes_of_trainers.recordings import read, show
from recipes_of_trainers.runs import PLAIN, THINKING, key_of, read_runs, record_run
from recipes_of_trainers.sources import Source
from recipes_of_trainers.trainers import READERS, EosIsPadding, Everything, Meaning, Run, Scoreboard, Value

_FIRST = ("single", "multi-turn")
"""The packaged rows that are like the rows of every data set of conversations."""


@dataclass(frozen=True)
class Fault:
    """A finding on a recipe.

    Attributes:
        rule: The rule.
        severity: `error` or `note`.
        found: What was found.
        key: The key that causes it, with its line.
        is_of_rows: Whether it is about rows, and not about layers.
    """

    rule: str
    severity: str
    found: str
    key: Value
    is_of_rows: bool = False


@dataclass(frozen=True)
class Judged:
    """A recipe with its verdict.

    Attributes:
        source: Its repository.
        facts: What is recorded of the repository.
        path: Its path.
        meaning: What its keys mean.
        layers: What it adapts, or why that is not checked.
        rows: What its rows are, or why they are not checked.
        faults: The findings, notes among them.
        is_checked: Whether its layers or its rows were judged.
    """

    source: Source
    facts: Mapping[str, Any]
    path: str
    meaning: Meaning
    layers: str
    rows: str
    faults: tuple[Fault, ...]
    is_checked: bool

    @property
    def errors(self) -> tuple[Fault, ...]:
        """The findings that are no notes."""
        return tuple(fault for fault in self.faults if fault.severity == "error")

    @property
    def verdict(self) -> str:
        """`finding`, `sound` or `not checked`."""
        if self.errors:
            return "finding"
        return "sound" if self.is_checked else "not checked"


def judged() -> Iterator[Judged]:
    """Yield each recorded recipe with its verdict."""
    for source, facts in read():
        for recipe in facts["recipes"]:
            for each in _by_tokenizer(recipe):
                yield judge_recipe(source, facts, each)


def record_rows(repository: str, checkout: Path, date: str) -> None:
    """Run the trainer of a repository with each of its recipes whose rows its runner can take, and record the verdicts.

    Args:
        repository: Its owner and name: Axolotl's or LLaMA-Factory's.
        checkout: The folder of the repository, or its git directory.
        date: The day.
    """
    source, facts = next((source, facts) for source, facts in read() if source.repository == repository)
    for recipe in (each for one in facts["recipes"] for each in _by_tokenizer(one)):
        meaning = READERS[source.reader](recipe["keys"], recipe["path"])
        if meaning.known is None or meaning.base is None or not isinstance(meaning.rows, Run | rows.Layout):
            continue
        tokenizer = meaning.known.tokenizer
        if meaning.models:
            name = str(meaning.base["value"])
            record_run(key_of(repository, name, tokenizer), "llamafactory", tokenizer, {"template": name}, date)
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(show(checkout, recipe["path"]), encoding="utf-8")
            record_run(key_of(repository, recipe["path"], tokenizer), "axolotl", tokenizer, file, date)


def _by_tokenizer(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a recipe; a template of many models once for each of their tokenizers."""
    models = recipe["keys"].get("models")
    if models is None:
        yield recipe
        return
    groups: dict[str, list[str]] = {}
    for name in models["value"]:
        known = base_of(name)
        groups.setdefault(known.tokenizer if known else "", []).append(name)
    for names in groups.values():
        yield {**recipe, "keys": {**recipe["keys"], "models": {**models, "value": names}}}


def judge_recipe(source: Source, facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> Judged:
    """Return the verdict on a recipe.

    Args:
        source: Its repository.
        facts: What is recorded of the repository.
        recipe: Its path and its keys.
    """
    meaning = READERS[source.reader](recipe["keys"], recipe["path"])
    layer_cell, layer_faults = _layers(meaning)
    row_cell, row_faults = _rows(meaning, source.repository, recipe["path"])
    is_checked = not layer_cell.startswith("not checked") or not row_cell.startswith("not checked")
    return Judged(
        source, facts, recipe["path"], meaning, layer_cell, row_cell, (*layer_faults, *row_faults), is_checked
    )


def _layers(meaning: Meaning) -> tuple[str, tuple[Fault, ...]]:
    target, known, key = meaning.target, meaning.known, meaning.target_key or meaning.base
    if target is None or known is None or key is None:
        reason = meaning.layers or "the base is not known"
        return f"not checked: {reason}", ()
    found = layers.adapted(known.label, target, meaning.has_images)
    faults = tuple(Fault(rule, severity, words, key) for rule, severity, words in found.findings)
    return layers.described(found) or "none", faults


def _rows(meaning: Meaning, repository: str, path: str) -> tuple[str, tuple[Fault, ...]]:
    made, key = meaning.rows, meaning.rows_key or meaning.base
    remark = f"; {meaning.remark}" if meaning.remark else ""
    if isinstance(made, str) or meaning.known is None or key is None:
        return f"not checked: {made or 'the base is not known'}{remark}", ()
    tokenizer = meaning.known.tokenizer
    name = str(meaning.base["value"]) if meaning.models and meaning.base else path
    run = read_runs().get(key_of(repository, name, tokenizer))
    by = ""
    if run is not None:
        found, by = run["rows"], f", made by {run['runner']} {run['version']} itself"
    elif isinstance(made, Run):
        return "not checked: the trainer was not run with it", ()
    elif isinstance(made, Scoreboard):
        found, tokenizer, by = _recorded(made), made.tokenizer, ", by the scoreboard"
    elif isinstance(made, Everything):
        found = rows.trained_on_everything(tokenizer)
    elif isinstance(made, EosIsPadding):
        found = rows.eos_is_padding(tokenizer)
    else:
        found = rows.judged_layout(made, tokenizer)
    broken = {name: rules for name, rules in found.items() if rules}
    by_rule: dict[str, list[str]] = {}
    for name, rules in broken.items():
        for rule in rules:
            by_rule.setdefault(rule, []).append(name)
    own = {*_FIRST, *(THINKING if isinstance(made, Run) and made.thinks else ())}
    faults = tuple(
        # a recipe names its data: a fault of rows with a system prompt need not be one of its own rows
        Fault(
            rule,
            "note" if isinstance(made, Run) and own.isdisjoint(names) else "error",
            f"rows {', '.join(names)}",
            key,
            is_of_rows=True,
        )
        for rule, names in by_rule.items()
    )
    right = len(found) - len(broken)
    return f"{right} of {len(found)} rows are right with {tokenizer}{by}{remark}", faults


def _recorded(board: Scoreboard) -> dict[str, tuple[str, ...]]:
    """Return the rules that the plain rows break in the record of a scoreboard."""
    configuration = next(one for one in every_configuration() if one.name == board.configuration)
    verdicts = configuration.recorded[board.tokenizer].verdicts
    return {name: tuple(verdicts[name]) for name in PLAIN}
