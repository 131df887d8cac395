"""The command to run after a verdict: the one that mends the first cause, or the next step of the work."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.model_targets import AdapterTarget, RecordTarget
from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, Target, given_path, is_shipped
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.session import Session

_PROGRAM = "mistral-lora"
_TO_FILL_IN = re.compile(r"\b[A-Z]{3,}\b|…")
"""A word that stands for something else, such as `VERSION`."""
_ACCEPTS = ("--update", "--mistral-golden-update", "--record")
"""Options that record what was found as right: a person decides about that."""


def next_command(session: Session, command: str = "") -> str:
    """Return the command to run after a session; empty if there is no obvious one.

    Args:
        session: The session, which has run.
        command: The command that it ran for, which is not repeated; may be empty.
    """
    from pytest_mistral_lora.report import commands_in

    failing = [
        cause.simplest
        for cause in session.causes()
        if session.options.fails_notes or cause.simplest.severity == "error"
    ]
    if failing:
        commands = commands_in(failing[0].next_step)
        done = {*shlex.split(command)}
        ready = (fix for fix in filter(_is_ready, commands) if not done.issuperset(shlex.split(fix)))
        return next(ready, f"{_PROGRAM} rules {failing[0].rule}")
    if session.exit_code or not session.outcomes or session.deselected or session.not_run:
        return ""
    with suppress(MistralLoraError, OSError):  # a target that cannot be read has a finding, and a known one may pass
        return _next_work(session)
    return ""


def next_lines(session: Session, command: str = "") -> list[str]:
    """Return the line that names the next command, for people; no line without an obvious one.

    If a part of the command is spelled out on a terminal, as a name that is not UTF-8 is, it cannot be copied: then
    there is no line.

    Args:
        session: As for `next_command`.
        command: As for `next_command`.
    """
    following = next_command(session, command)
    return [f"next: {following}"] if following and printable(following, lines=False) == following else []


def _is_ready(command: str) -> bool:
    """Return whether a command can be run as it is: it has nothing to fill in, and a path of it exists."""
    if _TO_FILL_IN.search(command) or any(option in command for option in _ACCEPTS):
        return False
    words = shlex.split(command)
    return words[0] == "pip" or any(is_shipped(Path(word)) or Path(word).exists() for word in words[2:])


def _next_work(session: Session) -> str:
    """Return the next step with sound targets: train a recipe, verify an adapter, write a recipe for rows."""
    targets = session.targets
    for target in targets:
        if isinstance(target, RecipeTarget):
            # if nothing has changed, a hook does not load what reads a recipe
            kept = None if session.kept is None else session.kept.outputs.get(target.name)
            output = kept or target.recipe.output
            return _of_adapter(output) if output.is_dir() else _command("train", target.path)
    for target in targets:
        if isinstance(target, AdapterTarget):
            return _of_adapter(target.folder)
        if isinstance(target, RecordTarget):
            return _to_ask(given_path(target.path)) if target.has_manifest_values else ""
    for target in targets:
        if isinstance(target, DatasetTarget):
            # preference pairs are for another trainer, which the user names
            return "" if _has_sides(session) else f"{_command('init', target.path)} --base {_base(target.judge)}"
    is_default = all(type(target) is Target and target.path is None for target in targets)
    return f"{_PROGRAM} init --demo" if is_default else ""


def _has_sides(session: Session) -> bool:
    return any(outcome.case == "statistics" and "sides" in outcome.facts for outcome in session.outcomes)


def _of_adapter(folder: Path) -> str:
    # `verify` recomputes the facts of a manifest, and `smoke` compares with transcripts; other trainers write neither
    commands = [_command("verify", folder)] if (folder / MANIFEST).is_file() else []
    return " && ".join([*commands, _to_ask(folder)])


def _to_ask(folder: Path) -> str:
    return _command("smoke" if (folder / TRANSCRIPTS).is_dir() else "chat", folder)


def _base(judge: Target) -> str:
    """Return the folder of a tokenizer that has weights, too; else the words for one."""
    has_weights = judge.path is not None and any(judge.path.glob("*.safetensors"))
    return shlex.quote(str(judge.path)) if has_weights else "OWNER/NAME"


def _command(verb: str, path: Path | None) -> str:
    return shlex.join([_PROGRAM, verb, str(path)])
