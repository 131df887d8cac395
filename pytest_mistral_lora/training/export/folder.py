"""Write an exported run: a folder with the runner's configuration, the rows, and a page that says what is different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import yaml

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import finished_folder, write_text
from pytest_mistral_lora.training.export.axolotl import AXOLOTL
from pytest_mistral_lora.training.export.bridge import APPLIED, CHAT_ROWS, ROWS, TEMPLATE, Bridge, Run, plan
from pytest_mistral_lora.training.export.llamafactory import LLAMAFACTORY
from pytest_mistral_lora.training.export.rows import why_not_messages, write_chat_rows
from pytest_mistral_lora.training.export.trl import TRL
from pytest_mistral_lora.training.recipe import Recipe

BRIDGES: Mapping[str, Bridge] = MappingProxyType({bridge.name: bridge for bridge in (TRL, AXOLOTL, LLAMAFACTORY)})
"""The runners that a recipe can be exported to, by name."""

Form = Literal["auto", "messages", "tokens"]
"""How rows are given: messages for the runner to encode, ids and labels, or messages where that is exact."""


@dataclass(frozen=True)
class Exported:
    """A written folder.

    Attributes:
        folder: Where it is.
        config: The runner's configuration.
        command: What starts the run, in the folder.
        form: `messages` or `tokens`.
        not_told: The keys of the recipe that the runner is not told, and what that means.
        remarks: What else is different, in sentences.
    """

    folder: Path
    config: Path
    command: str
    form: str
    not_told: Mapping[str, str]
    remarks: tuple[str, ...]


def export(recipe: Recipe, to: str, output: Path, *, form: Form = "auto") -> Exported:
    """Write the folder that starts a recipe's run in another runner.

    Args:
        recipe: The recipe.
        to: A key of `BRIDGES`.
        output: The folder to make.
        form: How the rows are given.

    Raises:
        InputError: If `output` exists, if base, layers or rows do not allow the run, if the runner cannot be told a
            value that decides the mathematics, or if messages are asked for and would not be trained on as here.
    """
    bridge = BRIDGES[to]
    if output.exists():
        raise InputError("exists already", place=str(output), next_step="Remove it or name another output folder.")
    run, remark = _formed(plan(recipe), bridge, form)
    remarks = tuple(filter(None, (remark, *_always(run), *bridge.remarks(run))))
    settings = yaml.safe_dump(bridge.settings(run), sort_keys=False, allow_unicode=True)
    done = Exported(
        output,
        output / bridge.config,
        f"cd {output} && {bridge.command}",
        "messages" if run.as_messages else "tokens",
        bridge.not_told(recipe),
        remarks,
    )
    with finished_folder(output) as folder:
        (folder / ROWS).mkdir()
        bridge.write_rows(run, folder / ROWS)
        write_chat_rows(run, folder / CHAT_ROWS)
        write_text(folder / bridge.config, settings)
        write_text(folder / "README.md", "\n".join(_page(run, bridge, done)) + "\n")
    return done


def _formed(run: Run, bridge: Bridge, form: Form) -> tuple[Run, str]:
    """Return the run with its rows in the form asked for, and a remark where that form was not the first choice."""
    if form == "tokens" or (form == "auto" and not bridge.takes_messages):
        return run, ""
    reason = (
        why_not_messages(run)
        if bridge.takes_messages
        else f"the templates of {bridge.title} do not give Mistral's ids and labels"
    )
    if not reason:
        return replace(run, as_messages=True), ""
    if form == "messages":
        raise InputError(reason, place="--rows messages", expected="--rows tokens, which every row can be given as")
    return run, f"The rows are given as ids and labels, since not all of them could be given as messages: {reason}."


def _always(run: Run) -> Iterator[str]:
    training = run.recipe.training
    yield "The order of the rows comes from the runner's own use of the seed; the adapter's first values may."
    if run.eval_steps:
        yield "The held-out loss is a mean over micro-batches; here it is one over all supervised tokens."
    yield (
        f"A step has {run.rows_at_once} rows at once, {run.accumulation} times, on one device: on N devices, divide "
        "gradient_accumulation_steps by N."
    )
    if training.epochs is not None:
        yield f"{training.epochs:g} epochs of {len(run.data.train.rows)} rows are {run.steps} steps."
    if training.precision == "auto":
        yield f"training.precision is auto, which came to {run.precision} on the machine where this was written."


def _page(run: Run, bridge: Bridge, done: Exported) -> Iterator[str]:
    yield f"# {run.recipe.output.name}, in {bridge.title}"
    yield ""
    yield f"Written for {bridge.title} {bridge.versions}. Start the run in this folder:"
    yield from ("", "```console", f"$ {bridge.command}", "```", "")
    yield "What it will train on can be audited first, by the runner's own code:"
    yield from ("", "```console", f"$ {_audit(run, bridge)}", "```", "")
    yield f"- `{bridge.config}`: the configuration: base {run.model}" + (f" at {run.revision}" if run.revision else "")
    yield from _rows_lines(run)
    yield f"- `{CHAT_ROWS}`: the chat rows that are trained on, for the audit"
    yield from ("", "Done already, in the rows:", "")
    yield from (f"- `{key}`: {what}" for key, what in APPLIED.items())
    if done.not_told:
        yield from ("", f"The recipe sets these, and {bridge.title} is not told:", "")
        yield from (f"- `{key}`: {what}" for key, what in done.not_told.items())
    yield from ("", "What is different:", "")
    yield from (f"- {remark}" for remark in done.remarks)


def _audit(run: Run, bridge: Bridge) -> str:
    return (
        f"mistral-lora audit --runner {bridge.name} --config {bridge.config} --own-data --dataset {CHAT_ROWS} "
        f"--tokenizer {run.base.resolve()}"
    )


def _rows_lines(run: Run) -> Iterator[str]:
    train, held_out = len(run.data.train.rows), len(run.data.held_out.rows)
    numbers = f"{train} to train on" + (f", {held_out} held out" if held_out else "")
    if run.as_messages:
        yield f"- `{ROWS}/`: the rows as messages, {numbers}"
        yield f"- `{TEMPLATE}`: the training template; with it, each of these rows gets the ids and labels it has here"
    else:
        yield f"- `{ROWS}/`: the rows as ids and labels, {numbers}; no text is encoded any more"
