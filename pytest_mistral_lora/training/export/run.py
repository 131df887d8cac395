"""Write a recipe's run for another runner: its configuration, and rows that it trains on as this trainer does.

An export is a prepared run, so it is a part of `training`: it uses the recipe's models, the pinned base, and rows that
are already split, encoded and cut. It knows how runners are configured, not how they encode.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.records.files import finished_folder, write_text
from pytest_mistral_lora.training.export.bridge import (
    APPLIED,
    CHAT_ROWS,
    ROWS,
    TEMPLATE,
    Bridge,
    ExportedRun,
    plan_export,
)
from pytest_mistral_lora.training.recipe import Recipe

Form = Literal["auto", "messages", "tokens"]
"""The form of the rows: messages for the runner to encode, ids and labels, or messages if they are exact."""


@dataclass(frozen=True)
class ExportedFolder:
    """A written folder.

    Attributes:
        folder: The folder.
        config: The runner's configuration file.
        command: The command that starts the run.
        form: `messages` or `tokens`.
        not_told: Keys that the recipe sets and the runner has no setting for, each with the consequence.
        remarks: The other differences, as sentences.
    """

    folder: Path
    config: Path
    command: str
    form: str
    not_told: Mapping[str, str]
    remarks: tuple[str, ...]


def export(recipe: Recipe, bridge: Bridge, output: Path, *, form: Form = "auto") -> ExportedFolder:
    """Write the folder that starts a recipe's run in another runner.

    Args:
        recipe: The recipe.
        bridge: What writes the run for the trainer, such as `TRAINERS[NAME].load_exporter()`.
        output: The folder to make.
        form: The form of the rows.

    Raises:
        InputError: If `output` exists, if base, layers or rows do not allow the run, if the runner has no setting for a
            value that changes the mathematics, or if `form` is `messages` and the runner would train on them
            differently.
    """
    if output.exists():
        raise InputError("exists already", place=str(output), next_step="Remove it or name another output folder.")
    with recipe.naming_lines():
        run, remark = _with_form(plan_export(recipe), bridge, form)
        of_trainer = {**bridge.settings(run), **bridge.declaration(run)}
    remarks = tuple(filter(None, (remark, *bridge.objective_remarks(run), *_common_remarks(run), *bridge.remarks(run))))
    settings = yaml.safe_dump(of_trainer, sort_keys=False, allow_unicode=True)
    done = ExportedFolder(
        output,
        output / bridge.config,
        f"cd {shlex.quote(str(output))} && {bridge.command}",
        "messages" if run.as_messages else "tokens",
        bridge.unsupported_keys(recipe),
        remarks,
    )
    # all values are computed above: an error leaves no folder behind
    with finished_folder(output) as folder:
        (folder / ROWS).mkdir()
        bridge.write_rows(run, folder / ROWS)
        # in order, for `mistral-lora check` to compare with the runner's
        write_text(folder / CHAT_ROWS, "".join(f"{row.to_jsonl()}\n" for row in run.data.train.rows))
        write_text(folder / bridge.config, settings)
        write_text(folder / "README.md", "\n".join(_readme_lines(run, bridge, done)) + "\n")
    return done


def _with_form(run: ExportedRun, bridge: Bridge, form: Form) -> tuple[ExportedRun, str]:
    """Return the run with the chosen form of its rows, and a remark if messages were tried but are not exact."""
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


def why_not_messages(run: ExportedRun) -> str:
    """Return the reason why a run's rows cannot be given as messages, with the first such row; empty if they can.

    Each row is encoded as in a runner, by transformers' `apply_chat_template` with the tokenizer that `AutoTokenizer`
    loads, and compared with the ids and labels of this trainer.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(run.tokenizer, PreTrainedTokenizerFast):
        return f"transformers loads a {type(run.tokenizer).__name__} for {run.model}, which takes no chat template"
    if declared := next((str(objective) for objective in run.objectives if not objective.is_default), ""):
        return f"the training template marks each answer, and the objective is {declared}"
    template = ChatTemplate(run.tokenizer, training_template(run.encoder.tokenizer))
    for split in (run.data.train, run.data.held_out):
        for row, encoded in zip(split.rows, split.encoded, strict=True):
            found = _why_not_message(row, encoded, template)
            if found:
                return f"{row.place}: {found}"
    return ""


def _why_not_message(row: Row, encoded: EncodedRow, template: ChatTemplate) -> str:
    if not row.kind.is_chat:
        return f"it is {row.kind.title}, which has no messages"
    for message in row.messages:
        keys = {key for key, value in message.items() if value is not None}
        if row.tools or keys - {"role", "content", "weight"} or not isinstance(message.get("content"), str):
            return "it has more than roles and texts, and a table of all rows would give each the keys of the others"
    plain = [{"role": message["role"], "content": message["content"]} for message in row.messages]
    try:
        rendered = template.encode(Row(tuple(plain), None, row.place))
    except RowError as error:
        return f"the training template refuses it: {error.found}"
    ids, labels = rendered.input_ids, rendered.labels or (IGNORE_INDEX,) * len(rendered.input_ids)
    # a cut row is compared up to the cut: the runner cuts it too
    if len(ids) > len(encoded.input_ids) and ids[: len(encoded.input_ids)] == encoded.input_ids:
        ids, labels = ids[: len(encoded.input_ids)], labels[: len(encoded.input_ids)]
    if ids != encoded.input_ids:
        return "the training template gives other ids (docs/deviations.md names the ways)"
    return "" if labels == encoded.labels else "the training template gives other labels, as it does for a weight of 0"


def _common_remarks(run: ExportedRun) -> Iterator[str]:
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
        yield f"training.precision is auto, which came to {run.precision} on the machine that wrote this folder."


def _readme_lines(run: ExportedRun, bridge: Bridge, done: ExportedFolder) -> Iterator[str]:
    yield from (f"# {run.recipe.output.name}, in {bridge.title}", "")
    yield f"Tried with {bridge.versions}. Start the run in this folder:"
    yield from ("", "```console", f"$ {bridge.command}", "```", "")
    yield "Before that, you can audit its training rows by the runner's own code:"
    audit = f"mistral-lora check --runner {bridge.name} --config {bridge.config} --own-data --dataset {CHAT_ROWS}"
    audit += "" if run.declared is None else f" --objective {run.declared}"
    yield from ("", "```console", f"$ {audit} --tokenizer {run.base.path.resolve()}", "```", "")
    yield f"- `{bridge.config}`: the configuration: base {run.model}" + (f" at {run.revision}" if run.revision else "")
    train, held_out = len(run.data.train.rows), len(run.data.held_out.rows)
    numbers = f"{train} to train on" + (f", {held_out} held out" if held_out else "")
    if run.as_messages:
        yield f"- `{ROWS}/`: the rows as messages, {numbers}"
        yield f"- `{TEMPLATE}`: the training template; with it, each of these rows gets the ids and labels it has here"
    else:
        yield f"- `{ROWS}/`: the rows as ids and labels, {numbers}; the runner encodes no text"
    yield f"- `{CHAT_ROWS}`: the chat rows of the training split, for the audit"
    yield from ("", "Already applied to the rows:", "")
    yield from (f"- `{key}`: {effect}" for key, effect in APPLIED.items())
    if done.not_told:
        yield from ("", f"Keys of the recipe that {bridge.title} has no setting for:", "")
        yield from (f"- `{key}`: {consequence}" for key, consequence in done.not_told.items())
    yield from ("", "Differences from a run here:", "")
    yield from (f"- {remark}" for remark in done.remarks)
