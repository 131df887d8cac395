"""What this project knows of a runner: how it is told a run, and what it cannot be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_mistral_lora.training.export.run import Run
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.recipe.fields import Section

ADAPTER = "adapter"
"""The folder, inside an exported one, where the runner saves its adapter."""

ROWS = "rows"
"""The folder, inside an exported one, with the rows."""

TEMPLATE = "training.jinja"

CHAT_ROWS = "chat.jsonl"
"""The chat rows that the rows to train on come from."""

APPLIED: Mapping[str, str] = {
    "backend": "rows are encoded",
    "data.train": "rows are encoded",
    "data.eval": "rows are held out",
    "data.held_out": "rows are held out",
    "training.truncation": "longer rows are cut or left out",
    "training.unsupervised": "rows without loss are left out or kept",
}
"""Keys of a recipe that are in the rows already, and what has been done."""

_ANSWERS = "held-out rows are not answered"
_OWN_SAFEGUARD = "a safeguard of this project's trainer"

LEFT_OUT: Mapping[str, str] = {
    "base.name": "the adapter names its base by the path",
    "base.weights_sha256": "the runner does not compare the weights; they were the pinned ones when this was written",
    "training.share_prefix": "the runner has none; it changes no gradient",
    "training.max_skipped_steps": _OWN_SAFEGUARD,
    "training.dry_run": _OWN_SAFEGUARD,
    "training.on_oom": _OWN_SAFEGUARD,
    "training.checkpoint_minutes": "the runner counts steps",
    "training.stop_at_grad_norm": _OWN_SAFEGUARD,
    "evaluation.generations": _ANSWERS,
    "evaluation.generation_steps": _ANSWERS,
    "evaluation.max_new_tokens": _ANSWERS,
    "evaluation.checks": _ANSWERS,
    "card": "the runner writes a card of its own",
    "output": f"the adapter is saved in {ADAPTER}/ of this folder",
}
"""Keys of a recipe that none of the runners has, and what that means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """A runner, and how a run is told to it.

    Attributes:
        name: The runner's name here.
        title: The runner's own name.
        versions: The version whose source decided what is written.
        config: Name of its configuration file.
        command: What starts the run, in the exported folder.
        settings: Gives its configuration of a run.
        write_rows: Writes the rows of a run into a folder.
        remarks: Gives what is different in a run with it, in sentences.
        left_out: Keys of a recipe that it does not have, beside those that none has, and what that means.
        takes_messages: Whether its own templating can be made right.
    """

    name: str
    title: str
    versions: str
    config: str
    command: str
    settings: Callable[[Run], dict[str, Any]]
    write_rows: Callable[[Run, Path], None]
    remarks: Callable[[Run], Iterator[str]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    takes_messages: bool = False

    def not_told(self, recipe: Recipe) -> dict[str, str]:
        """Return the keys that a recipe sets and this runner is not told, and what that means."""
        meanings = {**LEFT_OUT, **self.left_out}
        return {key: meanings[key] for key in _keys_set(recipe) if key in meanings}


def _keys_set(recipe: Recipe) -> list[str]:
    """Return the keys of a recipe whose value is not the default, as `section.key`."""
    keys = []
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if isinstance(section, Section):
            keys += [f"{name}.{key}" for key in _changed(section)]
        elif name in _changed(recipe):
            keys.append(name)
    return keys


def _changed(section: Section) -> list[str]:
    fields = type(section).model_fields
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    return [key for key, default in defaults.items() if getattr(section, key) != default]
